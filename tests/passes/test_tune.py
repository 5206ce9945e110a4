"""Tune: gradient steps on scales and values lower the distance to the dense output and leave the bytes as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimc.errors import NumericsError, RecipeError
from slimc.passes import AllocateBits, Calibrate, Fuse, LowRank, Pass, Prune, Quantize, Tune
from slimc.passes.pipeline import check_order

RECIPES: list[list[Pass]] = [
    [Quantize(bits=3, group=16), Prune("2:4"), LowRank(rank=2, bits=4, group=8)],
    [Quantize("absmax", 3, symmetric=False), LowRank(rank=2)],
    [Quantize(bits=4, activation_aware=True, fraction=0.1), Prune(0.5)],
    [Prune("1:2")],
    [AllocateBits(2, 8, direction="reverse"), Quantize("gptq", symmetric=True)],
    [Quantize("gptq", 1, 8)],
]


def distance(program: Any, network: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(program.run(batch), network(batch)) for batch in batches]
    return sum(float((found - exact).square().sum()) for found, exact in pairs)


@pytest.mark.parametrize("passes", RECIPES, ids=lambda passes: " ".join(one.name for one in passes))
def test_it_lowers_the_distance_and_keeps_the_bytes(
    passes: list[Pass], network: nn.Module, batches: list[Tensor], run: Any
) -> None:
    before, outcome = run(network, batches, [Calibrate(), *passes])
    after, tuned = run(network, batches, [Calibrate(), *passes, Tune(epochs=10, rate=5e-3, loss="mse"), Fuse()])
    assert distance(after, network, batches) < 0.98 * distance(before, network, batches)
    assert [row.bits for row in tuned.rows] == [row.bits for row in outcome.rows]
    assert tuned.seconds["tune"] > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    for name, site in before.sites.items():
        old, new = site.packed.tensors(), after.sites[name].packed.tensors()
        assert list(old) == list(new)
        for part, tensor in old.items():
            assert new[part].dtype == tensor.dtype
            if not part.endswith("scale") and tensor.dtype == torch.uint8:
                assert torch.equal(new[part], tensor)


def test_held_out_batches_stop_what_only_fits_the_others(network: nn.Module, batches: list[Tensor], run: Any) -> None:
    """A rate far too high is never kept: the start is among the states that are compared."""
    passes = [Calibrate(held_out=0.3), Quantize(bits=3, group=16)]
    before, _ = run(network, batches, passes, held_out=1)
    after, _ = run(network, batches, [*passes, Tune(epochs=3, rate=0.9, loss="mse")], held_out=1)
    judges = batches[-1:]
    assert distance(after, network, judges) <= distance(before, network, judges) * (1 + 1e-5)


def test_distributions_are_compared_where_the_output_is_logits(
    network: nn.Module, batches: list[Tensor], run: Any
) -> None:
    def divergence(program: Any) -> float:
        with torch.no_grad():
            found = torch.log_softmax(torch.cat([program.run(batch).flatten(0, -2) for batch in batches]), -1)
            exact = torch.log_softmax(torch.cat([network(batch).flatten(0, -2) for batch in batches]), -1)
        return float((exact.exp() * (exact - found)).sum())

    passes = [Calibrate(), Quantize(bits=2, group=16)]
    before, _ = run(network, batches, passes)
    after, _ = run(network, batches, [*passes, Tune(epochs=10)])
    assert divergence(after) < 0.98 * divergence(before)


def test_a_loss_that_is_no_number_is_an_error(network: nn.Module, batches: list[Tensor], run: Any) -> None:
    # Infinite logits are beyond what two distributions can be compared by.
    with torch.no_grad():
        network.down.bias[0] = torch.inf
    with pytest.raises(NumericsError, match="tune: the loss is nan at step 1 of"):
        run(network, batches, [Calibrate(), Quantize(), Tune()])


def test_its_place_and_options() -> None:
    with pytest.raises(RecipeError, match="tune has nothing to tune"):
        check_order([Calibrate(), Tune()])
    with pytest.raises(RecipeError, match="tune appears twice.*Raise the epochs"):
        check_order([Calibrate(), Quantize(), Tune(), Tune()])
    with pytest.raises(RecipeError, match="tune needs calibrate before it"):
        check_order([Quantize(), Tune()])
    for option, value in (("epochs", 0), ("epochs", 1.5), ("rate", 0), ("rate", 1.0), ("loss", "l1")):
        with pytest.raises(RecipeError, match=f"tune: {option}"):
            Tune.from_options({option: value})
