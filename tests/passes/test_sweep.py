"""The sweep: actual inputs, shared statistics, freed values, and nothing computed in vain."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimc
from slimc.passes import Calibrate, Prune, Quantize
from slimc.passes import sweep as sweeping
from slimc.passes.statistics import InputStatistics
from slimc.passes.work import SiteWork

PASSES = [Calibrate(), Quantize(), Prune()]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, InputStatistics]:
    """The statistics that each site was compressed with."""
    found: dict[str, InputStatistics] = {}
    apply = Prune.apply

    def spy(self: Prune, work: SiteWork) -> None:
        found[work.name] = work.require_statistics("spy")
        apply(self, work)

    monkeypatch.setattr(Prune, "apply", spy)
    return found


def test_statistics_are_those_of_the_compressed_predecessors(
    network: nn.Module, batches: list[Tensor], seen: dict[str, InputStatistics]
) -> None:
    small = slimc.compile(network, batches, PASSES)
    inputs: dict[str, list[Tensor]] = {}
    modules = dict(small.named_modules())
    for name in seen:
        modules[name].register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    # A weight stays dense until its last use is known: the second run of `mix` reads what the dense first one made.
    first = network.mix
    state = {"calls": 0}

    def dense_at_first(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        state["calls"] += 1
        return first(args[0]) if state["calls"] % 2 else output

    handle = small.mix.register_forward_hook(dense_at_first)
    with torch.no_grad():
        for batch in batches:
            small(batch)
    handle.remove()
    tokens = sum(batch.shape[0] * batch.shape[1] for batch in batches)
    for name in ("gate", "up", "mix"):
        expected = torch.cat(inputs[name]).double()
        assert seen[name].count == len(expected) == tokens * (2 if name == "mix" else 1)
        assert torch.allclose(seen[name].sum_squares.double(), expected.square().sum(0), rtol=1e-4)
        assert torch.allclose(seen[name].mean_abs.double(), expected.abs().mean(0), rtol=1e-4)


def test_the_input_of_the_last_layer_comes_from_the_compressed_prefix(
    batches: list[Tensor], seen: dict[str, InputStatistics]
) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    small = slimc.compile(model, batches, PASSES)
    with torch.no_grad():
        expected = torch.cat([small[:4](batch).flatten(0, -2) for batch in batches]).double()
        dense = torch.cat([model[:4](batch).flatten(0, -2) for batch in batches]).double()
    found = seen["4"].sum_squares.double()
    assert torch.allclose(found, expected.square().sum(0), rtol=1e-4)
    assert not torch.allclose(found, dense.square().sum(0), rtol=1e-3)


def test_sites_that_share_an_input_gather_it_once(
    network: nn.Module, batches: list[Tensor], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = []
    gather = InputStatistics.gather

    def spy(activations: list[Tensor], wanted: set[str], where: str, **options: Any) -> InputStatistics:
        gathered.append(where)
        return gather(activations, wanted, where, **options)

    monkeypatch.setattr(InputStatistics, "gather", spy)
    run(network, batches, PASSES)
    assert gathered == ["gate", "mix", "down"]


def test_values_are_freed_once_nobody_reads_them(
    batches: list[Tensor], run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    made: list[weakref.ref[Tensor]] = []
    run_node = sweeping.Sweep._run_node

    def spy(self: sweeping.Sweep, node: Any, values: Any) -> list[Any]:
        result = run_node(self, node, values)
        if node.op == "call_function":
            made.extend(weakref.ref(value) for value in result if isinstance(value, Tensor))
        alive.append(sum(ref() is not None for ref in made))
        return result

    monkeypatch.setattr(sweeping.Sweep, "_run_node", spy)
    layers = [layer for _ in range(12) for layer in (nn.Linear(32, 32), nn.Tanh())]
    run(nn.Sequential(*layers, nn.Linear(32, 8)), batches, PASSES)
    assert len(made) == 12 * len(batches)
    assert max(alive) <= 2 * len(batches)


@torch.library.custom_op("slimc_tests::refuse", mutates_args=())
def refuse(x: Tensor) -> Tensor:
    raise RuntimeError("what follows the last site was computed")


@refuse.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Trap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return refuse(self.layer(x))


def test_nothing_after_the_last_site_is_computed(batches: list[Tensor], run: Any) -> None:
    _, outcome = run(Trap(), batches, PASSES)
    assert [row.name for row in outcome.rows] == ["layer"]


def test_a_recipe_without_statistics_runs_nothing(batches: list[Tensor], run: Any) -> None:
    model = nn.Sequential(Trap(), nn.Linear(8, 4))
    _, outcome = run(model, batches, [Quantize()])
    assert [row.name for row in outcome.rows] == ["0.layer", "1"]
