"""Recorded operations give what the same operations give one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from slimc.passes.solvers import descend, nm_mask, quantize_slim
from slimc.passes.solvers.replay import replay


def twice(first: Tensor, second: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    total = first * factor if second is None else first * factor + second
    return total, total.sum(1)


def test_calls_of_equal_shapes_are_recorded_and_others_are_told_apart() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    for size in (4, 8, 4, 8, 4):
        for other in (True, False):
            first, second = torch.randn(2, size, 3, generator=generator, device="cuda")
            arguments = (first, second if other else None, 2.0 if size == 4 else 3.0)
            for found, exact in zip(replay(twice, *arguments), twice(*arguments), strict=True):
                assert torch.equal(found, exact)


def test_descent_on_the_gpu_ends_where_it_does_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 640, generator=generator)
    inputs = torch.randn(2000, 640, generator=generator) * torch.rand(640, generator=generator).exp()
    gram = inputs.T @ inputs
    mask = nm_mask(weight.abs(), 2, 4)
    start = quantize_slim(weight, 4, 64, mask=mask)
    errors = []
    for device in ("cpu", "cuda"):
        moved = quantize_slim(weight.to(device), 4, 64, mask=mask.to(device))
        stored, kept = descend(weight.to(device), gram.to(device), moved, mask.to(device), pattern=(2, 4), sweeps=3)
        error = ((stored.dequantize() * kept).cpu() - weight).double()
        errors.append(float(((error @ gram.double()) * error).sum()))
    error = (start.dequantize() * mask - weight).double()
    assert errors[0] < 0.8 * float(((error @ gram.double()) * error).sum())
    # Sums in another order choose another code here and there, and what follows goes its own way to a like end.
    assert abs(errors[1] / errors[0] - 1) < 0.02
