"""Decoders with a cache in ONNX Runtime: the same tokens as PyTorch, whatever the batch and the target."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from typer.testing import CliRunner

import slimc
from slimc.backends.onnx import exporters, session
from slimc.backends.onnx.description import read_description
from slimc.backends.onnx.generation import decoder_graph
from slimc.backends.onnx.replay import Replays
from slimc.backends.onnx.session import OnnxDecoder, end_tokens
from slimc.backends.onnx.verify import verify_folder
from slimc.backends.onnx.weights import TARGETS
from slimc.cli import app
from slimc.errors import CaptureError, FormatError, InputError
from slimc.passes import Activations, Calibrate, Fuse, LowRank, Pass, PerSite, Prune, Quantize
from slimc.passes.solvers.quantization import quantize_absmax
from slimc.runtime.packing import pack_weight

PROMPTS = [list(range(5, 17)), [7, 8, 9], [300], list(range(100, 120))]
NEW = 12


def llama(num_hidden_layers: int = 2, *, tied: bool = True, hidden_size: int = 64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        **{"max_position_embeddings": 256} | options,
    )
    return LlamaForCausalLM(config).eval()


def compressed(model: nn.Module) -> nn.Module:
    passes = [Calibrate(), Quantize(bits=4, group=32), Prune("2:4"), LowRank(rank=0.25, bits=4), Fuse()]
    batch = torch.arange(64).view(2, 32)
    return slimc.compile(model, [batch], passes=passes)


def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    with torch.no_grad():
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    result: list[int] = made[0, len(prompt) :].tolist()
    return result


def assert_same(model: nn.Module, folder: Path) -> OnnxDecoder:
    """Check logits and tokens of a folder, one prompt alone and several of several lengths together."""
    decoder = OnnxDecoder(folder, threads=1)
    ids = np.arange(34).reshape(2, 17) * 7 % 384
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    found = decoder.logits(ids)
    # Sums of a few thousand terms in another order, through two layers.
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    tokens = [greedy(model, prompt, NEW) for prompt in PROMPTS]
    assert decoder.generate(PROMPTS, NEW) == tokens
    assert decoder.generate(PROMPTS[:1], NEW) == tokens[:1]
    return decoder


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return compressed(llama())


@pytest.fixture(scope="module")
def folders(small: nn.Module, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The compressed Llama, exported for each target but dense."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    made = {}
    for target in ("portable", "ort", "cuda"):
        made[target] = tmp_path_factory.mktemp("onnx") / target
        slimc.export_onnx(small, made[target], target=target, tokenizer=tokenizer)
    return made


def operators(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize("target", ["portable", "ort", "cuda"])
def test_a_compressed_llama_writes_what_it_writes_in_pytorch(
    small: nn.Module, folders: dict[str, Path], target: str
) -> None:
    decoder = assert_same(small, folders[target])
    assert decoder.description.cache is not None
    assert decoder.description.cache.shared == (target != "portable")
    onnx.checker.check_model(folders[target] / "model.onnx")


def test_onnx_runtimes_own_operators_take_the_place_of_everything_in_a_layer(folders: dict[str, Path]) -> None:
    found = operators(folders["ort"])
    # It rotates q and k, and reads them and v as the one product that they are.
    assert found["GroupQueryAttention"] == 2
    assert not found["RotaryEmbedding"]
    # Of gate and up.
    assert found["Split"] == 2
    # All norms but the first, which follows no sum.
    assert found["SkipSimplifiedLayerNormalization"] == 4
    # q, k, v are one weight with its adapters, and so are gate and up; o and down are alone.
    assert found["MatMulNBits"] == 2 * 2 * 4
    assert not found["Neg"] + found["Transpose"]


def test_tied_embeddings_are_stored_once(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        tables = [one for one in model.graph.initializer if 384 in one.dims]
        assert [list(one.dims) for one in tables] == [[384, 64]]


@pytest.mark.parametrize("target", ["ort", "cuda"])
@pytest.mark.parametrize("passes", [[], [Quantize("absmax", 8, "channel")]], ids=["dense", "codes"])
def test_no_attention_is_what_onnx_runtime_would_move_rotations_into(
    passes: list[Pass], target: str, tmp_path: Path
) -> None:
    """Its CUDA provider would take this call's table of angles for one of all positions."""
    # Heads of this size are rotated outside.
    model = llama(num_hidden_layers=1, head_dim=8)
    if passes:
        # Siblings of several forms are not one product, whose parts would be apart anyway.
        forms = {"wide": passes, "narrow": [Quantize("absmax", 4, 32)]}
        by_site = PerSite(forms, {"re:.*v_proj": "wide"}, default="narrow")
        model = slimc.compile(model, [torch.arange(64).view(2, 32)], passes=[Calibrate(), by_site, Fuse()])
    slimc.export_onnx(model, tmp_path / "llama", target=target)
    graph = onnx.load(tmp_path / "llama" / "model.onnx", load_external_data=False).graph
    kinds = {name: node.op_type for node in graph.node for name in node.output}
    (attention,) = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert [kinds[name] for name in attention.input[:3]] == ["RotaryEmbedding", "RotaryEmbedding", "Reshape"]
    assert_same(model, tmp_path / "llama")


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["yarn", "llama3"],
)
def test_attention_rotates_by_the_angles_of_the_model(scaling: dict[str, Any], tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1, rope_parameters={**scaling, "rope_theta": 100.0})
    slimc.export_onnx(model, tmp_path / "llama", target="ort")
    assert not operators(tmp_path / "llama")["RotaryEmbedding"]
    decoder = assert_same(model, tmp_path / "llama")
    assert "position_ids" not in decoder.description.inputs


