"""Decoders whose layers have signs, or widths of their own for groups of columns: exported, and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimc
from slimc.passes import AllocateBits, Calibrate, Decompose, Fuse, Pass, Quantize

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

from slimc.backends.onnx.verify import verify_folder  # noqa: E402 - after the check that onnx is there

FORMS: dict[str, Sequence[Pass]] = {
    "signs": [Calibrate(), Decompose(ratio=None, pattern="2:4", bits=4, group=16)],
    "widths": [Calibrate(), AllocateBits(2, 16, "output", widest=4), Quantize("absmax", symmetric=True)],
}

NOTES = {
    ("signs", "portable"): "signs: codes of 1 bit are stored in 2",
    ("signs", "ort"): "signs: codes of 1 bit are stored in 2",
    ("signs", "dense"): "signs x rank 1 fp32 are added to its numbers, which leaves no zeros",
    ("widths", "portable"): r"weight: codes of \d to \d bits are stored in 4",
    ("widths", "ort"): r"weight: codes of \d to \d bits are stored in 4",
    ("widths", "dense"): r"weight: int\d-\d/16 is stored as numbers of 32 bits",
}


@pytest.fixture(scope="module", params=FORMS)
def small(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """A Llama of one layer, and the name of its form."""
    torch.manual_seed(0)
    config: Any = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (4, 32))
    return request.param, slimc.compile(model, [ids], passes=[*FORMS[request.param], Fuse()])


@pytest.mark.parametrize("target", ["portable", "ort", "dense"])
def test_a_decoder_is_exported_and_verified(small: tuple[str, nn.Module], target: str, tmp_path: Path) -> None:
    form, model = small
    report = slimc.export_onnx(model, tmp_path / "onnx", target=target)
    checks = list(verify_folder(tmp_path / "onnx", against=model))
    assert [check for check in checks if not check.passed] == []
    assert {"constants", "outputs", "tokens"} <= {check.name for check in checks}
    assert any(check.name.startswith("layer ") for check in checks), "a layer was computed alone"
    assert re.search(NOTES[form, target], str(report))
    for name, site in report.sites.items():
        assert site.bytes >= site.packed_bytes, f"{name} is smaller than packed"
