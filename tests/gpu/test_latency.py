"""Times for plans: every form is timed once, and fewer bytes of a large layer take less time."""

from __future__ import annotations

import torch

from slimc.backends.latency import DecodeTimes
from slimc.planning.menu import DENSE
from slimc.planning.sensitivity import Choice
from slimc.progress import SilentProgress
from slimc.runtime.formats import LinearFormat, WeightFormat


def test_forms_are_timed_on_this_card() -> None:
    forms = {
        DENSE: LinearFormat(WeightFormat(4096, 4096, dtype=torch.bfloat16)),
        "int4": LinearFormat(WeightFormat(4096, 4096, bits=4, group=64, dtype=torch.bfloat16)),
    }
    clock = DecodeTimes("decode", SilentProgress())
    times = clock(Choice(name, form, 0.0, 0.0) for name, form in forms.items())
    assert set(times) == set(forms.values())
    # What no card does faster or slower: 32 MB in a microsecond, or a layer in ten milliseconds.
    assert all(1 < taken < 1e4 for taken in times.values())
    kept = dict(times)
    assert clock([Choice("int4", forms["int4"], 0.0, 0.0)]) == kept
