"""The text form: goldens before and after each pass, the same in every capture and in every process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from slimc.ir.capture import capture
from slimc.ir.program import Program
from slimc.ir.text import text
from slimc.passes import Activations, Calibrate, Fuse, LowRank, Pass, Prune, Quantize
from slimc.passes.pipeline import run
from slimc.progress import SilentProgress

# A backslash at the end of a line continues it.
GOLDEN = {
    ("mlp", "capture"): """\
%_0_weight : f32[8, 8] = @0.weight
%_0_bias : f32[8] = @0.bias
%_2_weight : f32[4, 8] = @2.weight
%input_1 : f32[s0, 5, 8] = input
%linear : f32[s0, 5, 8] = aten.linear(%input_1, %_0_weight, %_0_bias)                                 # 0
%relu : f32[s0, 5, 8] = aten.relu(%linear)                                                            # 1
%linear_1 : f32[s0, 5, 4] = aten.linear(%relu, %_2_weight)                                            # 2
return [%linear_1]
""",
    ("mlp", "quantize"): """\
%_0_bias : f32[8] = @0.bias
%input_1 : f32[s0, 5, 8] = input
%_0_values : u8[8, 4] = @0.values
%_0_scale : f32[1, 1] = @0.scale
%dequant : f32[8, 8] = slim.dequant(%_0_values, %_0_scale){bits=4, columns=8, group=0}                # 0
%linear : f32[s0, 5, 8] = aten.linear(%input_1, %dequant, %_0_bias)                                   # 0
%relu : f32[s0, 5, 8] = aten.relu(%linear)                                                            # 1
%_2_values : u8[4, 4] = @2.values
%_2_scale : f32[1, 1] = @2.scale
%dequant_1 : f32[4, 8] = slim.dequant(%_2_values, %_2_scale){bits=4, columns=8, group=0}              # 2
%linear_1 : f32[s0, 5, 4] = aten.linear(%relu, %dequant_1)                                            # 2
return [%linear_1]
""",
    ("mlp", "prune"): """\
%_0_bias : f32[8] = @0.bias
%input_1 : f32[s0, 5, 8] = input
%_0_values : u8[8, 2] = @0.values
%_0_pattern : u8[8, 1] = @0.pattern
%_0_scale : f32[1, 1] = @0.scale
%dequant_nm : f32[8, 8] = slim.dequant_nm(%_0_values, %_0_pattern, %_0_scale){bits=4, columns=8, group=0, n=2, m=4}  \
# 0
%linear : f32[s0, 5, 8] = aten.linear(%input_1, %dequant_nm, %_0_bias)                                # 0
%relu : f32[s0, 5, 8] = aten.relu(%linear)                                                            # 1
%_2_values : u8[4, 2] = @2.values
%_2_pattern : u8[4, 1] = @2.pattern
%_2_scale : f32[1, 1] = @2.scale
%dequant_nm_1 : f32[4, 8] = slim.dequant_nm(%_2_values, %_2_pattern, %_2_scale){bits=4, columns=8, group=0, n=2, m=4} \
 # 2
%linear_1 : f32[s0, 5, 4] = aten.linear(%relu, %dequant_nm_1)                                         # 2
return [%linear_1]
""",
    ("mlp", "low_rank"): """\
