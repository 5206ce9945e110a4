"""What choices cost: predicted damage against what really happens to the output, and what the sweep leaves behind."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from slimc.errors import CaptureError, FormatError
from slimc.ir.capture import capture
from slimc.passes import Prune, Quantize
from slimc.passes.work import SiteWork
from slimc.planning import gradients
from slimc.planning.gradients import Samples
from slimc.planning.menu import Menu
from slimc.planning.sensitivity import measure
from slimc.progress import SilentProgress


class Pair(nn.Module):
    """A gate and a down projection, and a readout that depends on the second one of two features only."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.unread = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.gate(x))) + 0 * self.unread(x).sum()


@pytest.fixture
def pair() -> Pair:
    torch.manual_seed(0)
    return Pair().eval()


@pytest.fixture(autouse=True)
def many_pairs(monkeypatch):
    """Keep the noise of damages below what the tests look for."""
    monkeypatch.setattr(gradients, "PAIRS", 1024)


@pytest.fixture
def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 5, 16, generator=generator) for _ in range(6)]


def _measure(model: nn.Module, inputs: list[Tensor], menu, vocabulary=None, held_out=2):
    program = capture(model, [((batch,), {}) for batch in inputs])
    flat = [program.flatten_inputs((batch,), {}) for batch in inputs]
    built = Menu.load(menu).expressions
    found = measure(
        program, built, flat, held_out=held_out, vocabulary=vocabulary, device=None, progress=SilentProgress()
    )
    return program, {site.name: {choice.name: choice for choice in site.choices} for site in found}


def _changed(model: nn.Module, site: str, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs before and after the weight of ``site`` is replaced."""
    module = model.get_submodule(site)
    with torch.no_grad():
        before = model(x)
        kept = module.weight.clone()
        module.weight.copy_(weight)
        after = model(x)
        module.weight.copy_(kept)
    return before, after


def _quantized(program, site: str, bits: int) -> Tensor:
    from slimc.passes.solvers import quantize_slim

    return quantize_slim(program.dense_weight(program.sites[site]), bits, 8).dequantize()


MENU = {"int8": [Quantize(bits=8, group=8)], "int4": [Quantize(bits=4, group=8)], "int2": [Quantize(bits=2, group=8)]}


@pytest.mark.parametrize("site", ["gate", "down"])
def test_the_damage_is_half_the_squared_relative_error_of_the_output(pair, inputs, site):
    program, found = _measure(pair, inputs, MENU)
    exact = []
    for x in inputs[-2:]:
        before, after = _changed(pair, site, _quantized(program, site, 4), x)
        exact.append(float((after - before).square().sum() / before.square().sum()) / 2)
    # (r . e)^2 over 1024 pairs of a row and a draw, each with the relative variance 2 of chi-square: four deviations
    # are 18 %. Quantised to 4 bits, tanh bends by less than that.
    assert found[site]["int4"].damage == pytest.approx(sum(exact) / 2, rel=0.25)


def test_of_a_language_model_it_is_the_divergence_in_nats_a_token(pair, inputs):
    program, found = _measure(pair, inputs, MENU, vocabulary=16)
    for site in ("gate", "down"):
        exact = []
        for x in inputs[-2:]:
            before, after = _changed(pair, site, _quantized(program, site, 4), x)
            p, q = before.log_softmax(-1), after.log_softmax(-1)
            exact.append(float((p.exp() * (p - q)).sum(-1).mean()))
        assert found[site]["int4"].damage == pytest.approx(sum(exact) / 2, rel=0.25)


def test_fewer_bits_do_more_damage_and_take_fewer_bytes(pair, inputs):
    _, found = _measure(pair, inputs, MENU)
    for site in ("gate", "down"):
        choices = [found[site][name] for name in ("dense", "int8", "int4", "int2")]
        assert choices[0].damage == 0
        assert all(a.damage < b.damage and a.nbytes > b.nbytes for a, b in pairwise(choices))


def test_a_site_that_the_output_does_not_depend_on_costs_nothing(pair, inputs):
    _, found = _measure(pair, inputs, MENU)
    assert found["unread"]["int2"].damage == 0
    assert found["unread"]["int2"].output_error > 0.1


def test_the_program_is_left_as_it_was(pair, inputs):
    program, _ = _measure(pair, inputs, MENU)
    assert all(site.packed is None for site in program.sites.values())
    assert torch.equal(program.run(inputs[0]), pair(inputs[0]))


def test_an_expression_that_does_not_fit_a_site_is_not_among_its_choices(pair, inputs):
    _, found = _measure(pair, inputs, MENU | {"2:3": [Prune("2:3"), Quantize()]})
    assert "2:3" in found["down"]
    assert "2:3" not in found["gate"]


def test_an_expression_that_fails_at_a_site_is_recorded_and_the_rest_is_measured(pair, inputs, monkeypatch):
    pack = SiteWork.pack

    def failing(work: SiteWork):
        if work.name == "gate" and work.quantized is not None and work.quantized.bits == 4:
            raise FormatError("of no use")
        return pack(work)

    monkeypatch.setattr(SiteWork, "pack", failing)
    program = capture(pair, [((batch,), {}) for batch in inputs])
    flat = [program.flatten_inputs((batch,), {}) for batch in inputs]
    found = measure(program, Menu.load(MENU).expressions, flat, held_out=2, vocabulary=None, progress=SilentProgress())
    gate, down = (next(site for site in found if site.name == name) for name in ("gate", "down"))
    assert gate.refused == {"int4": "of no use"}
    assert "int4" not in [choice.name for choice in gate.choices]
    assert not down.refused
    assert "int4" in [choice.name for choice in down.choices]


def test_choices_are_judged_by_all_batches_if_none_is_held_out(pair, inputs):
    _, found = _measure(pair, inputs, MENU, held_out=0)
    assert 0 < found["gate"]["int4"].damage < math.inf


class Mixing(nn.Module):
    """Outputs are sums over a text, as in a model whose tokens attend to all before them."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(16, 16, bias=False)
        self.out = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.value(x).cumsum(1))


