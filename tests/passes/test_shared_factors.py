"""LowRank(shared="siblings"): one right factor for sites that read one input, on disk and in the bits promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import slimc
from slimc.errors import RecipeError
from slimc.passes import (
    BiasCorrection,
    Calibrate,
    Fuse,
    LowRank,
    Pass,
    PerSite,
    Prune,
    Quantize,
    Tune,
)
from slimc.passes.solvers.covariance import covariance_adapters
from slimc.passes.solvers.hessian import damped

Run = Callable[..., Any]


class Siblings(nn.Module):
    """Three layers that read one input, two of one width, and one that reads their result."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 24)
        self.second = nn.Linear(32, 24, bias=False)
        self.third = nn.Linear(32, 8)
        self.last = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sigmoid(self.first(x)) * self.second(x)) + self.third(x)


@pytest.fixture
def siblings() -> Siblings:
    torch.manual_seed(0)
    return Siblings().eval()


def x() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(16, 9, 32, generator=generator) @ torch.randn(32, 32, generator=generator)


def passes(shared: Any = "siblings", **options: Any) -> list[Pass]:
    adapters = LowRank(
        **{"method": "covariance", "rank": 4, "bits": 4, "group": 16, "rounds": 1, **options}, shared=shared
    )
    return [Calibrate(), Quantize(group=16), Prune(), adapters, BiasCorrection(), Fuse()]


def stored_bits(folder: Path, model: nn.Module) -> float:
    """Bits of everything that belongs to compressed layers, a weight."""
    sites = slimc.report(model).sites
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                owner, _, last = name.rpartition(".")
                if owner in {row.name for row in sites} and last != "bias":
                    total += file.get_tensor(name).nbytes
    return 8 * total / sum(row.shape[0] * row.shape[1] for row in sites)


@pytest.mark.parametrize("method", ["covariance", "slim", "svd"])
def test_siblings_have_one_right_factor_and_its_bits_count_once(
    siblings: Siblings, method: str, tmp_path: Path
) -> None:
    small = slimc.compile(siblings, [x()], passes(method=method))
    rights = [module.packed.right.values for module in (small.first, small.second, small.third)]
    assert all(torch.equal(right, rights[0]) for right in rights[1:])
    slimc.save(small, tmp_path / "out")
    assert stored_bits(tmp_path / "out", small) == pytest.approx(slimc.report(small).bits_per_weight)
    alone = slimc.compile(siblings, [x()], passes(None, method=method))
    assert slimc.report(small).bits_per_weight < slimc.report(alone).bits_per_weight


def test_a_folder_gives_the_same_outputs_and_the_graph_too(siblings: Siblings, run: Run, tmp_path: Path) -> None:
    small = slimc.compile(siblings, [x()], passes())
    slimc.save(small, tmp_path / "out")
    loaded = slimc.load(tmp_path / "out", model=Siblings().eval())
    with torch.no_grad():
        assert torch.equal(loaded(x()), small(x()))
        program, _ = run(siblings, [x()], passes())
        assert torch.equal(program.run(x()), small(x()))
    assert loaded.first.packed.right.values.data_ptr() == loaded.third.packed.right.values.data_ptr()


def test_a_resumed_run_gives_the_same_bytes(siblings: Siblings, tmp_path: Path) -> None:
    first = slimc.compile(siblings, [x()], passes(), journal=tmp_path / "journal")
    records = sorted((tmp_path / "journal" / "sites").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    records[1].unlink()  # as if the run had died between two siblings
    again = slimc.compile(siblings, [x()], passes(), journal=tmp_path / "journal", resume=True)
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    slimc.save(again, tmp_path / "out")
    assert stored_bits(tmp_path / "out", again) == pytest.approx(slimc.report(first).bits_per_weight)


def test_the_factor_is_the_best_for_all_outputs_together() -> None:
    """No other right factor of this rank leaves less of the stacked error: that is the closed form."""
    torch.manual_seed(0)
    errors, inputs = torch.randn(40, 16, dtype=torch.float64), torch.randn(99, 16, dtype=torch.float64)
    hessian = damped((inputs.t() @ inputs).float(), 1e-6).double()
    left, right = (factor.double() for factor in covariance_adapters(errors.float(), hessian.float(), 3))

    def remaining(right: Tensor) -> float:
        best = errors @ hessian @ right.t() @ (right @ hessian @ right.t()).inverse()
        rest = errors - best @ right
        return float(((rest @ hessian) * rest).sum())

    found = errors - left @ right
    least = float(((found @ hessian) * found).sum())
    assert least == pytest.approx(remaining(right), rel=1e-4)
    separate = [covariance_adapters(part.float(), hessian.float(), 3)[1].double() for part in errors.chunk(2)]
    assert all(least <= remaining(other) for other in separate)


def test_layers_that_read_alone_are_as_without(siblings: Siblings) -> None:
    both = [slimc.compile(nn.Sequential(siblings.first).eval(), [x()], passes(shared)) for shared in ("siblings", None)]
    for name, tensor in both[0].state_dict().items():
        assert torch.equal(both[1].state_dict()[name], tensor), name


def test_where_it_cannot_be_is_refused(siblings: Siblings) -> None:
    with pytest.raises(RecipeError, match="shared must be 'siblings' or null, not 'all'"):
        LowRank(shared="all")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="tune would move the right factor that siblings share"):
        slimc.compile(siblings, [x()], [*passes()[:-2], Tune(), Fuse()])
    with pytest.raises(RecipeError, match="low_rank solves siblings together"):
        PerSite(expressions={"a": [Quantize(), LowRank(shared="siblings")]}, default="a")
