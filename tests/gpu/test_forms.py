"""Layers with widths and with signs in CUDA graphs and compiled graphs, by their kernels and by the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimc.backends import KERNELS
from slimc.backends.dynamo import slim
from slimc.runtime.bits import pack_bits
from slimc.runtime.formats import NM, BinaryFormat, LinearFormat, Unstructured, WeightFormat
from slimc.runtime.modules import SlimLinear
from slimc.runtime.ops import apply_packed
from slimc.runtime.packing import PackedLinear
from slimc.runtime.prepared import sibling_layers

# What Inductor and Triton say about themselves is not slimc's.
pytestmark = pytest.mark.filterwarnings("default")

ROWS, COLUMNS, GROUP = 256, 640, 64
WIDTHS = (1, 2, 3, 4, 4, 3, 2, 1, 1, 3)
DTYPE = torch.bfloat16
FORMS: dict[str, dict[str, Any]] = {
    "widths": {"bits": 4, "widths": WIDTHS, "asymmetric": True},
    "wide widths": {"bits": 8, "widths": (5, 2, 3, 6, 4, 7, 2, 8, 1, 5), "asymmetric": True},
    "8 bits": {"bits": 8},
    "widths and adapters": {"bits": 4, "widths": WIDTHS, "asymmetric": True, "rank": 8},
    "2:4 widths": {"bits": 4, "widths": WIDTHS, "sparsity": NM(2, 4), "asymmetric": True},
    "2:4 widths, symmetric": {"bits": 4, "widths": WIDTHS, "sparsity": NM(2, 4)},
    "2:4 int4 and signs": {"bits": 4, "sparsity": NM(2, 4), "signs": True},
    "2:4 16 bit": {"bits": None, "sparsity": NM(2, 4), "rank": 8, "factor": (4, 64)},
    "16 bit and adapters": {"bits": None, "rank": 8, "factor": (4, 64)},
    "2:4 16 bit and signs": {"bits": None, "sparsity": NM(2, 4), "signs": True},
    "unstructured and signs": {
        "bits": None, "sparsity": Unstructured(), "nonzeros": ROWS * COLUMNS // 2, "signs": True
    },
}  # fmt: skip


def random_layer(form: dict[str, Any], seed: int = 0) -> PackedLinear:
    """Return a layer of random codes, whose zero points are those of codes of one bit or 1."""
    options = {"group": None if form["bits"] is None else GROUP} | form
    rank, signs, factor = options.pop("rank", 0), options.pop("signs", False), options.pop("factor", (None,))
    weight = WeightFormat(ROWS, COLUMNS, dtype=DTYPE, **options)
    shapes = ((ROWS, rank), (rank, COLUMNS)) if rank else ()
    factors = [WeightFormat(*shape, *factor, dtype=DTYPE) for shape in shapes]
    spec = LinearFormat(weight, *factors, binary=BinaryFormat(ROWS, COLUMNS, 1, DTYPE) if signs else None)
    generator = torch.Generator().manual_seed(seed)
    named: dict[str, Tensor] = {}
    for name, (shape, dtype) in spec.tensor_specs().items():
        if dtype == torch.uint8:
            named[name] = torch.randint(0, 256, shape, dtype=dtype, generator=generator)
        else:
            named[name] = ((torch.rand(shape, generator=generator) + 0.5) * 0.01).to(dtype)
    if weight.asymmetric:
        named["zero_point"] = torch.tensor(
            [[int(width > 1) for width in weight.widths or ()]], dtype=torch.uint8
        ).repeat(ROWS, 1)
    if weight.sparsity is not None:
        # Any two of every four, in each of the six ways; half of all is what the unstructured weight keeps too.
        kept = torch.rand(ROWS, COLUMNS // 4, 4, generator=generator).argsort(-1) < 2
        named["pattern"] = pack_bits(kept.flatten(1).to(torch.uint8), 1)
    return PackedLinear.from_tensors(spec, {name: tensor.cuda() for name, tensor in named.items()})


def captured(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture a call after it has run once, as a CUDA graph asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    return graph, y


@pytest.mark.parametrize("tokens", [1, 16, 40, 100])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by", ["kernel", "reference"])
@torch.no_grad()
def test_a_cuda_graph_computes_what_a_call_does(form: str, tokens: int, by: str) -> None:
    packed = random_layer(FORMS[form])
    layer = SlimLinear(packed, kernels=KERNELS)
    call = layer if by == "kernel" else lambda x: apply_packed(x, packed)
    x = torch.zeros(tokens, COLUMNS, dtype=DTYPE, device="cuda")
    graph, y = captured(call, x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, call(x))
        assert float(y.abs().max()) > 0


class Block(nn.Module):
    """Two layers that read one input, and one that reads what they make."""

    def __init__(self, form: dict[str, Any]) -> None:
        super().__init__()
        self.first, self.second = (SlimLinear(random_layer(form, seed), kernels=KERNELS) for seed in (1, 2))
        self.expand = nn.Linear(ROWS, COLUMNS, dtype=DTYPE, device="cuda")
        self.last = SlimLinear(random_layer(form, 3), kernels=KERNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.expand(self.first(x) * torch.tanh(self.second(x))))


@pytest.mark.parametrize("settings", [{}, {"mode": "reduce-overhead"}], ids=["plain", "graphs"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_compiled_blocks_compute_what_eager_ones_do(form: str, settings: dict[str, Any]) -> None:
    torch._dynamo.reset()
    block = Block(FORMS[form])
    compiled = torch.compile(block, backend=slim, fullgraph=True, **settings)
    for _ in range(4):
        x = torch.randn(3, COLUMNS, dtype=DTYPE, device="cuda")
        expected = block(x)
        # What Inductor fuses is rounded once less; a difference of roundings grows little in one block.
        assert float((compiled(x) - expected).abs().max()) <= 0.05 * float(expected.abs().max())
    # Siblings hold one stack by now, if their kernel can run one.
    for layer, seed in ((block.first, 1), (block.second, 2), (block.last, 3)):
        state = layer.state_dict()
        for name, tensor in random_layer(FORMS[form], seed).tensors().items():
            assert torch.equal(state[name], tensor)
    torch._dynamo.reset()


@pytest.mark.parametrize("form", ["widths", "wide widths", "8 bits", "widths and adapters", "2:4 int4 and signs"])
@torch.no_grad()
def test_siblings_are_one_launch(form: str) -> None:
    siblings = [SlimLinear(random_layer(FORMS[form], seed), kernels=KERNELS) for seed in (1, 2)]
    x = torch.randn(3, COLUMNS, dtype=DTYPE, device="cuda")
    expected = [layer(x) for layer in siblings]
    family = sibling_layers([layer._handle for layer in siblings])
    assert family.prepare()
    joint = family(x).split([ROWS, ROWS], dim=-1)
    for layer, y, alone in zip(siblings, joint, expected, strict=True):
        size = 2**-7 * float(alone.abs().max())
        assert float((y - alone).abs().max()) <= size
        assert float((layer(x) - alone).abs().max()) <= size
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        family(x)
        torch.cuda.synchronize()
    launches = [event.name for event in profile.events()]
    assert sum("mixed_linear" in name or "add_signs" in name for name in launches) == 1, launches
