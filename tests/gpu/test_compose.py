"""Forms that no single kernel takes, on a GPU, against the product with the decoded weight in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimc.backends import COMPOSED, KERNELS
from slimc.backends.cuda.compose import DECODED
from slimc.backends.cuda.stored import STORED
from slimc.bench.unwritten import into_nans
from slimc.runtime.bits import pack_bits
from slimc.runtime.formats import NM, LinearFormat, Unstructured, WeightFormat
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear

ROWS, COLUMNS, RANK = 512, 640, 57


def linear(
    rank: int = RANK, *, columns: int = COLUMNS, factor: tuple[Any, ...] = (4, 64), scaled: bool = False, **form: Any
) -> LinearFormat:
    dtype = form.setdefault("dtype", torch.bfloat16)
    main = WeightFormat(ROWS, columns, **({"bits": 4} | form))
    shapes = ((ROWS, rank), (rank, columns)) if rank else ()
    return LinearFormat(main, *(WeightFormat(*shape, *factor, dtype=dtype) for shape in shapes), input_scaled=scaled)


SPARSE = {"sparsity": NM(2, 4), "per_tensor": True}
COMPOSED_FORMS = {
    "16-bit adapters": linear(factor=(None,), **SPARSE),
    "scaled inputs": linear(scaled=True, **SPARSE),
    "fp16": linear(scaled=True, dtype=torch.float16, **SPARSE),
    "8-bit adapters": linear(factor=(8, 64), group=64),
    "adapters a row": linear(factor=(4, None), group=64),
    "groups of 24": linear(columns=648, group=24),
    "groups of 48": linear(group=48),
    "3 bits": linear(bits=3, **SPARSE),
    "a width that is not round": linear(columns=701, group=64),
    "16-bit weight": linear(bits=None, factor=(8, 64)),
    "8 bits": linear(bits=8, group=64),
    "asymmetric": linear(asymmetric=True, group=64),
}
DENSE_FORMS = {
    "2:4 8 bits": linear(bits=8, sparsity=NM(2, 4)),
    "2:4 16 bit": linear(columns=704, bits=None, sparsity=NM(2, 4), factor=(None,)),
    "unstructured": linear(sparsity=Unstructured(), nonzeros=ROWS * COLUMNS // 2),
}
DECODED_ONCE = linear(group=12)


def fill(spec: LinearFormat) -> PackedLinear:
    """Fill a format with random codes."""
    generator = torch.Generator().manual_seed(0)
    named: dict[str, Tensor] = {}
    for name, (shape, dtype) in spec.tensor_specs().items():
        if dtype == torch.uint8:
            named[name] = torch.randint(0, 256, shape, dtype=dtype, generator=generator)
        else:
            named[name] = ((torch.rand(shape, generator=generator) + 0.5) * 0.01).to(dtype)
    if spec.weight.sparsity is not None:
        # Any two of every four, in each of the six ways; half of all is what the unstructured weight keeps too.
        kept = torch.rand(ROWS, spec.columns // 4, 4, generator=generator).argsort(-1) < 2
        named["pattern"] = pack_bits(kept.flatten(1).to(torch.uint8), 1)
    return PackedLinear.from_tensors(spec, {name: tensor.cuda() for name, tensor in named.items()})


def compute_and_check(spec: LinearFormat, tokens: int, last: Any, product: Any) -> SlimLinear:
    packed = fill(spec)
    bias = torch.randn(ROWS, dtype=spec.weight.dtype, device="cuda")
    layer = SlimLinear(packed, bias, kernels=KERNELS)
    chosen = next(one for one in layer.choices() if one.last_tokens is None or tokens <= one.last_tokens)
    assert chosen.kernel is last
    x = torch.randn(tokens, spec.columns, dtype=spec.weight.dtype, device="cuda")
    y = into_nans(layer, x)
    exact, bound = product(packed, x, bias)
    assert bool(((y.double() - exact).abs() <= bound).all())
    return layer


@pytest.mark.parametrize("tokens", [*range(1, 18), 63, 64, 65, 100])
@pytest.mark.parametrize("name", COMPOSED_FORMS)
def test_composed_forms(name: str, tokens: int, composed_product: Any) -> None:
    layer = compute_and_check(COMPOSED_FORMS[name], tokens, COMPOSED, composed_product)
    assert all(name.startswith("resident_") for name, _ in layer.named_buffers())


@pytest.mark.parametrize("tokens", [*range(1, 18), 63, 64, 65, 100])
@pytest.mark.parametrize("name", DENSE_FORMS)
def test_forms_that_are_decoded_at_every_call(name: str, tokens: int, composed_product: Any) -> None:
    layer = compute_and_check(DENSE_FORMS[name], tokens, STORED, composed_product)
    assert layer.holds_canonical


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_form_that_is_decoded_once(tokens: int, composed_product: Any) -> None:
    compute_and_check(DECODED_ONCE, tokens, DECODED, composed_product)


def test_a_composed_layer_is_captured() -> None:
    layer = SlimLinear(fill(COMPOSED_FORMS["scaled inputs"]), kernels=KERNELS)
    x = torch.randn(3, COLUMNS, dtype=torch.bfloat16, device="cuda")
    expected = layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
