"""Folders for stock transformers, written from layers that a GPU holds in the order of its kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import slimc
from slimc.passes import Calibrate, Fuse, LowRank, Pass, Prune, Quantize

transformers = pytest.importorskip("transformers")

PASSES: dict[str, list[Pass]] = {
    "2:4": [Calibrate(), Quantize(bits=4), Prune("2:4"), LowRank(rank=0.25, bits=4), Fuse()],
    "zero points": [Quantize("absmax", 4, 64, symmetric=False), Fuse()],
}


@pytest.mark.parametrize("form", PASSES)
def test_the_files_are_those_that_a_processor_writes(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=384,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    dense = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    small = slimc.compile(dense, torch.randint(0, 384, (4, 32)), PASSES[form])
    slimc.export_hf(small, tmp_path / "cpu")
    with torch.no_grad():
        small.cuda()(torch.randint(0, 384, (1, 8), device="cuda"))
    slimc.export_hf(small, tmp_path / "cuda")
    names = sorted(path.name for path in (tmp_path / "cpu").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cuda").iterdir())
    for name in names:
        assert (tmp_path / "cpu" / name).read_bytes() == (tmp_path / "cuda" / name).read_bytes(), name
