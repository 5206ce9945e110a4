"""Layers that are timed for plans: their content, and which targets are refused."""

from __future__ import annotations

import pytest
import torch

from slimc.backends.latency import DecodeTimes, example
from slimc.errors import RecipeError
from slimc.progress import SilentProgress
from slimc.runtime.bits import pack_bits
from slimc.runtime.formats import NM, BinaryFormat, LinearFormat, Unstructured, WeightFormat
from slimc.runtime.packing import PackedLinear

FORMS = {
    "grouped": LinearFormat(WeightFormat(24, 40, bits=3, group=16, dtype=torch.bfloat16)),
    "asymmetric": LinearFormat(WeightFormat(24, 40, bits=5, asymmetric=True, dtype=torch.float16)),
    "sparse with adapters": LinearFormat(
        WeightFormat(24, 40, bits=4, per_tensor=True, sparsity=NM(2, 4)),
        left=WeightFormat(24, 6, bits=4, group=4),
        right=WeightFormat(6, 40, bits=4, group=16),
        input_scaled=True,
    ),
    "signs": LinearFormat(
        WeightFormat(24, 36, bits=4, dtype=torch.bfloat16), binary=BinaryFormat(24, 36, 1, torch.bfloat16)
    ),
    "widths": LinearFormat(WeightFormat(24, 40, bits=4, group=16, asymmetric=True, widths=(1, 4, 2))),
    "unstructured": LinearFormat(WeightFormat(24, 40, sparsity=Unstructured(), nonzeros=100)),
    "dense": LinearFormat(WeightFormat(24, 40, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_example_is_a_whole_layer_of_its_form(form):
    layer = example(form, torch.device("cpu"))
    # Untrusted tensors are checked to be exactly what the format needs.
    checked = PackedLinear.from_tensors(form, layer.tensors())
    assert checked.format == form
    assert bool(checked.decode().isfinite().all())


def test_nothing_follows_the_last_code_of_a_row():
    """Layouts do not keep it, and a layer that is not restored bit for bit is timed without its kernels."""
    form = LinearFormat(
        WeightFormat(24, 40, bits=3, group=8),
        left=WeightFormat(24, 11, bits=4, group=64),
        right=WeightFormat(11, 40, bits=4, group=64),
    )
    layer = example(form, torch.device("cpu"))
    codes, _ = layer.left.unpack()
    assert torch.equal(pack_bits(codes, 4), layer.left.values)


@pytest.mark.parametrize("target", ["speed", "decode@", "prefill@h100", ""])
def test_unknown_targets_are_refused(target):
    with pytest.raises(RecipeError, match="there is no target '.*'; there are 'size', 'decode'"):
        DecodeTimes(target, SilentProgress())


def test_a_card_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="this machine has none. Plan on a machine with that card"):
        DecodeTimes("decode", SilentProgress())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4")
    with pytest.raises(RecipeError, match="'decode@h100' .* this machine has 'NVIDIA A100-SXM4'"):
        DecodeTimes("decode@h100", SilentProgress())