def test_a_table_of_rotations_ends_with_the_models_positions(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1, max_position_embeddings=40)
    slimc.export_onnx(model, tmp_path / "llama", target="ort")
    decoder = assert_same(model, tmp_path / "llama")
    assert len(decoder.generate([[7]], 40)[0]) == 40
    with pytest.raises(InputError, match="41 tokens do not fit this model, which has 40 positions"):
        decoder.generate([[7]], 41)


def test_more_positions_than_a_table_may_have_are_rotated_outside(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1, max_position_embeddings=1 << 18)
    slimc.export_onnx(model, tmp_path / "llama", target="ort")
    assert operators(tmp_path / "llama")["RotaryEmbedding"] == 2
    assert assert_same(model, tmp_path / "llama").description.positions is None


@pytest.mark.parametrize("target", ["portable", "ort"])
def test_of_a_prompt_only_the_last_logits_are_computed(folders: dict[str, Path], target: str) -> None:
    decoder = OnnxDecoder(folders[target], threads=1)
    whole = decoder.logits(np.array([PROMPTS[0]]))
    for prompts, first in (([PROMPTS[0]], 11), ([PROMPTS[0], PROMPTS[1]], 2)):
        state = session._State(decoder, len(prompts), 12, capacity=13, lengths=np.array([len(one) for one in prompts]))
        ids = np.array([prompt + [0] * (12 - len(prompt)) for prompt in prompts])
        logits = state.run(ids, first)
        assert logits.shape == (len(prompts), 12 - first, 384)
        # The same sums, maybe in another order.
        np.testing.assert_allclose(logits[0], whole[0, first:], rtol=0, atol=2.0**-17 * np.abs(whole).max())


