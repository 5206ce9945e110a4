"""``backend="slim"`` on the step of a decoder: what becomes one launch, what is left as it is; results stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from slimc.backends import attention_pass, between_pass
from slimc.backends.cuda import attention, between
from slimc.backends.cuda.attention import attend_next
from slimc.backends.cuda.between import gated_linears, normed_linears
from slimc.backends.dynamo import slim
from slimc.runtime.formats import LinearFormat, WeightFormat
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear
from slimc.runtime.select import Kernel

pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH, NUMBERS, LENGTH, BATCH = 128, 64, 20, 2


def stack(weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    stacked = torch.cat(weights)
    return stacked, list(stacked.split([len(weight) for weight in weights]))


DENSE = Kernel(
    "dense",
    lambda *_case: None,
    lambda packed: packed.decode().to(packed.format.weight.dtype),
    lambda x, weight, bias: functional.linear(x, weight.to(x.dtype), bias),
    stack,
)


def make_layer(rows: int, columns: int = WIDTH, bias: bool = False) -> SlimLinear:
    spec = LinearFormat(WeightFormat(rows, columns, bits=4, per_tensor=True, dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(rows + columns)
    values = torch.randint(0, 256, spec.tensor_specs()["values"][0], dtype=torch.uint8, generator=generator)
    packed = PackedLinear.assemble(spec, {"values": values, "scale": torch.full((1, 1), 0.01, dtype=torch.bfloat16)})
    return SlimLinear(packed, torch.ones(rows, dtype=torch.bfloat16) if bias else None, kernels=(DENSE,))


class Step(nn.Module):
    """One new token of each sequence, as transformers' decoders compute it; ``how`` names what is done otherwise."""

    def __init__(self, how: str = "", heads: int = 2, key_heads: int = 2) -> None:
        super().__init__()
        self.how, self.repeats = how, heads // key_heads
        self.q, self.k, self.v = (make_layer(count * NUMBERS) for count in (heads, key_heads, key_heads))
        self.o = make_layer(WIDTH, heads * NUMBERS)
        self.gate, self.up = make_layer(256), make_layer(256)
        self.down = make_layer(WIDTH, 256, bias="bias" in how)
        self.weight = nn.Parameter(1 + torch.arange(WIDTH).bfloat16() / 256, requires_grad=False)
        self.register_buffer("keys", torch.randn(BATCH, key_heads, LENGTH, NUMBERS).bfloat16())
        self.register_buffer("values", torch.randn(BATCH, key_heads, LENGTH, NUMBERS).bfloat16())
        self.register_buffer("length", torch.tensor(7))

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = NUMBERS // 2
        first, second = x[..., :half], x[..., half:]
        if "interleaved" in self.how:
            first, second = x[..., ::2], x[..., 1::2]
        return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)

    def repeat(self, cache: Tensor) -> Tensor:
        batch, heads, length, numbers = cache.shape
        if self.repeats == 1:
            return cache
        wide = cache[:, :, None, :, :].expand(batch, heads, self.repeats, length, numbers)
        return wide.reshape(batch, heads * self.repeats, length, numbers)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x).view(BATCH, 1, -1, NUMBERS).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.turn(q, cos, sin), self.turn(k, sin if "other angles" in self.how else cos, sin)
        place = torch.arange(1) + self.length
        self.length.add_(2 if "two places" in self.how else 1)
        self.keys.index_copy_(2, place, k)
        self.values.index_copy_(2, place, v)
        options: dict[str, Any] = {"scale": 0.2} if "scale" in self.how else {}
        if "dropout" in self.how:
            options["dropout_p"] = 0.5
        y = functional.scaled_dot_product_attention(
            q, self.repeat(self.keys), self.repeat(self.values), mask, **options
        )
        if "cache is read" in self.how:
            y = y + self.keys.mean()
        if "length is read" in self.how:
            y = y * self.length
        x = x + self.o(y.transpose(1, 2).contiguous().reshape(BATCH, 1, -1))
        exact = x.to(torch.float32)
        kept = exact if "float32 is read" in self.how else x
        exact = exact * torch.rsqrt(exact.pow(2).mean(-2 if "other axis" in self.how else -1, keepdim=True) + 1e-6)
        normed = self.weight * exact.to(torch.bfloat16)
        activate = functional.gelu if "gelu" in self.how else functional.silu
        y = self.down(activate(self.gate(normed)) * self.up(normed))
        return x + y, kept + (normed if "norm is read" in self.how else 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # On a processor the operators are computed by PyTorch's own.
    monkeypatch.setattr(attention_pass, "refuses", attention._refuses_sizes)
    monkeypatch.setattr(between_pass, "refuses", between._refuses_sizes)
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def make_inputs(masked: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 1, WIDTH, generator=generator).bfloat16()
    angle = torch.rand(1, 1, 1, NUMBERS // 2, generator=generator) * 6
    cos, sin = (torch.cat((one, one), -1).bfloat16() for one in (angle.cos(), angle.sin()))
    return x, cos, sin, (torch.arange(LENGTH) < 8).view(1, 1, 1, LENGTH) if masked else None


def run(graphs: list[fx.Graph], how: str = "", masked: bool = True, **sizes: int) -> tuple[int, int, int]:
    """Check a step against itself, twice, and return how often each operator is in its graph."""
    torch.manual_seed(0)
    step = Step(how, **sizes)
    state = {name: buffer.clone() for name, buffer in step.named_buffers() if name in ("keys", "values", "length")}
    compiled = torch.compile(step, backend=slim, fullgraph=True)
    given = make_inputs(masked)

    def twice(run_step: Callable[..., Any]) -> list[Tensor]:
        for name, value in state.items():
            getattr(step, name).copy_(value)
        torch.manual_seed(0)
        return [*run_step(*given), *run_step(*given), step.keys.clone(), step.values.clone(), step.length.clone()]

    found = twice(compiled)
    for one, expected in zip(found, twice(step), strict=True):
        # A stack rounds its sums as products of its size do.
        assert (one - expected).abs().max() <= 0.02 * expected.abs().max()
    return tuple(  # type: ignore[return-value]
        len(graphs[0].find_nodes(op="call_function", target=target))
        for target in (attend_next, normed_linears, gated_linears)
    )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("how", ["", "scale"])
def test_a_step_is_three_operators(graphs: list[fx.Graph], how: str, masked: bool) -> None:
    assert run(graphs, how, masked) == (1, 1, 1)
    assert not graphs[0].find_nodes(op="call_method", target="index_copy_")
    # Heads are read where the product of the stack has them.
    copies = graphs[0].find_nodes(op="call_method", target="contiguous")
    parts = [node for node in copies if node.args[0].target is torch.narrow]
    assert len(parts) == 5
    graphs[0].eliminate_dead_code()
    assert not [node for node in parts if node in set(graphs[0].nodes)]


def test_heads_of_queries_may_share_keys(graphs: list[fx.Graph]) -> None:
    assert run(graphs, heads=4, key_heads=2) == (1, 1, 1)


@pytest.mark.parametrize(
    "how",
    ["interleaved", "other angles", "two places", "dropout", "cache is read", "length is read"],
)
def test_attention_that_differs_is_left_alone(graphs: list[fx.Graph], how: str) -> None:
    attended, normed, gated = run(graphs, how)
    # A length that is looked at is counted where it was, before attention.
    assert attended == int(how == "length is read")
    assert (normed, gated) == (1, 1)


@pytest.mark.parametrize(
    ("how", "normed", "gated"),
    [("float32 is read", 1, 1), ("other axis", 0, 1), ("gelu", 1, 0), ("bias", 1, 0), ("norm is read", 0, 1)],
)
def test_norms_and_gates_that_differ_are_left_alone(graphs: list[fx.Graph], how: str, normed: int, gated: int) -> None:
    assert run(graphs, how) == (1, normed, gated)


def test_lengths_of_all_caches_are_counted_at_once(graphs: list[fx.Graph]) -> None:
    first, second = Step(), Step()

    def both(x: Tensor, *given: Any) -> Tensor:
        return second(first(x, *given)[0], *given)[0]

    torch.compile(both, backend=slim, fullgraph=True)(*make_inputs())
    assert len(graphs[0].find_nodes(op="call_function", target=torch.ops.aten._foreach_add_.Scalar)) == 1
    assert (int(first.length), int(second.length)) == (8, 8)


def test_with_gradients_all_is_left_alone(graphs: list[fx.Graph]) -> None:
    step = Step()
    with torch.enable_grad():
        torch.compile(step, backend=slim, fullgraph=True)(*make_inputs())
    assert not graphs[0].find_nodes(op="call_function", target=attend_next)


def test_the_operator_of_attention_is_sound() -> None:
    step = Step()
    x, cos, sin, mask = make_inputs()
    q, k, v = (layer(x).view(BATCH, 1, -1, NUMBERS).transpose(1, 2) for layer in (step.q, step.k, step.v))
    torch.library.opcheck(attend_next, (q, k, v, cos, sin, step.keys, step.values, step.length, mask, 0.125))
