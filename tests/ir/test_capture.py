"""Capture: what becomes a site, why the rest does not, and that the graph computes what the model does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimc.errors import CaptureError, InputError, RecipeError
from slimc.ir.capture import capture
from slimc.ir.program import Program


def call(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def reasons(program: Program) -> dict[str, str]:
    return {row.name: row.reason for row in program.left}


class Conv1D(nn.Module):
    """GPT-2's linear: its weight is [in, out]."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.randn(columns, rows))
        self.bias = nn.Parameter(torch.randn(rows))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.rows)


class Functional(nn.Module):
    """A linear in all but its class."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class MatMul(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def wrap(linear: nn.Module) -> nn.Module:
    """A model in which ``linear`` stands beside an ordinary site."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), linear)


def test_linears_biases_and_functional_linears_are_sites() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), Functional(6, 12), nn.ReLU(), MatMul(4, 6))
    program = capture(model, [call(x(3, 8))])
    assert {name: site.shape for name, site in program.sites.items()} == {"0": (12, 8), "2": (6, 12), "4": (4, 6)}
    first, second, third = program.sites.values()
    assert first.uses[0].bias is not None
    assert first.uses[0].bias.target == "0.bias"
    assert second.uses[0].bias is None
    assert third.uses[0].product_reads_transposed
    assert not third.transposed
    assert program.left == []
    assert [site.name for site in program.site_order()] == ["0", "2", "4"]


def test_conv1d_is_a_site_seen_as_rows_by_columns() -> None:
    model = wrap(Conv1D(8, 6))
    program = capture(model, [call(x(2, 3, 8))])
    site = program.sites["2"]
    assert site.shape == (6, 8)
    assert site.transposed
    assert torch.equal(program.dense_weight(site), model[2].weight.t())
    assert site.uses[0].bias is not None


def test_a_model_that_is_one_linear_has_one_site() -> None:
    program = capture(nn.Linear(8, 4), [call(x(3, 8))])
    assert list(program.sites) == ["weight"]
    assert program.sites["weight"].modules == ("",)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.gate, self.up = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        return F.silu(self.gate(y)) * self.up(y)


def test_sites_that_read_the_same_activation_form_a_group() -> None:
    program = capture(Attention(), [call(x(2, 5, 8))])
    assert program.sites["q"].group == program.sites["v"].group == ("q", "k", "v")
    assert program.sites["up"].group == ("gate", "up")
    assert program.sites["o"].group == ("o",)


def test_a_linear_called_twice_is_one_site_with_two_uses() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    program = capture(model, [call(x(3, 8))])
    (site,) = program.sites.values()
    assert len(site.uses) == 2
    assert set(site.modules) == {"0", "2"}


def test_modules_that_share_a_parameter_are_one_site() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    program = capture(model, [call(x(3, 8))])
    (site,) = program.sites.values()
    assert site.modules == ("0", "2")
    assert [use.bias.target for use in site.uses if use.bias] == ["0.bias", "2.bias"]