def test_callers_that_do_not_say_which_logits_get_all(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        opened = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        assert [one.name for one in opened.get_overridable_initializers()] == ["first_logits"]
        assert "first_logits" not in {one.name for one in opened.get_inputs()}


def test_a_folder_that_always_computes_all_logits_runs(folders: dict[str, Path], tmp_path: Path) -> None:
    """Earlier exports have no such input."""
    copy = shutil.copytree(folders["ort"], tmp_path / "copy")
    description = json.loads((copy / "slim_onnx.json").read_text())
    description["inputs"].remove("first_logits")
    (copy / "slim_onnx.json").write_text(json.dumps(description))
    assert OnnxDecoder(copy, threads=1).generate(PROMPTS, 4) == OnnxDecoder(folders["ort"]).generate(PROMPTS, 4)


@pytest.mark.parametrize("target", ["portable", "ort"])
def test_both_exporters_give_one_graph(small: nn.Module, target: str) -> None:
    ours, theirs = (decoder_graph(small, target=target, exporter=name).whole() for name in ("slimc", "transformers"))
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


def test_an_exporter_that_is_not_there_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1)
    with pytest.raises(InputError, match="no exporter 'transformer' .did you mean 'transformers'"):
        slimc.export_onnx(model, tmp_path / "out", exporter="transformer")

    def refuse(*_: Any) -> None:
        raise RuntimeError("cannot")

    monkeypatch.setattr(exporters, "_by_transformers", refuse)
    with pytest.raises(CaptureError, match="LlamaForCausalLM cannot be traced with its cache: cannot"):
        slimc.export_onnx(model, tmp_path / "out", exporter="transformers")
    assert not list(tmp_path.iterdir())
    slimc.export_onnx(model, tmp_path / "fallen-back")
    monkeypatch.setattr(exporters, "_parts", lambda: None)
    with pytest.raises(InputError, match=r"transformers .* has no exporter that works"):
        slimc.export_onnx(model, tmp_path / "out", exporter="transformers")
    slimc.export_onnx(model, tmp_path / "without")
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "without" / name).read_bytes() == (tmp_path / "fallen-back" / name).read_bytes()


def test_windows_in_standard_operators(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=6,
        initializer_range=0.3,
    )
    model = MistralForCausalLM(config).eval()
    slimc.export_onnx(model, tmp_path / "mistral")
    assert_same(model, tmp_path / "mistral")