%_0_bias : f32[8] = @0.bias
%input_1 : f32[s0, 5, 8] = input
%_0_values : u8[8, 2] = @0.values
%_0_pattern : u8[8, 1] = @0.pattern
%_0_scale : f32[1, 1] = @0.scale
%dequant_nm : f32[8, 8] = slim.dequant_nm(%_0_values, %_0_pattern, %_0_scale){bits=4, columns=8, group=0, n=2, m=4}  \
# 0
%_0_left_values : u8[8, 1] = @0.left_values
%_0_left_scale : f32[8, 1] = @0.left_scale
%dequant : f32[8, 2] = slim.dequant(%_0_left_values, %_0_left_scale){bits=4, columns=2, group=64}     # 0
%_0_right_values : u8[2, 4] = @0.right_values
%_0_right_scale : f32[2, 1] = @0.right_scale
%dequant_1 : f32[2, 8] = slim.dequant(%_0_right_values, %_0_right_scale){bits=4, columns=8, group=64}  # 0
%linear : f32[s0, 5, 8] = aten.linear(%input_1, %dequant_nm, %_0_bias)                                # 0
%low_rank : f32[s0, 5, 8] = slim.low_rank(%input_1, %dequant, %dequant_1)                             # 0
%add : f32[s0, 5, 8] = aten.add.Tensor(%linear, %low_rank)                                            # 0
%relu : f32[s0, 5, 8] = aten.relu(%add)                                                               # 1
%_2_values : u8[4, 2] = @2.values
%_2_pattern : u8[4, 1] = @2.pattern
%_2_scale : f32[1, 1] = @2.scale
%dequant_nm_1 : f32[4, 8] = slim.dequant_nm(%_2_values, %_2_pattern, %_2_scale){bits=4, columns=8, group=0, n=2, m=4} \
 # 2
%_2_left_values : u8[4, 1] = @2.left_values
%_2_left_scale : f32[4, 1] = @2.left_scale
%dequant_2 : f32[4, 2] = slim.dequant(%_2_left_values, %_2_left_scale){bits=4, columns=2, group=64}   # 2
%_2_right_values : u8[2, 4] = @2.right_values
%_2_right_scale : f32[2, 1] = @2.right_scale
%dequant_3 : f32[2, 8] = slim.dequant(%_2_right_values, %_2_right_scale){bits=4, columns=8, group=64}  # 2
%linear_1 : f32[s0, 5, 4] = aten.linear(%relu, %dequant_nm_1)                                         # 2
%low_rank_1 : f32[s0, 5, 4] = slim.low_rank(%relu, %dequant_2, %dequant_3)                            # 2
%add_1 : f32[s0, 5, 4] = aten.add.Tensor(%linear_1, %low_rank_1)                                      # 2
return [%add_1]
""",
    ("mlp", "fuse"): """\
%_0_bias : f32[8] = @0.bias
%input_1 : f32[s0, 5, 8] = input
%_0_values : u8[8, 2] = @0.values
%_0_pattern : u8[8, 1] = @0.pattern
%_0_scale : f32[1, 1] = @0.scale
%_0_left_values : u8[8, 1] = @0.left_values
%_0_left_scale : f32[8, 1] = @0.left_scale
%_0_right_values : u8[2, 4] = @0.right_values
%_0_right_scale : f32[2, 1] = @0.right_scale
%linear : f32[s0, 5, 8] = slim.linear(%input_1, %_0_values, %_0_pattern, %_0_scale, None, None, %_0_left_values, \
%_0_left_scale, %_0_right_values, %_0_right_scale, None, None, None, %_0_bias){n=2, m=4, bits=4, columns=8, group=0, \
rank=2, left_bits=4, left_group=64, right_bits=4, right_group=64, activation=0}  # 0
%relu : f32[s0, 5, 8] = aten.relu(%linear)                                                            # 1
%_2_values : u8[4, 2] = @2.values
%_2_pattern : u8[4, 1] = @2.pattern
%_2_scale : f32[1, 1] = @2.scale
%_2_left_values : u8[4, 1] = @2.left_values
%_2_left_scale : f32[4, 1] = @2.left_scale
%_2_right_values : u8[2, 4] = @2.right_values
%_2_right_scale : f32[2, 1] = @2.right_scale
%linear_1 : f32[s0, 5, 4] = slim.linear(%relu, %_2_values, %_2_pattern, %_2_scale, None, None, %_2_left_values, \
%_2_left_scale, %_2_right_values, %_2_right_scale){n=2, m=4, bits=4, columns=8, group=0, rank=2, left_bits=4, \
left_group=64, right_bits=4, right_group=64, activation=0}  # 2
return [%linear_1]
""",
    ("conv1d", "capture"): """\
