"""What the tests of the passes share: a tiny network whose inputs are known, and its compression without packaging."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimc.ir.capture import capture
from slimc.ir.program import Program
from slimc.passes import Pass, pipeline
from slimc.passes.journal import Journal
from slimc.progress import SilentProgress


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: these tensors are so small that several would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Network(nn.Module):
    """Two siblings that share an input, a layer that runs twice, and one that is 36 wide: no multiple of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 36, bias=False)
        self.up = nn.Linear(32, 36)
        self.mix = nn.Linear(36, 36)
        self.down = nn.Linear(36, 24)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.gate(x)) * self.up(x)
        hidden = hidden + torch.tanh(self.mix(hidden))
        hidden = hidden + torch.tanh(self.mix(hidden))
        return self.down(hidden)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture(scope="package")
def batches() -> list[Tensor]:
    """Correlated inputs of unequal channels, in batches of different sizes."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randn(32, generator=generator).exp()
    mix = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=generator)
    return [torch.randn(count, 9, 32, generator=generator) @ mix * sizes for count in (4, 7, 2)]


Run = Callable[..., tuple[Program, pipeline.Outcome]]


@pytest.fixture(scope="package")
def run() -> Run:
    """Capture, check and run: what :func:`slimc.compile` does between its inputs and its output."""

    def run(
        model: nn.Module,
        batches: Sequence[Tensor],
        passes: Sequence[Pass],
        journal: Journal | None = None,
        **options: Any,
    ) -> tuple[Program, pipeline.Outcome]:
        program = capture(model, [((batch,), {}) for batch in batches])
        pipeline.check_sites(program, passes)
        inputs = (
            [program.flatten_inputs((batch,), {}) for batch in batches] if pipeline.needs_calibration(passes) else []
        )
        outcome = pipeline.run(program, passes, inputs, journal=journal, progress=SilentProgress(), **options)
        return program, outcome

    return run