def test_windows_scaled_embeddings_and_norms_of_heads_in_onnx_runtimes_operators(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Gemma3ForCausalLM(config).eval()
    slimc.export_onnx(model, tmp_path / "gemma", target="ort")
    assert_same(model, tmp_path / "gemma")


@pytest.mark.parametrize("target", ["portable", "ort"])
def test_a_mixture_of_experts(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    model = MixtralForCausalLM(config).eval()
    before = config._experts_implementation
    slimc.export_onnx(model, tmp_path / "onnx", target=target)
    assert config._experts_implementation == before, "the model is left as it was"
    assert_same(model, tmp_path / "onnx")


def test_learned_positions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2, n_positions=40, initializer_range=0.3)
    config.bos_token_id, config.eos_token_id = 0, 1
    model = GPT2LMHeadModel(config).eval()
    slimc.export_onnx(model, tmp_path / "gpt2", target="ort")
    decoder = assert_same(model, tmp_path / "gpt2")
    with pytest.raises(InputError, match="41 tokens do not fit this model, which has 40 positions"):
        decoder.generate([[1]], 41)


def with_rounded_embedding(model: Any, bits: int, group: int) -> Any:
    """Return a copy of a model whose embedding holds what ``embedding_bits`` makes of it."""
    rounded = copy.deepcopy(model)
    weight = rounded.get_input_embeddings().weight
    found = quantize_absmax(weight.detach(), bits, group, scale_dtype=torch.float16)
    packed = pack_weight(found.codes, bits=bits, scale=found.scale.float(), group=group)
    with torch.no_grad():
        weight.copy_(packed.decode())
    return rounded


@pytest.mark.parametrize("target", ["ort", "cuda"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_rounded_embeddings_are_one_constant_that_is_read_by_rows_and_multiplied_by(
    bits: int, group: int, target: str, tmp_path: Path
) -> None:
    model = llama(num_hidden_layers=1)
    slimc.export_onnx(model, tmp_path / "onnx", target=target, embedding_bits=bits)
    assert_same(with_rounded_embedding(model, bits, group), tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    blocks = 64 // group
    tables = [list(one.dims) for one in graph.initializer if 384 in one.dims]
    assert tables == [[384, blocks, group * bits // 8], [384, blocks]]


@pytest.mark.parametrize("target", TARGETS)
def test_an_output_embedding_in_codes_is_an_option_of_the_recipe(target: str, tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1, tied=False)
    by_site = PerSite(
        {"head": [Quantize("absmax", 8, 32)], "rest": [Quantize("absmax", 4, 32)]}, {"lm_head": "head"}, "rest"
    )
    batch = torch.arange(64).view(2, 32)
    small = slimc.compile(model, [batch], passes=[Calibrate(), by_site, Fuse()], include="lm_head")
    # The embedding that is looked up, which the other one does not share, may be rounded besides.
    bits = 4 if target in ("ort", "cuda") else None
    report = slimc.export_onnx(small, tmp_path / "onnx", target=target, embedding_bits=bits)
    assert report.sites["lm_head"].form.startswith("int8/32")
    assert_same(with_rounded_embedding(small, 4, 32) if bits else small, tmp_path / "onnx")


def test_half_precision_keeps_the_cache_in_it(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1)
    slimc.export_onnx(model, tmp_path / "half", target="ort", dtype="float16", embedding_bits=8)
    decoder = OnnxDecoder(tmp_path / "half", threads=1)
    assert decoder.cache.dtype == "float16"
    ids = np.arange(8)[None]
    with torch.no_grad():
        expected = with_rounded_embedding(model, 8, 64)(torch.from_numpy(ids)).logits.numpy()
    error = np.abs(decoder.logits(ids).astype(np.float32) - expected).max()
    # Some tens of roundings of 2^-11 in a row.
    assert error <= 2**-5 * np.abs(expected).max()


class ForgetfulBinding:
    """Binds values as ONNX Runtime 1.22 does, which keeps their memory's address only."""

    def __init__(self, binding: Any) -> None:
        self._binding = binding
        self.arrays: dict[str, weakref.ref[np.ndarray]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self._binding._iobinding.bind_ortvalue_input(name, value._ortvalue)
        if value._numpy_obj is not None:
            self.arrays[name] = weakref.ref(value._numpy_obj)


@pytest.mark.parametrize("target", ["portable", "ort"])
def test_what_is_bound_stays_in_memory(target: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, expected = OnnxDecoder(folders[target]), OnnxDecoder(folders[target]).generate(PROMPTS, NEW)
    bindings, alive = [], []
    make, run = decoder._session.io_binding, decoder._session.run_with_iobinding

    def forgetful() -> ForgetfulBinding:
        bindings.append(ForgetfulBinding(make()))
        return bindings[-1]

    def checked(binding: ForgetfulBinding, options: Any) -> None:
        alive.append({name for name, array in binding.arrays.items() if array() is not None})
        run(binding, options)

    monkeypatch.setattr(decoder._session, "io_binding", forgetful)
    monkeypatch.setattr(decoder._session, "run_with_iobinding", checked)
    assert decoder.generate(PROMPTS, NEW) == expected
    own = set(decoder.description.inputs) - set(decoder.cache.names("past_key_values"))
    assert len(alive) == NEW
    assert all(own <= names for names in alive)


def test_sampling_follows_its_seed(folders: dict[str, Path]) -> None:
    decoder = OnnxDecoder(folders["ort"], threads=1)
    first, again, other = (decoder.generate(PROMPTS[:2], NEW, temperature=5.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_text_ends_at_a_stop_token(small: nn.Module, folders: dict[str, Path]) -> None:
    decoder = OnnxDecoder(folders["portable"], threads=1)
    expected = [greedy(small, prompt, NEW) for prompt in PROMPTS[:2]]
    stop = expected[0][3]
    seen: list[list[int]] = []
    found = decoder.generate(PROMPTS[:2], NEW, stop=[stop], on_tokens=lambda tokens: seen.append(list(tokens)))
    assert found == [one[: one.index(stop) + 1] if stop in one else one for one in expected]
    assert [row[0] for row in seen[:4]] == expected[0][:4]


def test_the_command_line_and_the_example_run_it(folders: dict[str, Path], small: nn.Module) -> None:
    folder = folders["ort"]
    assert end_tokens(folder) == {1}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "Alice was"
    words = greedy(small, tokenizer(prompt).input_ids, 8)
    words = words[: words.index(1)] if 1 in words else words
    text = prompt + tokenizer.decode(words)
    result = CliRunner().invoke(app, ["generate", str(folder), "--prompt", prompt, "--tokens", "8"])
    assert result.exit_code == 0, result.output
    assert text in result.output
    script = Path(__file__).parents[3] / "examples" / "onnx_generate.py"
    command = [sys.executable, str(script), str(folder), "--prompt", prompt, "--tokens", "8"]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    assert text in made.stdout
    assert made.stderr == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--tokens", "300"], "300 tokens do not fit the 256 of this model"),
        (["--provider", "NoneSuch"], "this onnxruntime has no NoneSuch"),
    ],
)
def test_what_the_example_refuses(options: list[str], message: str, folders: dict[str, Path]) -> None:
    script = Path(__file__).parents[3] / "examples" / "onnx_generate.py"
    made = subprocess.run([sys.executable, str(script), str(folders["ort"]), *options], capture_output=True, text=True)
    assert made.returncode == 2
    assert message in made.stderr


# ----------------------------------------------------------------------------------------------------- bad input


class Scaled(nn.Embedding):
    """An embedding that is more than a table."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(ids)


def test_models_without_a_known_cache_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(InputError, match="BertModel cannot be exported with a cache"):
        slimc.export_onnx(bert, tmp_path / "bert", cache=True)
    with pytest.raises(InputError, match="leave example_inputs out"):
        slimc.export_onnx(llama(), tmp_path / "llama", torch.zeros(1, 3, dtype=torch.int64), cache=True)
    for options, message in (
        ({"embedding_bits": 4}, "'portable' has no operator that looks up rows"),
        ({"embedding_bits": 5, "target": "ort"}, "rounded to 4 or 8 bits, not to 5"),
        ({"embedding_bits": 4, "cache": False}, "with a cache only"),
    ):
        with pytest.raises(InputError, match=message):
            slimc.export_onnx(llama(num_hidden_layers=1), tmp_path / "llama", **options)
    odd = llama(num_hidden_layers=1, hidden_size=40)
    with pytest.raises(InputError, match="has 40 columns, no multiple of 16, so ONNX Runtime cannot hold it in 4 bits"):
        slimc.export_onnx(odd, tmp_path / "odd", target="ort", embedding_bits=4)
    scaled = llama(num_hidden_layers=1)
    scaled.set_input_embeddings(Scaled(384, 64))
    with pytest.raises(InputError, match="is a Scaled, which computes more than rows; export without rounding it"):
        slimc.export_onnx(scaled, tmp_path / "scaled", target="ort", embedding_bits=4)
    assert not list(tmp_path.iterdir())


def test_the_report_says_why_a_decoder_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = llama(num_hidden_layers=1)
    note = "no cache, so every new token takes a call with the whole text"
    assert note not in str(slimc.export_onnx(small, tmp_path / "chosen", cache=False))
    monkeypatch.setattr(LlamaForCausalLM, "_supports_attention_backend", False)
    report = slimc.export_onnx(small, tmp_path / "unknown")
    assert note in str(report)
    assert "a LlamaForCausalLM cannot be exported with a cache: only causal" in str(report)
    assert read_description(tmp_path / "unknown").cache is None
    monkeypatch.undo()
    small.config.layer_types = ["linear_attention"]
    with pytest.raises(InputError, match="layers of kind linear_attention keep no keys and values; export it without"):
        slimc.export_onnx(small, tmp_path / "kinds", cache=True)


def test_empty_prompts_and_unknown_devices_are_refused(folders: dict[str, Path]) -> None:
    decoder = OnnxDecoder(folders["ort"], threads=1)
    for prompts in ([], [[1], []]):
        with pytest.raises(InputError, match="a prompt is empty"):
            decoder.generate(prompts, 1)
    with pytest.raises(InputError, match="runs on cpu or cuda, not on 'tpu'"):
        OnnxDecoder(folders["ort"], device="tpu")


def test_a_runtime_that_is_too_old_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("onnxruntime")

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Unsupported model IR version: 99, max supported IR version: 13")

    monkeypatch.setattr(runtime, "InferenceSession", refuse)
    with pytest.raises(InputError, match="is too old for it: Unsupported model IR version: 99"):
        OnnxDecoder(folders["ort"])
    monkeypatch.setattr(runtime, "__version__", "1.9.0")
    for opened in (lambda: OnnxDecoder(folders["ort"]), lambda: list(verify_folder(folders["ort"]))):
        with pytest.raises(InputError, match=r"onnxruntime 1\.9\.0 is too old .*onnxruntime>=1\.22"):
            opened()


@pytest.mark.parametrize("level", [0, 4])
def test_rounded_exports_are_verified_as_what_they_are(small: nn.Module, level: int, tmp_path: Path) -> None:
    slimc.export_onnx(small, tmp_path / "onnx", target="ort", embedding_bits=4, accuracy_level=level)
    checks = {check.name: check for check in verify_folder(tmp_path / "onnx", against=small, tokens=8)}
    assert [name for name, check in checks.items() if not check.passed] == []
    if level == 0:
        assert "40 of 40 greedy tokens" in checks["tokens"].detail


def test_rounding_does_not_hide_another_model(small: nn.Module, tmp_path: Path) -> None:
    slimc.export_onnx(small, tmp_path / "onnx", target="ort", accuracy_level=4)
    other = copy.deepcopy(small)
    with torch.no_grad():
        other.model.norm.weight.mul_(torch.linspace(0.5, 1.5, len(other.model.norm.weight)))
    checks = {check.name: check.passed for check in verify_folder(tmp_path / "onnx", against=other, tokens=1)}
    assert [name for name, passed in checks.items() if not passed] == ["outputs"]


@pytest.mark.parametrize("target", ["portable", "ort"])
def test_layers_that_round_their_inputs_are_verified_as_what_they_are(target: str, tmp_path: Path) -> None:
    passes = [Calibrate(), Quantize("absmax", 4, 32), Activations(kind="int8"), Fuse()]
    model = slimc.compile(llama(), [torch.randint(0, 300, (4, 32))], passes=passes)
    slimc.export_onnx(model, tmp_path / "onnx", target=target)
    checks = {check.name: check for check in verify_folder(tmp_path / "onnx", against=model, tokens=8)}
    assert [name for name, check in checks.items() if not check.passed] == []
    assert "root mean square" in checks["outputs"].detail


def test_damaged_folders_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["ort"], tmp_path / "copy")
    description = json.loads((copy / "slim_onnx.json").read_text())
    (copy / "model.onnx").write_bytes(b"no model")
    with pytest.raises(FormatError, match="has 8 bytes, not the"):
        OnnxDecoder(copy)
    sized = {**description["files"], "model.onnx": 8}
    (copy / "slim_onnx.json").write_text(json.dumps(description | {"files": sized}))
    with pytest.raises(FormatError, match="cannot open it"):
        OnnxDecoder(copy)
    (copy / "model.onnx.data").unlink()
    with pytest.raises(FormatError, match=r"model\.onnx\.data: is missing"):
        OnnxDecoder(copy)
    for change, message in (({"format": 9}, "is of format 9"), ({"cache": {}}, "lacks or garbles")):
        (copy / "slim_onnx.json").write_text(json.dumps(description | change))
        with pytest.raises(FormatError, match=message):
            read_description(copy)
    (copy / "slim_onnx.json").write_text(json.dumps(description | {"cache": None}))
    with pytest.raises(InputError, match="was exported without a cache"):
        OnnxDecoder(copy)


def test_kernels_run_on_a_gpu_only(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its kernels run on cuda, not on cpu"):
        OnnxDecoder(folders["cuda"], kernels=tmp_path / "slim_kernels.so")


@pytest.mark.parametrize("target", ["ort", "cuda"])
def test_steps_in_buffers_that_stay_are_the_same_steps(folders: dict[str, Path], target: str) -> None:
    """What a CUDA graph would replay, run launch by launch on the CPU: a mask as long as the room for the cache."""
    decoder, same = OnnxDecoder(folders[target], threads=1), OnnxDecoder(folders[target], threads=1)
    same._replays = Replays(onnxruntime, same._session, same.cache, "cpu")
    for prompts in (PROMPTS, PROMPTS[:1], [[7]], PROMPTS):
        assert same.generate(prompts, NEW) == decoder.generate(prompts, NEW)