class Tied(nn.Module):
    """A language model in miniature; its head is the embedding's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


def test_a_tied_head_is_left_dense_and_can_be_included() -> None:
    ids = torch.arange(10).reshape(2, 5)
    program = capture(Tied(), [call(ids)])
    assert list(program.sites) == ["body"]
    assert reasons(program) == {
        "embed": "embedding table",
        "head": "shares its storage with the embedding table 'embed'; include it by its name",
    }
    program = capture(Tied(), [call(ids)], include=["head"])
    assert [site.name for site in program.site_order()] == ["body", "head"]
    assert program.sites["head"].modules == ("head",)
    assert reasons(program) == {"embed": "embedding table"}
    with pytest.raises(RecipeError, match="'emb\\*' includes only what cannot be compressed: embed: embedding table"):
        capture(Tied(), [call(ids)], include=["emb*"])


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.after = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.attention(x, x, x, need_weights=False)[0])


def test_multi_head_attention_is_refused_because_it_reads_its_own_weights() -> None:
    program = capture(SelfAttention(), [call(x(2, 5, 8))])
    assert list(program.sites) == ["after"]
    found = reasons(program)
    assert "in_proj_weight" in found["attention.in_proj_weight"]
    assert "is read by the code of 'attention'" in found["attention.out_proj"]


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Activated(nn.Linear):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class OutputTransposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(0, 1)


class Flattening(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, 2, 8)).reshape(-1, 16)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class OtherBias(nn.Linear):
    """Adds a constant that is not its ``bias``."""

    def __init__(self) -> None:
        super().__init__(8, 8, bias=False)
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.shift)


class ForgetsBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (Scaled(8, 8), "does more than one linear (it also runs aten.mul.Tensor)"),
        (Activated(8, 8), "does more than one linear (it also runs aten.relu)"),
        (OutputTransposed(8, 8), "does more than one linear (it also runs aten.transpose.int)"),
        (Flattening(8, 8), "changes the shape of its input or output"),
        (Twice(8, 8), "multiplies by it more than once in a call"),
        (OtherBias(), "the product adds 2.shift, but the bias of its module OtherBias is absent"),
        (ForgetsBias(8, 8), "the product adds no bias, but the bias of its module ForgetsBias is 2.bias"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_subclass_with_a_forward_of_its_own_is_refused(linear: nn.Module, reason: str) -> None:
    program = capture(wrap(linear), [call(x(4, 8))])
    assert list(program.sites) == ["0"]
    assert reason in reasons(program)["2"]


def test_a_subclass_that_is_still_a_linear_is_a_site() -> None:
    class Renamed(nn.Linear):
        pass

    assert list(capture(wrap(Renamed(8, 8)), [call(x(4, 8))]).sites) == ["0", "2"]


class ReturnsTuple(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class TakesMore(nn.Linear):
    def forward(self, x: Tensor, unused: int = 0) -> Tensor:
        return super().forward(x)


class Caller(nn.Module):
    def __init__(self, linear: nn.Module, *args: Any) -> None:
        super().__init__()
        self.first, self.linear, self.args = nn.Linear(8, 8), linear, args

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.first(x), *self.args)
        return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("model", [Caller(ReturnsTuple(8, 8)), Caller(TakesMore(8, 8), 3)], ids=["tuple", "argument"])
def test_a_module_with_another_signature_is_refused(model: nn.Module) -> None:
    program = capture(model, [call(x(4, 8))])
    assert list(program.sites) == ["first"]
    assert "is called with more than one positional tensor, or returns more" in reasons(program)["linear"]


def test_hooks_and_replaced_forwards_are_not_thrown_away() -> None:
    hooked = wrap(nn.Linear(8, 8))
    hooked[2].register_forward_hook(lambda module, args, output: None)
    assert "has hooks, which would be lost" in reasons(capture(hooked, [call(x(4, 8))]))["2"]
    replaced = wrap(nn.Linear(8, 8))
    replaced[2].forward = replaced[2].forward
    assert "has had its forward() replaced" in reasons(capture(replaced, [call(x(4, 8))]))["2"]


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.a(x), self.b.weight)
        return self.c(y) + self.c.weight.sum()


def test_weights_that_a_parent_reads_are_refused() -> None:
    program = capture(ReadsWeight(), [call(x(4, 8))])
    assert list(program.sites) == ["a"]
    found = reasons(program)
    assert found["b"] == "is read by the code of 'the model', not by the module that holds it"
    assert found["c"] == "also read by aten.sum, which needs it dense"


class Shapes(nn.Module):
    """One of everything that is not a matrix of a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.unused = nn.Parameter(torch.randn(8, 8))
        self.table = nn.Embedding(4, 8)
        self.codes = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
        self.named = nn.Parameter(torch.randn(8, 8))
        self.moving = nn.Linear(8, 8, bias=False)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = self.conv(x.transpose(1, 2)).transpose(1, 2) + self.table(ids)
        y = y @ self.experts[1] @ self.codes.to(y.dtype)
        y = F.linear(y, self.moving.weight, y.mean((0, 1)))
        return self.linear(F.linear(y, self.named))


