"""Choosing a kernel: the first that accepts, buckets of tokens, and what is said about the others."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import torch

from slimc.runtime.packing import LinearFormat, WeightFormat
from slimc.runtime.select import Case, Kernel, KernelTable, choices, choose, token_bucket

FORM = LinearFormat(WeightFormat(8, 8, bits=4))
CPU = torch.device("cpu")


def kernel(name: str, limit: int | None = None) -> Kernel:
    return Kernel(
        name,
        accepts=lambda form, dtype, device, tokens: "too many tokens" if limit and tokens > limit else None,
        prepare=lambda packed: None,
        run=lambda x, state, bias: x,
    )


FEW, ANY = kernel("few", 8), kernel("any")


def test_tokens_are_rounded_up_to_a_power_of_two() -> None:
    assert [token_bucket(tokens) for tokens in (1, 2, 3, 8, 9, 1000)] == [1, 2, 4, 8, 16, 1024]


def test_the_first_that_accepts_is_chosen() -> None:
    assert choose((FEW, ANY), FORM, torch.float32, CPU, 7) == (FEW, {})
    assert choose((FEW, ANY), FORM, torch.float32, CPU, 9) == (ANY, {"few": "too many tokens"})
    assert choose((FEW,), FORM, torch.float32, CPU, 9) == (None, {"few": "too many tokens"})


def test_choices_tell_ranges_and_reasons() -> None:
    assert [str(choice) for choice in choices((FEW, ANY), FORM, torch.float32, CPU)] == [
        "1 to 8 tokens: few",
        "9 tokens or more: any (few: too many tokens)",
    ]
    assert [str(choice) for choice in choices((kernel("one", 1),), FORM, torch.float32, CPU)] == [
        "1 token: one",
        "2 tokens or more: slim::linear (one: too many tokens)",
    ]


def test_the_first_that_expects_to_be_fast_is_chosen() -> None:
    doubts = replace(ANY, name="doubts", expects=lambda case: "slow" if case.tokens > 2 else None)
    assert choose((doubts, ANY), FORM, torch.float32, CPU, 2) == (doubts, {})
    assert choose((doubts, ANY), FORM, torch.float32, CPU, 3) == (ANY, {"doubts": "slow"})
    assert choose((doubts, FEW), FORM, torch.float32, CPU, 9) == (doubts, {"few": "too many tokens"})


def test_a_kernel_may_expect_another_speed_of_a_stack_than_of_its_layers() -> None:
    def rows(case: Case) -> int:
        return sum(form.rows for form in case.members)

    narrow = replace(ANY, name="narrow", expects=lambda case: "too many rows" if rows(case) > 8 else None)
    wide = replace(ANY, name="wide", expects=lambda case: "too few rows" if rows(case) <= 8 else None)
    for first, other, by_itself in ((narrow, wide, narrow), (wide, narrow, narrow)):
        case = (first, other), FORM, torch.float32, CPU, 3
        assert choose(*case)[0] == choose(*case, [FORM])[0] == by_itself
        assert choose(*case, [FORM, FORM])[0] == wide
    seen: list[Case] = []
    choose((replace(ANY, expects=seen.append), ANY), FORM, torch.float32, CPU, 3, [FORM, FORM])
    assert seen == [Case(FORM, torch.float32, CPU, 4, (FORM, FORM))]


class Known:
    """Times as a backend may know them."""

    def of(self, spec: LinearFormat, dtype: torch.dtype, device: torch.device) -> dict[int, dict[str, float]]:
        return {8: {"few": 31.0, "any": 26.0}, 16: {"few": 1.0, "any": 26.0}, 1 << 12: {"any": math.inf}}


def test_times_overrule_order_and_expectations_but_not_refusals() -> None:
    table = KernelTable((FEW, ANY), Known())
    assert choose(table, FORM, torch.float32, CPU, 4) == (FEW, {})
    assert choose(table, FORM, torch.float32, CPU, 5) == (ANY, {"few": "slower than any here: 31 us against 26 us"})
    assert choose(table, FORM, torch.float32, CPU, 16) == (ANY, {"few": "too many tokens"})


def test_times_of_the_widest_decide_for_a_stack() -> None:
    stack = [FORM, LinearFormat(WeightFormat(4, 8, bits=4))]
    times = {8: {"few": 1.0, "any": 26.0, "other": 30.0}}
    timings = SimpleNamespace(of=lambda spec, *_: times if spec == FORM else {})
    case = FORM, torch.float32, CPU, 8
    assert choose(KernelTable((ANY, FEW), timings), *case, stack)[0] == FEW
    # It was timed for one layer, and expects another speed of two.
    doubts = replace(FEW, expects=lambda case: "slow for a stack" if len(case.members) > 1 else None)
    other = replace(ANY, name="other")
    for table in ((doubts, ANY, other), (other, ANY, doubts)):
        assert choose(KernelTable(table, timings), *case)[0] == doubts
        chosen, refusals = choose(KernelTable(table, timings), *case, stack)
        assert chosen == ANY
        assert refusals == {"few": "slow for a stack", "other": "slower than any here: 30 us against 26 us"}
    # If all doubt, times decide.
    anybody = replace(ANY, expects=lambda _case: "slow")
    assert choose(KernelTable((anybody, doubts), timings), *case, stack)[0] == doubts


def test_if_all_failed_the_order_decides() -> None:
    assert choose(KernelTable((ANY,), Known()), FORM, torch.float32, CPU, 1 << 13) == (ANY, {})


def test_times_of_kernels_that_refuse_leave_the_others_to_expectations() -> None:
    doubts = replace(ANY, name="doubts", expects=lambda case: "slow")
    # Of the three "few" alone was timed for 16 tokens, more than it takes.
    table = KernelTable((FEW, doubts, kernel("sure")), Known())
    chosen, refusals = choose(table, FORM, torch.float32, CPU, 16)
    assert chosen is not None
    assert chosen.name == "sure"
    assert refusals == {"few": "too many tokens", "doubts": "slow"}
