"""Perplexity against its definition, and what a user is told when it cannot be had."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slimc.errors import InputError, NumericsError
from slimc.runtime.evaluate import perplexity


class Bigram(nn.Module):
    """A language model that looks at one token: the logits of the next are a row of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.calls: list[int] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.calls.append(len(ids))
        return self.table[ids]


def by_definition(table: Tensor, ids: Tensor) -> float:
    """``exp`` of the mean of ``-log p(next token)``, token by token in float64."""
    logs = table.double().log_softmax(-1)
    losses = [-logs[before, after] for row in ids.tolist() for before, after in pairwise(row)]
    return math.exp(sum(losses) / len(losses))


@given(windows=st.integers(1, 5), length=st.integers(2, 9), batch=st.integers(1, 6), seed=st.integers(0, 99))
def test_perplexity_is_its_definition_for_every_batch_size(windows: int, length: int, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(7, 7, generator=generator)
    ids = torch.randint(7, (windows, length), generator=generator)
    # The log-softmax of 7 float32 logits below 5 is exact to a few units of 2^-24 times 10.
    assert perplexity(Bigram(table), ids, batch=batch) == pytest.approx(by_definition(table, ids), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    assert perplexity(Bigram(torch.zeros(50, 50)), torch.randint(50, (2, 8))) == pytest.approx(50, rel=1e-6)


def test_half_precision_logits_are_judged_in_float32() -> None:
    table = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ids = torch.randint(300, (4, 64), generator=torch.Generator().manual_seed(1))
    assert perplexity(Bigram(table), ids) == pytest.approx(by_definition(table, ids), rel=1e-5)


class Wrapped(nn.Module):
    """Answers like a Hugging Face model, and remembers whether it was asked for a cache."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output
        self.asked: list[bool | None] = []

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> object:
        self.asked.append(use_cache)
        logits = torch.zeros(*input_ids.shape, 5)
        return {"object": SimpleNamespace(logits=logits), "tuple": (logits, None), "short": logits[:, 1:]}[self.output]


@pytest.mark.parametrize("output", ["object", "tuple"])
def test_outputs_that_hold_logits(output: str) -> None:
    model = Wrapped(output)
    assert perplexity(model, torch.zeros(1, 4, dtype=torch.int64)) == pytest.approx(5)
    assert model.asked == [False]


def test_a_model_without_logits_is_refused() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(InputError, match=r"Wrapped returned \(1, 3, 5\): pass a causal language model"):
        perplexity(Wrapped("short"), ids)


@pytest.mark.parametrize("shape", [(0, 4), (2, 1), (4,)])
def test_too_few_tokens_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="perplexity needs token ids"):
        perplexity(Bigram(torch.zeros(2, 2)), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_breaks_is_named_with_the_window(bad: float) -> None:
    table = torch.zeros(3, 3)
    table[2, 1] = bad
    with pytest.raises(NumericsError, match="loss is nan on window 1: its weights or activations hold NaN or Inf"):
        perplexity(Bigram(table), torch.tensor([[0, 1, 0], [0, 2, 1], [0, 0, 0]]), batch=3)


def test_the_model_keeps_its_mode_and_progress_is_told() -> None:
    told: list[tuple[str, int]] = []

    class Told:
        def start(self, stage: str, total: int) -> None:
            told.append((stage, total))

        def advance(self, stage: str, n: int = 1, note: str = "") -> None:
            told.append((stage, n))

        def finish(self, stage: str) -> None:
            told.append((stage, 0))

    model = Bigram(torch.zeros(3, 3)).train()
    perplexity(model, torch.zeros(5, 4, dtype=torch.int64), batch=2, progress=Told())
    assert model.training
    assert model.calls == [2, 2, 1]
    assert told == [("perplexity", n) for n in (5, 2, 2, 1, 0)]