def test_everything_left_alone_has_its_reason() -> None:
    program = capture(Shapes(), [call(x(2, 5, 8), torch.zeros(2, 5, dtype=torch.long))])
    assert list(program.sites) == ["linear"]
    assert reasons(program) == {
        "conv": "a stack of matrices or a filter (used by aten.conv1d), not one matrix",
        "experts": "a stack of matrices or a filter (used by aten.select.int), not one matrix",
        "unused": "not used by the captured graph",
        "table": "embedding table",
        "codes": "holds int8, not floating-point weights",
        "named": "is the parameter 'named' of Shapes, not the weight of a linear module",
        "moving": "used by aten.linear, but not as x @ W^T plus a constant bias",
    }


def deep() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, 4))


@pytest.mark.parametrize(("pattern", "left"), [("0.*", {"0.0"}), ("re:[12]", {"1", "2"}), ("2", {"2"})])
def test_patterns_exclude_sites(pattern: str, left: set[str]) -> None:
    program = capture(deep(), [call(x(3, 8))], exclude=[pattern])
    assert reasons(program) == dict.fromkeys(sorted(left), f"excluded by the pattern '{pattern}'")
    assert set(program.sites) == {"0.0", "1", "2"} - left


def test_what_is_dense_by_default_can_be_included() -> None:
    dense = {"2.weight": "output embedding"}
    assert reasons(capture(deep(), [call(x(3, 8))], dense=dense)) == {"2": "output embedding"}
    assert "2" in capture(deep(), [call(x(3, 8))], dense=dense, include=["2"]).sites


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    model = nn.Sequential(Attention())
    with pytest.raises(RecipeError, match=r"'0.gat' matches no weight \(did you mean '0.gate'\?\)"):
        capture(model, [call(x(2, 5, 8))], exclude=["0.gat"])
    with pytest.raises(RecipeError, match=r"'re:\(' is not a regular expression"):
        capture(model, [call(x(2, 5, 8))], exclude=["re:("])


def test_no_compressible_site_is_an_error_that_says_why() -> None:
    with pytest.raises(CaptureError, match="Embedding has no compressible site.*weight: embedding table"):
        capture(nn.Embedding(4, 8), [call(torch.zeros(2, 3, dtype=torch.long))])
    with pytest.raises(CaptureError, match="it has no matrix at all"):
        capture(nn.ReLU(), [call(x(2, 3))])
    with pytest.raises(CaptureError, match="no example input.*calibration="):
        capture(nn.Linear(8, 8), [])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.config = type("Config", (), {"use_cache": True})()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Cached(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2 if self.config.use_cache or self.training else 1)


def test_a_model_that_cannot_be_exported_is_an_error_with_advice() -> None:
    model = Branches()
    with pytest.raises(CaptureError, match=r"could not capture Branches: .*control flow in forward\(\) that depends"):
        capture(model, [call(x(3, 8))])
    assert model.training
    assert model.config.use_cache


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.linear(x.mul_(2))


def test_a_batch_that_the_model_itself_fails_on_is_no_fault_of_the_exporter(capfd: pytest.CaptureFixture[str]) -> None:
    model, wide = Counting(), x(3, 9)
    before = wide.clone()
    with pytest.raises(InputError, match=r"the model itself, fails on the first .* \(float32\[3, 9\]\): mat1 and mat2"):
        capture(model, [call(wide)])
    with pytest.raises(InputError, match=r"fails on calibration batch 2 \(float32\[3, 9\]\): "):
        capture(model, [call(x(1, 8)), call(wide)])
    assert torch.equal(wide, before)
    assert torch.equal(model.calls, torch.zeros(1))
    assert capfd.readouterr().err == ""


