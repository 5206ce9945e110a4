"""How exactly the processor multiplies float32, whatever ``torch.set_float32_matmul_precision`` says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

__all__ = ["processor_products"]


@contextmanager
def processor_products(precision: Literal["ieee", "bf16"]) -> Iterator[None]:
    """Let the CPU multiply float32 matrices as they are, or rounded to bfloat16; sums are in float32 either way.

    The setting is of the whole process: not for several threads at once. Nothing changes with releases of PyTorch
    before 2.9, which lack it.
    """
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is None:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before
