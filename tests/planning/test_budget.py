"""Budgets as people write them."""

from __future__ import annotations

import pytest

from slimc.errors import RecipeError
from slimc.planning.budget import Budget


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("3.2bpw", 400.0), ("0.25x", 500.0), ("45MB", 45e6), (" 1.5 kB ", 1500.0), ("2KiB", 2048.0), ("4BPW", 500.0)],
)
def test_a_budget_in_bytes(text, nbytes):
    assert Budget.parse(text).nbytes(weights=1000, dense=2000) == pytest.approx(nbytes)


@pytest.mark.parametrize("text", ["", "3.2", "bpw", "-1bpw", "0MB", "3.2 bits", "1e3MB", "3..2bpw", 3.2])
def test_what_is_no_budget_is_refused_with_the_forms(text):
    with pytest.raises(RecipeError, match="is no budget; write 3.2bpw"):
        Budget.parse(text)


def test_it_is_written_as_it_is_read():
    assert [str(Budget.parse(text)) for text in ("3.20bpw", "45 mb", ".25x")] == ["3.2bpw", "45MB", "0.25x"]


@pytest.mark.parametrize("text", ["1234567kB", "3.123456789bpw", "0.00001x", "123456789012GB"])
def test_its_text_loses_no_digit(text):
    # The command line reads a budget, and hands its text on to be read again.
    assert str(Budget.parse(text)) == text
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)