def test_the_model_is_captured_as_for_inference_and_left_as_it_was() -> None:
    model = Cached()
    model.linear.eval()
    before = copy.deepcopy(model.state_dict())
    program = capture(model, [call(x(3, 8))])
    assert (model.training, model.linear.training, model.config.use_cache) == (True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(program.run(x(3, 8)), model.linear(x(3, 8)))


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(16, 8), Attention()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.embed(ids)
        return self.attention(y if mask is None else y * mask[..., None])


def test_the_graph_runs_with_other_batch_sizes_and_lengths() -> None:
    model = Ids().eval()
    program = capture(model, [call(torch.zeros(2, 5, dtype=torch.long), mask=torch.ones(2, 5, dtype=torch.long))])
    for shape in ((2, 5), (3, 9), (1, 4), (4, 1)):
        ids = torch.randint(0, 16, shape)
        mask = (ids > 4).long()
        with torch.no_grad():
            assert torch.equal(program.run(ids, mask=mask), model(ids, mask=mask))


def test_the_example_is_a_batch_whose_sizes_can_vary() -> None:
    model = Attention().eval()
    program = capture(model, [call(x(1, 5, 8)), call(x(3, 7, 8)), call(x(3, 1, 8))])
    for shape in ((1, 5, 8), (3, 7, 8), (2, 2, 8)):
        with torch.no_grad():
            assert torch.equal(program.run(x(*shape)), model(x(*shape)))


class FixedLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("positions", torch.randn(5, 8))

    def forward(self, x: Tensor, factor: int = 1) -> Tensor:
        return self.linear(x + self.positions) * factor


def test_batches_that_the_graph_cannot_take_are_refused() -> None:
    model = FixedLength()
    with pytest.raises(InputError, match=r"does not fit forward\(\) of FixedLength.*missing a required argument: 'x'"):
        capture(model, [call(y=x(2, 5, 8))])
    with pytest.raises(InputError, match="2 positional arguments.*give all the same form"):
        capture(model, [call(x(2, 5, 8)), call(x(2, 5, 8), 1)])
    with pytest.raises(CaptureError, match="takes 2 as 'factor', and another batch has 3"):
        capture(model, [call(x(2, 5, 8), 2), call(x(2, 5, 8), 3)])
    with pytest.raises(
        CaptureError, match=r"takes float32\[2, 5, 8\] as 'x', and another batch has float64\[2, 5, 8\]"
    ):
        capture(model, [call(x(2, 5, 8)), call(x(2, 5, 8).double())])
    with pytest.raises(
        CaptureError, match=r"takes float32\[1, 5, 8\] as 'x', and another batch has .*\[1, 1, 8\].*pad"
    ):
        capture(model, [call(x(1, 5, 8)), call(x(1, 1, 8))])


def test_keywords_may_come_in_any_order() -> None:
    model = Ids().eval()
    ids, mask = torch.randint(0, 16, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    program = capture(model, [call(mask=mask, ids=ids), call(ids=ids, mask=mask)])
    names = [node.name for node in program.placeholders()]
    inputs = program.flatten_inputs((), {"ids": ids, "mask": mask})
    assert torch.equal(inputs[names.index("ids")], ids)
    assert torch.equal(inputs[names.index("mask")], mask)
    with torch.no_grad():
        assert torch.equal(program.run(ids=ids, mask=mask), model(ids, mask=mask))


def test_the_data_flow_tells_that_siblings_do_not_depend_on_each_other() -> None:
    import networkx as nx

    program = capture(Attention(), [call(x(2, 5, 8))])
    q, k, o = (program.sites[name].uses[0].node.name for name in "qko")
    flow = program.digraph()
    assert nx.is_directed_acyclic_graph(flow)
    assert not nx.has_path(flow, q, k)
    assert nx.has_path(flow, q, o)
