"""The text form: goldens before and after each pass, the same in every capture and in every process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from slimc.ir.capture import capture
from slimc.ir.program import Program
from slimc.ir.text import text
from slimc.passes import Calibrate, Fuse, LowRank, Prune, Quantize
from slimc.passes.pipeline import run
from slimc.progress import SilentProgress

GOLDEN: dict[tuple[str, str], str] = {}


class Conv1D(nn.Module):
    """GPT-2's linear: its weight is [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 4)


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4, bias=False)),
    "conv1d": lambda: nn.Sequential(Conv1D(), nn.GELU()),
}

PASSES = [Calibrate(), Quantize(), Prune("2:4"), LowRank(rank=2, bits=4), Fuse()]


def captured(model: str) -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    return capture(MODELS[model]().eval(), [((x,), {})]), x


def stages(model: str, folder: pytest.TempPathFactory) -> dict[str, str]:
    program, x = captured(model)
    dumps = folder.mktemp(model)
    run(program, PASSES, [[x]], progress=SilentProgress(), dump_dir=dumps)
    return {path.stem.partition("-")[2]: path.read_text("utf-8") for path in sorted(dumps.iterdir())}


@pytest.mark.parametrize("model", MODELS)
def test_the_text_before_and_after_each_pass(model: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    written = stages(model, tmp_path_factory)
    assert list(written) == ["capture", "quantize", "prune", "low_rank", "fuse"]
    for stage, found in written.items():
        assert found == GOLDEN[model, stage], f"{model} after {stage}"


def test_two_captures_give_the_same_text() -> None:
    assert text(captured("mlp")[0]) == text(captured("mlp")[0])


def test_another_process_gives_the_same_text() -> None:
    program = (
        "import torch; from torch import nn; from slimc.ir.capture import capture; from slimc.ir.text import text;"
        "model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4, bias=False)).eval();"
        "print(text(capture(model, [((torch.randn(2, 5, 8),), {})])), end='')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == GOLDEN["mlp", "capture"]


def test_what_nobody_reads_is_not_written_and_names_are_counted_anew() -> None:
    program, _ = captured("mlp")
    before = text(program)
    use = program.sites["0"].uses[0]
    with program.graph.inserting_before(use.node):
        unread = program.graph.call_function(torch.ops.aten.t.default, (use.weight,))
    assert text(program) == before
    program.graph.erase_node(unread)
    with program.graph.inserting_before(use.node):
        twin = program.graph.call_function(use.node.target, use.node.args)
    twin.meta = use.node.meta
    use.node.replace_all_uses_with(twin)
    program.graph.erase_node(use.node)
    assert twin.name != "linear"
    assert text(program) == before