%_0_weight : f32[8, 4] = @0.weight
%_0_bias : f32[4] = @0.bias
%input_1 : f32[s0, 5, 8] = input
%sym_size = aten.sym_size.int(%input_1, 0)
%view : f32[s1, 8] = aten.view(%input_1, [-1, 8])                                                     # 0
%addmm : f32[s1, 4] = aten.addmm(%_0_bias, %view, %_0_weight)                                         # 0
%view_1 : f32[s0, 5, 4] = aten.view(%addmm, [%sym_size, 5, 4])                                        # 0
%gelu : f32[s0, 5, 4] = aten.gelu(%view_1)                                                            # 1
return [%gelu]
""",
    ("conv1d", "quantize"): """\
%_0_bias : f32[4] = @0.bias
%input_1 : f32[s0, 5, 8] = input
%sym_size = aten.sym_size.int(%input_1, 0)
%view : f32[s1, 8] = aten.view(%input_1, [-1, 8])                                                     # 0
%_0_values : u8[4, 4] = @0.values
%_0_scale : f32[1, 1] = @0.scale
%dequant : f32[4, 8] = slim.dequant(%_0_values, %_0_scale){bits=4, columns=8, group=0}                # 0
%t : f32[8, 4] = aten.t(%dequant)                                                                     # 0
%addmm : f32[s1, 4] = aten.addmm(%_0_bias, %view, %t)                                                 # 0
%view_1 : f32[s0, 5, 4] = aten.view(%addmm, [%sym_size, 5, 4])                                        # 0
%gelu : f32[s0, 5, 4] = aten.gelu(%view_1)                                                            # 1
return [%gelu]
""",
    ("conv1d", "prune"): """\
%_0_bias : f32[4] = @0.bias
%input_1 : f32[s0, 5, 8] = input
%sym_size = aten.sym_size.int(%input_1, 0)
%view : f32[s1, 8] = aten.view(%input_1, [-1, 8])                                                     # 0
%_0_values : u8[4, 2] = @0.values
%_0_pattern : u8[4, 1] = @0.pattern
%_0_scale : f32[1, 1] = @0.scale
%dequant_nm : f32[4, 8] = slim.dequant_nm(%_0_values, %_0_pattern, %_0_scale){bits=4, columns=8, group=0, n=2, m=4}  \
# 0
%t : f32[8, 4] = aten.t(%dequant_nm)                                                                  # 0
%addmm : f32[s1, 4] = aten.addmm(%_0_bias, %view, %t)                                                 # 0
%view_1 : f32[s0, 5, 4] = aten.view(%addmm, [%sym_size, 5, 4])                                        # 0
%gelu : f32[s0, 5, 4] = aten.gelu(%view_1)                                                            # 1
return [%gelu]
""",
    ("conv1d", "low_rank"): """\
%_0_bias : f32[4] = @0.bias
%input_1 : f32[s0, 5, 8] = input
%sym_size = aten.sym_size.int(%input_1, 0)
%view : f32[s1, 8] = aten.view(%input_1, [-1, 8])                                                     # 0
%_0_values : u8[4, 2] = @0.values
%_0_pattern : u8[4, 1] = @0.pattern
%_0_scale : f32[1, 1] = @0.scale
%dequant_nm : f32[4, 8] = slim.dequant_nm(%_0_values, %_0_pattern, %_0_scale){bits=4, columns=8, group=0, n=2, m=4}  \
# 0
%_0_left_values : u8[4, 1] = @0.left_values
%_0_left_scale : f32[4, 1] = @0.left_scale
%dequant : f32[4, 2] = slim.dequant(%_0_left_values, %_0_left_scale){bits=4, columns=2, group=64}     # 0
%_0_right_values : u8[2, 4] = @0.right_values
%_0_right_scale : f32[2, 1] = @0.right_scale
%dequant_1 : f32[2, 8] = slim.dequant(%_0_right_values, %_0_right_scale){bits=4, columns=8, group=64}  # 0
%t : f32[8, 4] = aten.t(%dequant_nm)                                                                  # 0
%addmm : f32[s1, 4] = aten.addmm(%_0_bias, %view, %t)                                                 # 0
%low_rank : f32[s1, 4] = slim.low_rank(%view, %dequant, %dequant_1)                                   # 0
%add : f32[s1, 4] = aten.add.Tensor(%addmm, %low_rank)                                                # 0
%view_1 : f32[s0, 5, 4] = aten.view(%add, [%sym_size, 5, 4])                                          # 0
%gelu : f32[s0, 5, 4] = aten.gelu(%view_1)                                                            # 1
return [%gelu]
""",
    ("conv1d", "fuse"): """\
