"""Capture of many architectures with small random configurations: what becomes a site, and why the rest does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import slimc
from slimc import recipes
from slimc.backends.hf import output_embedding_names
from slimc.ir.capture import capture
from slimc.ir.carrier import install
from slimc.passes import Calibrate, Fuse, Permute, Quantize
from slimc.passes.pipeline import run
from slimc.progress import SilentProgress

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 60, (2, 7))}


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


# The class, its options, its inputs, and how many sites there are, in how many groups that share an input.
CASES: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, torch.Tensor]], int, int]] = {
    "Llama": ("LlamaForCausalLM", {**GROUPED, "num_hidden_layers": 2}, tokens, 14, 8),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED, tokens, 7, 4),
    "Qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, tokens, 7, 4),
    "Gemma3": (
        "Gemma3ForCausalLM",
        {**GROUPED, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 16},
        tokens,
        14,
        8,
    ),
    "OPT": ("OPTForCausalLM", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, tokens, 6, 4),
    "GPT2": (
        "GPT2LMHeadModel",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
        tokens,
        4,
        4,
    ),
    "GPTNeoX": ("GPTNeoXForCausalLM", SMALL, tokens, 4, 4),
    "Phi3": ("Phi3ForCausalLM", GROUPED, tokens, 4, 4),
    "Bert": ("BertModel", SMALL, tokens, 7, 5),
    "ViT": (
        "ViTModel",
        {
            **{
                key: SMALL[key]
                for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            },
            "image_size": 16,
            "patch_size": 8,
        },
        pixels,
        7,
        5,
    ),
    "Mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}, tokens, 4, 2),
}


def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], int, int]:
    class_name, options, inputs, sites, groups = CASES[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options)).eval()
    return model, inputs(), sites, groups


@pytest.mark.parametrize("name", CASES)
def test_sites_graph_and_compressed_model(name: str) -> None:
    model, inputs, expected, groups = build(name)
    with torch.no_grad():
        before = model(**inputs)[0]
    dense = dict.fromkeys(output_embedding_names(model), "output embedding")
    program = capture(model, [((), inputs)], dense=dense)
    assert len(program.sites) == expected, list(program.sites)
    assert len({site.group for site in program.sites.values()}) == groups
    assert all(row.reason for row in program.left)
    listed = {site.weight_name for site in program.sites.values()} | {row.name for row in program.left}
    listed |= {f"{row.name}.weight" for row in program.left}
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert matrices <= listed, "every matrix is a site or is left alone with a reason"
    assert torch.equal(pytree.tree_leaves(program.run(**inputs))[0], before), "the graph computes what the model does"

    run(program, [Quantize(method="absmax", bits=8, group="channel"), Fuse()], [], progress=SilentProgress())
    small = install(model, program, inplace=False)
    with torch.no_grad():
        after = small(**inputs)[0]
        assert torch.equal(before, model(**inputs)[0]), "the model passed in is left as it was"
    assert torch.equal(pytree.tree_leaves(program.run(**inputs))[0], after), "both carriers give one result"
    assert not torch.equal(before, after)
    assert (after - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_the_default_recipe_computes_the_same_whatever_stays_dense(name: str) -> None:
    model, inputs, sites, _ = build(name)
    permute = next(one for one in recipes.load(recipes.DEFAULT).build() if isinstance(one, Permute))
    passes = [Calibrate(), permute, Quantize(method="absmax", bits=8, group="channel"), Fuse()]
    small = slimc.compile(model, [inputs], passes, exclude="re:.*(down|dense|v_proj|fc1|c_proj).*")
    assert 0 < len(slimc.report(small).sites) < sites
    with torch.no_grad():
        before, after = model(**inputs)[0], small(**inputs)[0]
    assert (after - before).norm() < 0.05 * before.norm()
