"""Permute: the same function in another order, the user's model untouched, nothing gathered at run time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimc
from slimc.backends.hf import output_embedding_names
from slimc.errors import RecipeError
from slimc.ir.capture import capture
from slimc.ir.channels import permutable
from slimc.ir.program import Program
from slimc.passes import Calibrate, Fuse, LowRank, Pass, Permute, Prune, Quantize, ScaleFolding, from_config
from slimc.passes.permute import reorder
from slimc.passes.solvers.permutation import kept_share
from slimc.progress import SilentProgress

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}

# The class, its options, and what the order of inner channels is that of: sites by the end of their names.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "Llama": ("LlamaForCausalLM", GROUPED, {"o_proj", "down_proj"}),
    "Llama, eager": ("LlamaForCausalLM", {**GROUPED, "attn_implementation": "eager"}, {"o_proj", "down_proj"}),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED, {"o_proj", "down_proj"}),
    "Qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, {"o_proj", "down_proj"}),
    "Gemma3": ("Gemma3ForCausalLM", {**GROUPED, "head_dim": 8, "sliding_window": 16}, {"o_proj", "down_proj"}),
    "OPT": ("OPTForCausalLM", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, {"out_proj", "fc2"}),
    "GPT2": (
        "GPT2LMHeadModel",
        {
            **dict.fromkeys(("vocab_size", "n_positions"), 64),
            "n_embd": 32,
            "n_layer": 1,
            "n_head": 4,
            "eos_token_id": 2,
            "bos_token_id": 1,
        },
        {"c_proj"},
    ),
    "GPTNeoX": ("GPTNeoXForCausalLM", SMALL, {"dense_4h_to_h"}),
    "Phi3": ("Phi3ForCausalLM", GROUPED, {"o_proj", "down_proj"}),
    "Bert": ("BertModel", SMALL, {"dense"}),
    "Mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}, {"o_proj"}),
}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    class_name, options, _ = ARCHITECTURES[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    config = model_class.config_class(**{key: value for key, value in options.items() if key != "attn_implementation"})
    if "attn_implementation" in options:
        config._attn_implementation = options["attn_implementation"]
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms would be alike in any order
                parameter.add_(torch.randn_like(parameter) / 4)
    return model, {"input_ids": torch.randint(3, 60, (2, 7))}


def captured(model: nn.Module, inputs: dict[str, Tensor]) -> Program:
    return capture(model, [((), inputs)], dense=dict.fromkeys(output_embedding_names(model), "output embedding"))


def output(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    result: Tensor = pytree.tree_leaves(program.run(**inputs))[0]
    return result


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_random_order_computes_the_same_function(name: str) -> None:
    model, inputs = build(name)
    program = captured(model, inputs)
    before = output(program, inputs)
    found = permutable(program)
    consumers = {site.rpartition(".")[2] for channels in found.channels for site in channels.consumed}
    assert consumers == ARCHITECTURES[name][2]
    for channels in found.channels:
        within = torch.cat([block * channels.size + torch.randperm(channels.size) for block in range(channels.blocks)])
        for stretch in (*channels.produced, *channels.consumed.values()):
            reorder(program, stretch, within)
    after = output(program, inputs)
    # Sums of at most 128 terms in another order, in at most 4 products one after another, each term rounded to 2^-24.
    assert (after - before).abs().max() <= 4 * 128 * 2.0**-24 * before.abs().max()
    assert program.replaced
    with torch.no_grad():
        assert torch.equal(pytree.tree_leaves(model(**inputs))[0], before), "the user's model stays"


def test_one_wrong_tensor_is_noticed() -> None:
    """What the test above rests on: an order that is not taken along is another function."""
    model, inputs = build("Llama")
    program = captured(model, inputs)
    before = output(program, inputs)
    channels = next(one for one in permutable(program).channels if one.blocks == 1)
    reorder(program, channels.produced[0], torch.arange(channels.count).flip(0))
    assert (output(program, inputs) - before).abs().max() > 1e-3 * before.abs().max()


Run = Callable[..., Any]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 32)
        self.up = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(torch.sigmoid(self.gate(x)) * self.up(x)))


@pytest.fixture
def gated() -> Gated:
    torch.manual_seed(0)
    model = Gated().eval()
    with torch.no_grad():
        model.down.weight.mul_(torch.randn(32).exp())
        model.norm.weight.add_(torch.randn(32) / 4)
        model.norm.bias.add_(torch.randn(32) / 4)
    return model


def x() -> Tensor:
    return torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(3))


PRUNED: Sequence[Pass] = [Calibrate(), Prune("2:4", method="magnitude"), Fuse()]
PERMUTED: Sequence[Pass] = [Calibrate(), Permute(), *PRUNED[1:]]


def test_a_pattern_keeps_more_and_both_carriers_agree(gated: Gated, run: Run) -> None:
    program, _ = run(gated, [x()], PERMUTED)
    plain, _ = run(gated, [x()], PRUNED)
    scores = [one.dense_weight(one.sites["down"]).abs() for one in (program, plain)]
    assert kept_share(scores[0], 2, 4) > kept_share(scores[1], 2, 4)
    small = slimc.compile(gated, [x()], PERMUTED)
    # Both read the same decoded weights; their sums are of at most 32 terms.
    difference = small(x()) - program.run(x())
    assert difference.abs().max() <= 3 * 64 * 2.0**-24 * program.run(x()).abs().max()
    assert torch.equal(small.norm.bias.sort().values, gated.norm.bias.sort().values)
    assert not torch.equal(small.norm.bias, gated.norm.bias), "vectors are taken along"
    assert not torch.equal(small.up.bias, gated.up.bias)


def test_the_users_model_stays_unless_in_place(gated: Gated) -> None:
    before = {name: tensor.clone() for name, tensor in gated.state_dict().items()}
    slimc.compile(gated, [x()], PERMUTED)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gated.state_dict().items())
    small = slimc.compile(gated, [x()], PERMUTED, inplace=True)
    assert small is gated
    assert not torch.equal(gated.norm.weight, before["norm.weight"])


def test_saved_and_loaded(gated: Gated, tmp_path: Path) -> None:
    small = slimc.compile(gated, [x()], PERMUTED)
    slimc.save(small, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(slimc.load(tmp_path / "out", model=Gated().eval())(x()), small(x()))


def test_a_resumed_run_gives_the_same_bytes(gated: Gated, tmp_path: Path) -> None:
    first = slimc.compile(gated, [x()], PERMUTED, journal=tmp_path / "journal")
    again = slimc.compile(gated, [x()], PERMUTED, journal=tmp_path / "journal", resume=True)
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_similar_channels_share_a_scale(gated: Gated, run: Run) -> None:
    passes = [Calibrate(), Permute(pattern=None), Quantize(method="absmax", group=8), Fuse()]
    program, _ = run(gated, [x()], passes)
    sizes = program.dense_weight(program.sites["down"]).square().sum(0)
    assert torch.equal(sizes, sizes.sort(descending=True).values)


def test_batches_that_are_not_looked_at_change_nothing(gated: Gated, run: Run) -> None:
    one, other = x(), 9 * x().flip(0, 1)

    def orders(batches: list[Tensor], looked_at: int, held_out: int = 0) -> Tensor:
        energy = Permute(sort="energy", batches=looked_at)
        program, _ = run(gated, batches, [Calibrate(), energy, Quantize(), Fuse()], held_out=held_out)
        return program.dense_weight(program.sites["down"])

    assert torch.equal(orders([one, other], 1), orders([one], 1))
    assert not torch.equal(orders([one, other], 2), orders([one], 1))
    assert torch.equal(orders([one, other], 2, held_out=1), orders([one], 1)), "held-out batches are not looked at"


def test_blocks_that_the_pattern_does_not_divide_keep_their_order() -> None:
    model, inputs = build("Llama")
    program = captured(model, inputs)
    flat = [program.flatten_inputs((), inputs)]
    Permute(pattern="4:16").run(program, flat, held_out=0, device=None, progress=SilentProgress())
    assert {name.rpartition("_proj")[0].rpartition(".")[2] for name in program.replaced} == {"gate", "up", "down"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "4:2"}, "pattern must be 'n:m' with 1 <= n < m"),
        ({"pattern": 0.5}, "pattern must be 'n:m'"),
        ({"sort": "size"}, "sort must be 'magnitude', 'energy' or null, not 'size'"),
        ({"pattern": None, "sort": None}, "nothing to do"),
        ({"batches": 0}, "batches must be 1 or more, not 0"),
        ({"patern": "2:4"}, "did you mean 'pattern'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        from_config([{"permute": options}])
    assert message in str(refusal.value).replace("Did", "did")


@pytest.mark.parametrize("one", [Permute(), ScaleFolding()])
def test_a_pass_over_the_dense_model_comes_before_all_that_compresses(gated: Gated, one: Pass) -> None:
    with pytest.raises(RecipeError, match=f"{one.name} comes after quantize.*right after calibrate"):
        slimc.compile(gated, [x()], [Calibrate(), Quantize(), one, LowRank(), Fuse()])
    with pytest.raises(RecipeError, match=f"{one.name} appears twice"):
        slimc.compile(gated, [x()], [Calibrate(), one, one, Quantize(), Fuse()])
    with pytest.raises(RecipeError, match=f"{one.name} needs calibrate before it"):
        slimc.compile(gated, [x()], [one, Quantize(), Fuse()])
