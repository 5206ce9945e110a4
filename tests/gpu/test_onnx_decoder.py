"""Decoders in ONNX Runtime's CUDA provider: what they compute on a processor, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import slimc
from slimc.backends.onnx.session import OnnxDecoder
from slimc.passes import Calibrate, Fuse, PerSite, Quantize

transformers = pytest.importorskip("transformers")

PROMPTS = [list(range(5, 17)), [7, 8, 9]]
NEW = 6


def llama(form: str) -> nn.Module:
    torch.manual_seed(0)
    config: Any = transformers.LlamaConfig(
        vocab_size=384,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        # More positions than a table may have are rotated outside of the attention.
        max_position_embeddings=1 << 18 if form == "rotated outside" else 256,
        initializer_range=0.2,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    if form != "siblings of two forms":
        return model
    # Siblings of two forms, which are not one product.
    by_site = PerSite(
        {"wide": [Quantize("absmax", 8, 32)], "narrow": [Quantize("absmax", 4, 32)]},
        {"re:.*v_proj": "wide"},
        default="narrow",
    )
    return slimc.compile(model, [torch.arange(64).view(2, 32)], passes=[Calibrate(), by_site, Fuse()])


@pytest.mark.parametrize("form", ["dense", "rotated outside", "siblings of two forms"])
@pytest.mark.parametrize("replay", [False, True])
def test_rotations_are_those_of_each_tokens_position(form: str, replay: bool, tmp_path: Path) -> None:
    """Moved into the attention, they would be those of the first rows of a table that has no others."""
    model = llama(form)
    slimc.export_onnx(model, tmp_path / "onnx", target="ort", dtype="float16")
    decoder = OnnxDecoder(tmp_path / "onnx", device="cuda", replay=replay)
    with torch.no_grad():
        expected = model(torch.tensor(PROMPTS[:1])).logits.numpy()
    error = np.abs(decoder.logits(np.array(PROMPTS[:1])) - expected).max()
    # Some tens of roundings of 2^-11 in a row.
    assert error <= 2**-5 * np.abs(expected).max()
    for prompt, made in zip(PROMPTS, decoder.generate(PROMPTS, NEW), strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([prompt + made])).logits[0, len(prompt) - 1 : -1]
        chosen = scores.gather(1, torch.tensor(made)[:, None])[:, 0]
        # Each token is PyTorch's likeliest, or as good as that.
        assert bool((scores.max(-1).values - chosen <= 2**-5 * scores.abs().max()).all())