def test_errors_of_the_tokens_of_a_text_are_summed_before_they_are_squared(monkeypatch):
    torch.manual_seed(0)
    model = Mixing().eval()
    # The inputs have a mean, so that errors at all tokens have one, too; and sums of them grow with the text.
    inputs = [torch.randn(4, 24, 16) + 1 for _ in range(4)]
    error = torch.randn(16, 16) / 100
    monkeypatch.setattr(gradients, "PAIRS", 800)
    program = capture(model, [((batch,), {}) for batch in inputs])
    flat = [program.flatten_inputs((batch,), {}) for batch in inputs]
    samples = Samples(program, flat, vocabulary=None, seed=0, device=None, progress=SilentProgress())
    sample = samples["value"]
    assert sample.gradients.shape == (50, 4 * 4 * 24, 16)
    exact = []
    for x in inputs:
        before, after = _changed(model, "value", model.value.weight.detach() + error, x)
        exact.append(float((after - before).square().sum() / before.square().sum()) / 2)
    # 800 pairs of a text and a draw: four deviations are 20 %. Squared first, it were less than half.
    found = sample.damage(sample.inputs @ error.t())
    assert found == pytest.approx(sum(exact) / 4, rel=0.2)
    apart = replace(sample, texts=torch.arange(len(sample.texts)))
    assert apart.damage(sample.inputs @ error.t()) < found / 2


def test_sites_are_judged_alike_however_few_are_held_at_once(pair, inputs, monkeypatch):
    program = capture(pair, [((batch,), {}) for batch in inputs])
    flat = [program.flatten_inputs((batch,), {}) for batch in inputs[-2:]]
    together, apart = (
        Samples(program, flat, vocabulary=None, seed=0, device=None, progress=SilentProgress()) for _ in range(2)
    )
    exact = {site: together[site] for site in together}
    assert list(together._held) == ["gate", "down", "unread"]
    # Just enough for the largest site: 640 tokens of 16 features, and 8 draws of 24.
    monkeypatch.setattr(gradients, "HELD_BYTES", 640 * (16 + 8 * 24) * 4)
    for site in apart:
        sample = apart[site]
        assert list(apart._held) == [site]
        assert torch.equal(sample.inputs, exact[site].inputs)
        assert torch.allclose(sample.gradients, exact[site].gradients, rtol=1e-4, atol=1e-7)


class Language(nn.Module):
    """A language model in miniature, whose head may be the embedding's matrix."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.head = nn.Linear(16, 32, bias=False)
        self.embed = nn.Embedding(32, 16)
        self.body = nn.Linear(16, 16)
        if tied:
            self.embed.weight = self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


@pytest.mark.parametrize(("tied", "embedding"), [(False, None), (True, "embed")])
def test_a_head_is_measured_like_any_site_and_says_what_it_shares(tied, embedding):
    torch.manual_seed(0)
    model = Language(tied=tied).eval()
    ids = [torch.randint(32, (4, 8)) for _ in range(4)]
    program = capture(model, [((batch,), {}) for batch in ids], include=["head"])
    flat = [program.flatten_inputs((batch,), {}) for batch in ids]
    found = measure(program, Menu.load(MENU).expressions, flat, held_out=2, vocabulary=32, progress=SilentProgress())
    assert {site.name: site.embedding for site in found} == {"body": None, "head": embedding}
    head = next(site for site in found if site.name == "head")
    damages = {choice.name: choice.damage for choice in head.choices}
    assert 0 < damages["int8"] < damages["int4"] < damages["int2"]


def test_a_model_whose_output_no_gradient_reaches_is_refused(inputs):
    class Argmax(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    program = capture(Argmax().eval(), [((inputs[0],), {})])
    samples = Samples(program, [[inputs[0]]], vocabulary=None, seed=0, device=None, progress=SilentProgress())
    with pytest.raises(CaptureError, match="in a way that gradients can follow"):
        samples["gate"]


def test_a_weight_of_zeros_costs_nothing_in_any_expression(pair: Pair, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        pair.gate.weight.zero_()
    _, found = _measure(pair, inputs, {"w2": [Quantize(bits=2)], "w8": [Quantize(bits=8)]})
    assert {name: choice.damage for name, choice in found["gate"].items()} == {"dense": 0, "w2": 0, "w8": 0}