%_0_bias : f32[4] = @0.bias
%input_1 : f32[s0, 5, 8] = input
%sym_size = aten.sym_size.int(%input_1, 0)
%view : f32[s1, 8] = aten.view(%input_1, [-1, 8])                                                     # 0
%_0_values : u8[4, 2] = @0.values
%_0_pattern : u8[4, 1] = @0.pattern
%_0_scale : f32[1, 1] = @0.scale
%_0_left_values : u8[4, 1] = @0.left_values
%_0_left_scale : f32[4, 1] = @0.left_scale
%_0_right_values : u8[2, 4] = @0.right_values
%_0_right_scale : f32[2, 1] = @0.right_scale
%linear : f32[s1, 4] = slim.linear(%view, %_0_values, %_0_pattern, %_0_scale, None, None, %_0_left_values, \
%_0_left_scale, %_0_right_values, %_0_right_scale, None, None, None, %_0_bias){n=2, m=4, bits=4, columns=8, group=0, \
rank=2, left_bits=4, left_group=64, right_bits=4, right_group=64, activation=0}  # 0
%view_1 : f32[s0, 5, 4] = aten.view(%linear, [%sym_size, 5, 4])                                       # 0
%gelu : f32[s0, 5, 4] = aten.gelu(%view_1)                                                            # 1
return [%gelu]
""",
}


ROUNDING_GOLDEN = {
    "low_rank": """\
%_0_bias : f32[4] = @0.bias
%input_1 : f32[s0, 5, 8] = input
%sym_size = aten.sym_size.int(%input_1, 0)
%view : f32[s1, 8] = aten.view(%input_1, [-1, 8])                                                     # 0
%_0_values : u8[4, 4] = @0.values
%_0_scale : f32[1, 1] = @0.scale
%dequant : f32[4, 8] = slim.dequant(%_0_values, %_0_scale){bits=4, columns=8, group=0}                # 0
%_0_left_values : f32[4, 2] = @0.left_values
%_0_right_values : f32[2, 8] = @0.right_values
%_0_input_scale : f32[8] = @0.input_scale
%mul : f32[s1, 8] = aten.mul.Tensor(%view, %_0_input_scale)                                           # 0
%t : f32[8, 4] = aten.t(%dequant)                                                                     # 0
%addmm : f32[s1, 4] = aten.addmm(%_0_bias, %mul, %t)                                                  # 0
%low_rank : f32[s1, 4] = slim.low_rank(%view, %_0_left_values, %_0_right_values)                      # 0
%add : f32[s1, 4] = aten.add.Tensor(%addmm, %low_rank)                                                # 0
%view_1 : f32[s0, 5, 4] = aten.view(%add, [%sym_size, 5, 4])                                          # 0
%gelu : f32[s0, 5, 4] = aten.gelu(%view_1)                                                            # 1
return [%gelu]
""",
    "activations": """\
