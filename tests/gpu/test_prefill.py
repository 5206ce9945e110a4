"""The kernel for many tokens on Hopper, against the product with the decoded weight in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends import KERNELS
from slimc.backends.cuda import prefill
from slimc.backends.cuda.layer import prepare, stack
from slimc.backends.cuda.prefill import PREFILL, Activation, LaunchShape, launch, make_plan
from slimc.bench.unwritten import into_nans
from slimc.errors import KernelError
from slimc.runtime.activations import quantize_tokens
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear, PackedWeight


def run(
    packed: PackedLinear,
    x: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    shape: LaunchShape | None = None,
    right_shape: LaunchShape | None = None,
) -> Tensor:
    """Run the kernel in memory that holds NaN before, too, and return the result, which must not change."""
    layer = prepare(packed)
    plan = make_plan(layer, x.dtype, len(x), activation, shape, right_shape)
    return into_nans(launch, plan, x, layer, bias)


def rounded(x: Tensor, activation: Activation) -> Tensor:
    """Return what is left of x when it is rounded to 8 bits, in float64."""
    codes, scale = quantize_tokens(x, activation)
    return codes.double() * scale.double()


def unrounded(packed: PackedWeight) -> Tensor:
    """Decode a weight in float64, where no product of a code and a scale is rounded."""
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in packed.tensors().items()}
    return PackedWeight(replace(packed.format, dtype=torch.float64), **tensors).decode()


def _roundings(right: PackedWeight) -> Tensor:
    """Return by how much integers of 8 bits differ from a right factor's numbers: half a unit, and 1/32 of one.

    Products with 256ths of a unit, half of one off for codes up to 8, are what is rounded, and may borrow one.
    """
    assert right.scale is not None
    unit = right.scale.double().abs().amax(1, keepdim=True) * 8 / 127
    return (0.5 + 1 / 32) * unit.expand(right.format.rows, right.format.columns)


def check_8_bits(packed: PackedLinear, x: Tensor, bias: Tensor | None, y: Tensor, activation: Activation) -> None:
    """Each result must be as near to the product with rounded activations as its roundings allow.

    Sums of int8 products are exact, and scales multiply them: no product of a code and a scale of W is rounded. Those
    of R are, to integers of which the row's largest scale, times 8, has 127. Of float8 products the tensor cores keep
    about 13 bits below the largest of a sum; codes, which are subnormal numbers there, may lie three bits lower. An
    H100 lost up to 2^-7 of the magnitudes.
    """
    unit = torch.finfo(x.dtype).eps / 2
    weight, kept = unrounded(packed.weight), rounded(x, activation)
    exact, size = kept @ weight.T, kept.abs() @ weight.abs().T
    bound_of_sums = 2**-20 if activation == "int8" else 2**-6
    bound = bound_of_sums * size
    if packed.left is not None and packed.right is not None:
        left, right = packed.left.decode().double(), packed.right.decode().double()
        exact += kept @ right.T @ left.T
        if activation == "int8":
            bound += kept.abs() @ _roundings(packed.right).T @ left.abs().T
        bound += (2 * unit + bound_of_sums) * (kept.abs() @ right.abs().T @ left.abs().T)
    if bias is not None:
        exact += bias.double()
    assert bool(((y.double() - exact).abs() <= bound + 1.01 * unit * exact.abs()).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [*range(1, 18), 63, 64, 65, 128, 129, 191, 192, 193, 256, 257, 300, 2048])
def test_numbers_of_tokens(random_layer: Any, check: Any, tokens: int, dtype: torch.dtype) -> None:
    packed = random_layer(256, 640, 57, dtype=dtype)
    x, bias = torch.randn(tokens, 640, dtype=dtype, device="cuda"), torch.randn(256, dtype=dtype, device="cuda")
    check(packed, x, bias, run(packed, x, bias))


TAILS = [
    (16, 128, 0), (1, 8, 0), (17, 136, 1), (1000, 4088, 57), (4096, 4096, 409), (4096, 11008, 409), (24000, 1024, 64),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns", "rank"), TAILS)
@pytest.mark.parametrize("tokens", [130, 2048])
def test_tails_of_rows_columns_and_ranks(
    random_layer: Any, check: Any, rows: int, columns: int, rank: int, tokens: int
) -> None:
    packed = random_layer(rows, columns, rank)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    check(packed, x, None, run(packed, x))


@pytest.mark.parametrize("activation", [None, "int8"])
@pytest.mark.parametrize(("rows", "shape"), [(9000, prefill.SMALL_TILES), (24000, prefill.LARGE_TILES)])
@pytest.mark.parametrize("tokens", [17, 64, 65, 128])
def test_few_tokens_in_tiles_for_many(
    random_layer: Any, check: Any, rows: int, shape: LaunchShape, tokens: int, activation: Activation | None
) -> None:
    """Tuning may choose the kernel at any number of tokens; with so many rows its tiles are not its smallest."""
    packed = random_layer(rows, 1024, 64)
    x = torch.randn(tokens, 1024, dtype=torch.bfloat16, device="cuda")
    assert make_plan(prepare(packed), x.dtype, tokens, activation).main.shape == shape
    y = run(packed, x, None, activation)
    if activation is None:
        check(packed, x, None, y)
    else:
        check_8_bits(packed, x, None, y, activation)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(4096, 4096, 409), (4096, 11008, 409), (22016, 4096, 409)])
@pytest.mark.parametrize("tokens", [129, 256, 1000])
def test_layers_of_a_models_size(
    exact_layer: Any, check_exactly: Any, rows: int, columns: int, rank: int, tokens: int
) -> None:
    packed, x = exact_layer(rows, columns, rank), torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    check_exactly(packed, x, None, run(packed, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "sparse"), [(0, True), (130, True), (130, False)])
@pytest.mark.parametrize("tokens", [1, 130, 300, 1024])
def test_values(random_layer: Any, check: Any, tokens: int, rank: int, sparse: bool, dtype: torch.dtype) -> None:
    packed = random_layer(600, 1352, rank, bits=None, sparse=sparse, dtype=dtype)
    x, bias = (torch.randn(*shape, dtype=dtype, device="cuda") for shape in ((tokens, 1352), (600,)))
    check(packed, x, bias, run(packed, x, bias))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("tokens", [256, 512, 1100])
def test_shapes_for_values(random_layer: Any, check: Any, sparse: bool, tokens: int) -> None:
    packed = random_layer(600, 1352, 130, bits=None, sparse=sparse)
    x = torch.randn(tokens, 1352, dtype=torch.bfloat16, device="cuda")
    codes = (
        LaunchShape(64, 2, 1, 2, beside=True),
        LaunchShape(128, 4, 1),
        LaunchShape(128, 2, 2),
        LaunchShape(64, 4, 1),
    )
    for shape in (*codes, replace(codes[2], multicast=2)):
        form = prefill.Form(sparse, 0, True, None, values=True)
        check(packed, x, None, run(packed, x, None, shape=prefill.for_values(shape, form, 0, 4096 * shape.multicast)))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("group", "per_tensor"), [(None, True), (None, False), (32, False), (64, False), (128, False)])
def test_scales_and_forms(random_layer: Any, check: Any, group: int | None, per_tensor: bool, sparse: bool) -> None:
    packed = random_layer(160, 1344, 130, group=group, per_tensor=per_tensor, sparse=sparse)
    x = torch.randn(256, 1344, dtype=torch.bfloat16, device="cuda")
    check(packed, x, None, run(packed, x))


@pytest.mark.parametrize("activation", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("rows", "columns", "rank"), TAILS)
@pytest.mark.parametrize("tokens", [130, 2048])
def test_activations_of_8_bits(
    random_layer: Any, rows: int, columns: int, rank: int, tokens: int, activation: Activation
) -> None:
    packed = random_layer(rows, columns, rank)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    check_8_bits(packed, x, None, run(packed, x, None, activation), activation)


@pytest.mark.parametrize("activation", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("per_tensor", "sparse"), [(True, False), (False, True)])
def test_forms_with_activations_of_8_bits(
    random_layer: Any, dtype: torch.dtype, per_tensor: bool, sparse: bool, activation: Activation
) -> None:
    packed = random_layer(160, 1352, 130, dtype=dtype, per_tensor=per_tensor, sparse=sparse)
    x = torch.randn(257, 1352, dtype=dtype, device="cuda")
    x[5] = 0
    bias = torch.randn(160, dtype=dtype, device="cuda")
    check_8_bits(packed, x, bias, run(packed, x, bias, activation), activation)


@pytest.mark.parametrize("activation", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("columns", [8192, 8200, 16392, 33000])
def test_tokens_of_any_length_are_rounded(
    random_layer: Any, columns: int, sparse: bool, activation: Activation
) -> None:
    # Registers of a thread, threads of a block, and neither hold a token.
    packed = random_layer(16, columns, 0, sparse=sparse)
    x = torch.randn(130, columns, dtype=torch.bfloat16, device="cuda")
    x[3] *= 1e-31
    check_8_bits(packed, x, None, run(packed, x, None, activation), activation)


def test_groups_and_activations_of_8_bits_are_refused(random_layer: Any) -> None:
    layer = prepare(random_layer(160, 1344, 0, group=64))
    with pytest.raises(KernelError, match="scale every 64 columns"):
        make_plan(layer, torch.bfloat16, 256, "int8")


@pytest.mark.parametrize("activation", [None, "int8"])
@pytest.mark.parametrize("ranks", [(57, 57), (130, 20), (20, 130), (0, 0)])
def test_stacked_layers_keep_their_own_adapters(
    random_layer: Any, check: Any, ranks: tuple[int, int], activation: Activation | None
) -> None:
    parts = [random_layer(rows, 640, rank) for rows, rank in zip((512, 300), ranks, strict=True)]
    layer = stack([prepare(part) for part in parts])
    x, bias = (torch.randn(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((200, 640), (812,)))
    y = launch(make_plan(layer, x.dtype, 200, activation), x, layer, bias)
    for part, rows in zip(parts, (slice(512), slice(512, 812)), strict=True):
        if activation is None:
            check(part, x, bias[rows], y[:, rows])
        else:
            check_8_bits(part, x, bias[rows], y[:, rows], activation)


@pytest.mark.parametrize("ranks", [(57, 57, 57), (130, 20, 64), (20, 130, 57)])
def test_ranks_of_others_in_a_stack_are_not_read(check_neighbours: Any, ranks: tuple[int, ...]) -> None:
    check_neighbours(ranks, 200, lambda x, layer: launch(make_plan(layer, x.dtype, 200), x, layer, None))


SHAPES = [
    LaunchShape(128, 4, 1, share=False),
    LaunchShape(128, 4, 1, multicast=2),
    LaunchShape(128, 4, 1, outputs=128),
    LaunchShape(128, 2, 2),
    LaunchShape(128, 2, 1),
    LaunchShape(64, 2, 1, 2),
    LaunchShape(64, 2, 1, 2, share=False, beside=True),
    LaunchShape(64, 4, 1),
]


@pytest.mark.parametrize("activation", [None, "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("rows", "tokens"), [(1111, 300), (4600, 2048)])
def test_shapes_of_a_launch(
    random_layer: Any, check: Any, rows: int, tokens: int, shape: LaunchShape, activation: Activation | None
) -> None:
    packed = random_layer(rows, 1344, 130)
    x = torch.randn(tokens, 1344, dtype=torch.bfloat16, device="cuda")
    y = run(packed, x, None, activation, shape, shape)
    if activation is None:
        check(packed, x, None, y)
    else:
        check_8_bits(packed, x, None, y, activation)


def test_a_layer_chooses_it_and_takes_views_that_begin_anywhere(random_layer: Any, check: Any) -> None:
    packed = random_layer(256, 640, 57)
    layer = SlimLinear(packed, kernels=KERNELS)
    assert PREFILL in [choice.kernel for choice in layer.choices()]
    x = torch.randn(200 * 640 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(200, 640)
    check(packed, x, None, layer(x))


@pytest.mark.parametrize("rows", [1024, 22016])
def test_tiles_of_a_band_of_tokens_after_another(
    random_layer: Any, check: Any, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    packed = random_layer(rows, 512, 51)
    x = torch.randn(1300, 512, dtype=torch.bfloat16, device="cuda")
    for band in (2048, 512, 256, 128):
        monkeypatch.setattr(prefill, "BAND_TOKENS", band)
        check(packed, x, None, run(packed, x))


def test_prompts_of_many_lengths(random_layer: Any, check: Any) -> None:
    packed = random_layer(1024, 1024, 102)
    layer = prepare(packed)
    for tokens in (130, 700, 131, 2500, 130):
        x = torch.randn(tokens, 1024, dtype=torch.bfloat16, device="cuda")
        check(packed, x, None, PREFILL.run(x, layer, None))


@pytest.mark.parametrize("activation", [None, "int8"])
def test_a_captured_graph_replays_the_same_result(random_layer: Any, activation: Activation | None) -> None:
    layer = prepare(random_layer(2048, 2048, 204))
    x = torch.randn(400, 2048, dtype=torch.bfloat16, device="cuda")
    plan = make_plan(layer, x.dtype, 400, activation)
    expected = launch(plan, x, layer, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            captured = launch(plan, x, layer, None)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
