"""What becomes of each form of layer in a folder for stock transformers.

| form | in the folder | |
|---|---|---|
| codes of one width or several | int4, or int8 if any layer has codes of more than 4 bits | exact |
| a scale a tensor, a row, a group of columns | a scale a row or group; repeated where layers differ | exact |
| zero points | packed; stored for all layers if one has them | exact |
| 2:4 and other sparsity | the code of zero, or the number 0 | exact, as large as a dense weight |
| values in 16 or 32 bits | a dense weight | exact |
| adapters, of 16 or 4 bits | a PEFT LoRA in the dtype of the model | exact |
| signs, scaled inputs, groups with no common size | refused; decoded to a dense weight if asked for | rounded once |
| a layer that is no ``torch.nn.Linear`` in transformers | the same | rounded once |
| inputs rounded to 8 bits | refused | |

A folder has one scheme for all of its codes. compressed-tensors could hold several, but transformers (5.24), where it
decodes while it loads, decodes all layers by the first one; and vLLM wants one for q, k and v.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from slimc.backends.onnx.one_width import common_bits
from slimc.errors import InputError
from slimc.progress import counted
from slimc.runtime.bits import stream_bytes
from slimc.runtime.formats import LinearFormat, TensorSpecs, WeightFormat

__all__ = ["Scheme", "check_inputs", "choose_scheme", "first_of", "no_codes_for", "notes"]

LEAST_GROUP = 16
"""Columns below which a scale of 16 bits takes a quarter of what the codes take, and no server has a kernel."""

_WORD = 32
"""Codes are packed into integers of so many bits."""


@dataclass(frozen=True)
class Scheme:
    """How the codes of all layers of a folder are stored.

    Attributes:
        bits: of a code, 4 or 8.
        group: columns that share a scale; None: a row has one.
        asymmetric: whether zero points are stored.
    """

    bits: int
    group: int | None
    asymmetric: bool

    def __str__(self) -> str:
        """Return it for people: ``int4/64 asymmetric``, ``int8 per channel``."""
        scales = " per channel" if self.group is None else f"/{self.group}"
        return f"int{self.bits}{scales}{' asymmetric' if self.asymmetric else ''}"

    def specs(self, form: WeightFormat) -> TensorSpecs:
        """Return shape and dtype of each tensor of a layer, by the name that compressed-tensors has for it."""
        groups = 1 if self.group is None else form.columns // self.group
        specs: TensorSpecs = {
            "weight_packed": ((form.rows, _words(form.columns, self.bits)), torch.int32),
            "weight_scale": ((form.rows, groups), form.dtype),
            "weight_shape": ((2,), torch.int64),
        }
        if self.asymmetric:
            specs["weight_zero_point"] = ((_words(form.rows, self.bits), groups), torch.int32)
        return specs

    def to_json(self, *, ignore: Collection[str]) -> dict[str, Any]:
        """Return the ``quantization_config`` of ``config.json``; ``ignore`` are the linear layers without codes."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": not self.asymmetric,
            "strategy": "channel" if self.group is None else "group",
            "dynamic": False,
        }
        if self.group is not None:
            weights["group_size"] = self.group
        group = {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": sorted(ignore),
            "config_groups": {"group_0": group},
            # Decode while loading, not at the first call: PEFT finds no weight to put adapters beside until then, and
            # packed zero points do not fit what compressed-tensors 0.20 makes room for.
            "dequantize": True,
        }


def _words(count: int, bits: int) -> int:
    """Return how many integers ``count`` codes take."""
    return -(-stream_bytes(count, bits) * 8 // _WORD)


def check_inputs(forms: Mapping[str, LinearFormat]) -> None:
    """Raise `InputError` if layers round their inputs, which no key of the folder says."""
    rounded = {name: form.activation for name, form in forms.items() if form.activation is not None}
    if rounded:
        raise InputError(
            f"{first_of(rounded)} rounds its inputs to {next(iter(rounded.values()))}, which stock transformers does "
            "not do; compress the model again without the pass 'activations'"
        )


def first_of(names: Collection[str]) -> str:
    """Return the first name, quoted, and how many others there are."""
    first = f"'{next(iter(names))}'"
    return first if len(names) == 1 else f"{first} (and {counted(len(names) - 1, 'other layer')})"


def no_codes_for(form: LinearFormat, kind: str) -> str | None:
    """Return why neither codes nor 16-bit values and adapters can stand for a layer, None if they can.

    Args:
        form: of the layer.
        kind: the name of its class in transformers.
    """
    if kind != "Linear":
        return f"is a {kind} in transformers, for which compressed-tensors has no codes"
    if form.binary is not None:
        return "has signs with a magnitude of low rank"
    if form.input_scaled:
        return "has a scale for each input"
    if form.weight.bits is not None and (group := _dividing_group(form.weight)) is not None and group < LEAST_GROUP:
        return f"has groups of {form.weight.group} columns, which {form.columns} columns are no multiple of"
    return None


def choose_scheme(forms: Mapping[str, WeightFormat]) -> Scheme | None:
    """Return the smallest scheme that holds the codes of all layers exactly, None if there are no layers.

    Raises:
        InputError: their groups have no common size.
    """
    if not forms:
        return None
    found = {name: _dividing_group(form) for name, form in forms.items()}
    sizes = [size for size in found.values() if size is not None]
    rows = [form.columns for name, form in forms.items() if found[name] is None]
    group = math.gcd(*sizes, *rows) if sizes else None
    if group is not None and group < LEAST_GROUP:
        raise InputError(
            f"layers have scales for {' and '.join(map(str, sorted({*sizes, *rows})))} columns, and the folder has one "
            f"size for all, of at least {LEAST_GROUP}; compress the model again with groups that divide each other"
        )
    return Scheme(
        bits=4 if max(map(common_bits, forms.values())) <= 4 else 8,
        group=group,
        asymmetric=any(form.asymmetric for form in forms.values()),
    )


def _dividing_group(form: WeightFormat) -> int | None:
    """Return the largest group that is whole in each row and has one scale in each; None: a row has one scale."""
    if form.group is None or form.group >= form.columns:
        return None
    return math.gcd(form.group, form.columns)


def notes(form: LinearFormat, scheme: Scheme | None) -> list[str]:
    """Return what of a layer takes more bits in a folder than packed by slimc, for people; without a scheme: dense."""
    weight, found = form.weight, []
    if scheme is None:
        found.append("16-bit values are dense" if weight.sparsity is None else "zeros of 16-bit values are stored")
    else:
        narrow = sorted({*(weight.widths or (weight.bits or 0,))})
        if narrow != [scheme.bits]:
            span = str(narrow[0]) if len(narrow) == 1 else f"{narrow[0]} to {narrow[-1]}"
            found.append(f"codes of {span} bits take {scheme.bits}")
        if weight.sparsity is not None:
            found.append(f"zeros of {weight.sparsity} are stored, so the codes are as large as without it")
        if weight.per_tensor:
            found.append("the one scale of a tensor is repeated")
        elif scheme.group is not None and _dividing_group(weight) != scheme.group:
            found.append(f"scales are repeated for groups of {scheme.group} columns")
        if scheme.asymmetric and not weight.asymmetric:
            found.append("zero points are stored because other layers have them")
    if form.left is not None and form.left.bits is not None:
        found.append(f"adapters of {form.left.bits} bits take {8 * form.left.dtype.itemsize}")
    return found