%_0_bias : f32[4] = @0.bias
%input_1 : f32[s0, 5, 8] = input
%sym_size = aten.sym_size.int(%input_1, 0)
%view : f32[s1, 8] = aten.view(%input_1, [-1, 8])                                                     # 0
%_0_values : u8[4, 4] = @0.values
%_0_scale : f32[1, 1] = @0.scale
%dequant : f32[4, 8] = slim.dequant(%_0_values, %_0_scale){bits=4, columns=8, group=0}                # 0
%_0_left_values : f32[4, 2] = @0.left_values
%_0_right_values : f32[2, 8] = @0.right_values
%_0_input_scale : f32[8] = @0.input_scale
%mul : f32[s1, 8] = aten.mul.Tensor(%view, %_0_input_scale)                                           # 0
%round_activations : f32[s1, 8] = slim.round_activations(%mul){activation=1}                          # 0
%t : f32[8, 4] = aten.t(%dequant)                                                                     # 0
%addmm : f32[s1, 4] = aten.addmm(%_0_bias, %round_activations, %t)                                    # 0
%low_rank : f32[s1, 4] = slim.low_rank(%view, %_0_left_values, %_0_right_values)                      # 0
%add : f32[s1, 4] = aten.add.Tensor(%addmm, %low_rank)                                                # 0
%view_1 : f32[s0, 5, 4] = aten.view(%add, [%sym_size, 5, 4])                                          # 0
%gelu : f32[s0, 5, 4] = aten.gelu(%view_1)                                                            # 1
return [%gelu]
""",
    "fuse": """\
%_0_bias : f32[4] = @0.bias
%input_1 : f32[s0, 5, 8] = input
%sym_size = aten.sym_size.int(%input_1, 0)
%view : f32[s1, 8] = aten.view(%input_1, [-1, 8])                                                     # 0
%_0_values : u8[4, 4] = @0.values
%_0_scale : f32[1, 1] = @0.scale
%_0_left_values : f32[4, 2] = @0.left_values
%_0_right_values : f32[2, 8] = @0.right_values
%_0_input_scale : f32[8] = @0.input_scale
%linear : f32[s1, 4] = slim.linear(%view, %_0_values, None, %_0_scale, None, %_0_input_scale, %_0_left_values, None, \
%_0_right_values, None, None, None, None, %_0_bias){n=0, m=0, bits=4, columns=8, group=0, rank=2, left_bits=0, \
left_group=0, right_bits=0, right_group=0, activation=1}  # 0
%view_1 : f32[s0, 5, 4] = aten.view(%linear, [%sym_size, 5, 4])                                       # 0
%gelu : f32[s0, 5, 4] = aten.gelu(%view_1)                                                            # 1
return [%gelu]
""",
}


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
ROUNDING_PASSES = [Calibrate(), Quantize(activation_aware=True), LowRank(rank=2), Activations(), Fuse()]


def captured(model: str) -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    return capture(MODELS[model]().eval(), [((x,), {})]), x


def stages(model: str, folder: pytest.TempPathFactory, passes: Sequence[Pass] = PASSES) -> dict[str, str]:
    program, x = captured(model)
    dumps = folder.mktemp(model)
    run(program, passes, [[x]], progress=SilentProgress(), dump_dir=dumps)
    return {path.stem.partition("-")[2]: path.read_text("utf-8") for path in sorted(dumps.iterdir())}


@pytest.mark.parametrize("model", MODELS)
def test_the_text_before_and_after_each_pass(model: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    written = stages(model, tmp_path_factory)
    assert list(written) == ["capture", "quantize", "prune", "low_rank", "fuse"]
    for stage, found in written.items():
        assert found == GOLDEN[model, stage], f"{model} after {stage}"


def test_the_text_before_and_after_rounded_inputs(tmp_path_factory: pytest.TempPathFactory) -> None:
    written = stages("conv1d", tmp_path_factory, ROUNDING_PASSES)
    assert list(written) == ["capture", "quantize", "low_rank", "activations", "fuse"]
    for stage in ("low_rank", "activations", "fuse"):
        assert written[stage] == ROUNDING_GOLDEN[stage], stage


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
