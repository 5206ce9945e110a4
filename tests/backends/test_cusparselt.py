"""The layout of cuSPARSELt, as far as it can be told without a GPU, and what the kernel refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from slimc.backends import cusparselt
from slimc.runtime.formats import NM, LinearFormat, WeightFormat

SPARSE = WeightFormat(64, 96, 4, per_tensor=True, sparsity=NM(2, 4), dtype=torch.bfloat16)


def refuses(weight: WeightFormat, *factors: WeightFormat) -> str | None:
    return cusparselt._refuses_format(LinearFormat(weight, *factors))


def test_forms_that_are_refused() -> None:
    assert refuses(SPARSE) is None
    assert refuses(replace(SPARSE, bits=None, per_tensor=False)) is None
    assert "computes 2:4 weights, not int4 per tensor" in str(refuses(replace(SPARSE, sparsity=None)))
    assert "is for bfloat16" in str(refuses(replace(SPARSE, dtype=torch.float16)))
    assert "multiples of 64 rows and 32 columns" in str(refuses(replace(SPARSE, rows=32)))
    assert "multiples of 64 rows and 32 columns" in str(refuses(replace(SPARSE, columns=100)))
    assert "multiple of 16 columns, not 8" in str(refuses(replace(SPARSE, per_tensor=False, group=8)))
    factors = [WeightFormat(*shape, 4, 64, dtype=torch.bfloat16) for shape in ((64, 9), (9, 96))]
    assert refuses(SPARSE, *factors) is None
    assert "one dtype" in str(refuses(SPARSE, *(replace(factor, dtype=torch.float16) for factor in factors)))


def test_without_a_gpu_it_says_so() -> None:
    reason = cusparselt.CUSPARSELT.accepts(LinearFormat(SPARSE), torch.bfloat16, torch.device("cpu"), 64)
    assert reason == "needs a CUDA GPU, not cpu"


def test_algorithms_are_read_from_disk_and_nonsense_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("SLIMC_CACHE_DIR", str(tmp_path))
    cusparselt._known_algorithms.cache_clear()
    assert cusparselt._known_algorithms("a") == {}
    cusparselt._FOLDER.write("b", json.dumps({16: 3}).encode())
    cusparselt._FOLDER.write("c", b"[1]")
    assert cusparselt._known_algorithms("b") == {16: 3}
    assert cusparselt._known_algorithms("c") == {}
    cusparselt._known_algorithms.cache_clear()
