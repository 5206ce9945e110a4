"""``cusparselt``: 2:4 weights of 16 bits on the sparse tensor cores, by NVIDIA's library, through PyTorch's own ops.

``cusparselt`` computes layers that store such values, and keeps them in the library's form. ``cusparselt-decoded``
brings 4-bit ones into it at every call, which pays off for very many tokens on cards that ``cuda-prefill`` is not for:
half as many values are written as a dense weight has. Adapters are two dense products more, the second of which adds to
y.

The order of the library's metadata is not documented. It is compared, once in a process, with what the library's own
compression gives; that takes milliseconds a layer, too long for a call (22016 x 4096 on an H100: 3 ms).

The library has many algorithms, and its first is slower than a dense product where its best is 1.5 times as fast. The
first call for a size of layer and number of tokens (rounded up to a power of two) searches, and keeps what it finds
on disk; during the capture of a CUDA graph, where nothing can be timed, what is known of the nearest number is taken.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from slimc.backends.cuda import driver
from slimc.backends.cuda.dense import add_adapters
from slimc.backends.cuda.expand import expand_kept, order_metadata
from slimc.backends.cuda.fragments import TILE_ROWS, metadata_pattern, metadata_words
from slimc.backends.cuda.layer import FragmentLayer, refuses, refuses_machine, stack_shared
from slimc.backends.cuda.layer import prepare as prepare_fragments
from slimc.backends.cuda.rounding import round_inputs
from slimc.backends.cuda.stored import StoredAdapters, StoredMatrix, fill_up
from slimc.backends.cuda.unpack import refuses_weight
from slimc.backends.private_folder import PrivateFolder
from slimc.errors import KernelError
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.layouts import Formats, Layout, register_layout
from slimc.runtime.packing import PackedLinear, PackedWeight
from slimc.runtime.select import Case, Kernel, token_bucket

__all__ = ["CUSPARSELT", "DECODED", "LAYOUT", "SparseLayer", "ordered_metadata", "prepare", "run", "run_decoded"]

SIDE_MULTIPLE = 128
"""For other sizes the library fills up, in a way that is not known here."""

UNIT_COLUMNS = 128
TOKEN_MULTIPLE = 8

FEWEST_DECODED = 4096
"""Below, decoding takes longer than the library saves over a dense product."""

HOPPER = (9, 0)

log = logging.getLogger(__name__)

# These bindings are private, so a release may lack one; then the kernel refuses every case.
_multiply: Any = getattr(torch, "_cslt_sparse_mm", None)
_compress: Any = getattr(torch, "_cslt_compress", None)
_search: Any = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)


@dataclass
class SparseLayer:
    """A layer of 16-bit values.

    Attributes:
        format: what the layer stores.
        compressed: W in the library's form, [rows, 9 / 16 of the columns].
        adapters: as they are stored.
        input_scale: [columns] or None.
    """

    format: LinearFormat
    compressed: Tensor
    adapters: StoredAdapters | None
    input_scale: Tensor | None


def prepare(packed: PackedLinear) -> SparseLayer:
    """Bring a layer of 16-bit values into the library's form."""
    weight = packed.weight
    if weight.pattern is None:
        raise KernelError("a weight without a pattern is not 2:4")
    compressed, values, metadata = _empty(weight.format, weight.values)
    values.copy_(weight.values)
    metadata.copy_(ordered_metadata(metadata_words(weight.pattern)).view(metadata.dtype))
    return SparseLayer(packed.format, compressed, StoredAdapters.of(packed), packed.input_scale)


def ordered_metadata(words: Tensor) -> Tensor:
    """Return metadata in the library's order, uint8 [rows * columns / 8].

    A nibble is four columns; blocks of 64 rows by 32 columns are 256 bytes, [row / 16 % 4][row % 8][group % 4]
    [group / 4], of which the low nibble is a row and the high one the row 8 below; blocks lie side by side first.

    Args:
        words: as `slimc.backends.cuda.fragments.metadata_words` returns them, of multiples of 128 rows and columns.
    """
    tiles, units = words.shape[:2]
    by_group = torch.stack([words >> (4 * group) for group in range(4)], -1)
    both = ((by_group & 15) | (by_group >> 12 & 0xF0)).to(torch.uint8)
    # [block row, tile, unit, g, selector, half of columns, word, group], where instruction = 2 * word + selector
    return both.view(tiles // 4, 4, units, 8, 2, 2, 2, 4).permute(0, 2, 6, 4, 1, 3, 7, 5).reshape(-1)


def fragment_metadata(ordered: Tensor, rows: int, columns: int) -> Tensor:
    """Return metadata as `slimc.backends.cuda.fragments.metadata_words` would, of the library's order."""
    tiles, units = rows // TILE_ROWS, columns // UNIT_COLUMNS
    both = ordered.view(tiles // 4, units, 2, 2, 4, 8, 4, 2).permute(0, 4, 1, 5, 3, 7, 2, 6).int()
    words = torch.zeros(both.shape[:-1], dtype=torch.int32, device=ordered.device)
    for group in range(4):
        words |= ((both[..., group] & 15) | (both[..., group] >> 4 << 16)) << (4 * group)
    return words.reshape(tiles, units, 32, 2)


def tensors(layer: SparseLayer) -> dict[str, Tensor]:
    """Return what of a layer must be kept."""
    named = {"compressed": layer.compressed}
    if layer.input_scale is not None:
        named["input_scale"] = layer.input_scale
    if layer.adapters is not None:
        for prefix, factor in (("left_", layer.adapters.left), ("right_", layer.adapters.right)):
            named |= {prefix + name: tensor for name, tensor in factor.packed.tensors().items()}
    return named


def assemble(formats: Formats, named: Mapping[str, Tensor], part: int) -> SparseLayer:
    """Return the layer that reads these tensors."""
    spec = formats[part]
    left, right = (_factor(factor, prefix, named) for factor, prefix in ((spec.left, "left_"), (spec.right, "right_")))
    adapters = None if left is None or right is None else StoredAdapters(StoredMatrix(left), StoredMatrix(right))
    return SparseLayer(spec, named["compressed"], adapters, named.get("input_scale"))


def restore(formats: Formats, named: Mapping[str, Tensor], part: int) -> PackedLinear:
    """Return the canonical tensors of a layer."""
    spec = formats[part]
    values, metadata = _parts(spec.weight, named["compressed"])
    words = fragment_metadata(metadata.view(torch.uint8), spec.rows, spec.columns)
    weight = PackedWeight(spec.weight, values.clone(), metadata_pattern(words, spec.rows, spec.columns))
    copied = {name: tensor.clone() for name, tensor in named.items() if name != "compressed"}
    left, right = (_factor(factor, prefix, copied) for factor, prefix in ((spec.left, "left_"), (spec.right, "right_")))
    return PackedLinear(weight, left, right, copied.get("input_scale"), spec.activation)


def _factor(spec: WeightFormat | None, prefix: str, named: Mapping[str, Tensor]) -> PackedWeight | None:
    if spec is None:
        return None
    return PackedWeight(spec, **{name: named[prefix + name] for name in spec.tensor_specs()})


def run(x: Tensor, layer: SparseLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns]."""
    flat = x.reshape(-1, layer.format.columns)
    scaled = flat if layer.input_scale is None else flat * layer.input_scale
    rounded = round_inputs(scaled, layer.format.activation)
    y = _product(layer.compressed, rounded, bias)
    if layer.adapters is not None:
        layer.adapters.add(y, rounded if layer.input_scale is None else flat)
    return y.view(*x.shape[:-1], layer.format.rows)


def run_decoded(x: Tensor, layer: FragmentLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns] by a weight that is decoded for this call."""
    spec = layer.format
    rounded = round_inputs(x.reshape(-1, spec.columns), spec.activation)
    compressed, values, metadata = _empty(spec.weight, layer.codes)
    expand_kept(layer, values)
    order_metadata(layer, metadata)
    y = add_adapters(_product(compressed, rounded, bias), rounded, layer)
    return y.view(*x.shape[:-1], spec.rows)


def _empty(spec: WeightFormat, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for the library's form, and in it the values [rows, columns / 2] and the metadata."""
    compressed = like.new_empty(spec.rows, spec.columns // 16 * 9, dtype=spec.dtype)
    return compressed, *_parts(spec, compressed)


def _parts(spec: WeightFormat, compressed: Tensor) -> tuple[Tensor, Tensor]:
    half = spec.columns // 2
    values, metadata = torch.split(compressed.view(-1), [spec.rows * half, spec.rows * half // 8])
    return values.view(spec.rows, half), metadata


def _product(compressed: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ W^T + bias`` [tokens, rows]."""
    inputs = fill_up(x, 0, TOKEN_MULTIPLE).contiguous().t()
    algorithm = _algorithm(compressed, inputs)
    y: Tensor = _multiply(compressed, inputs, bias=bias, transpose_result=True, alg_id=algorithm)
    return y[: len(x)]


# ---------------------------------------------------------------------------------------------------------- algorithms

_FOLDER = PrivateFolder("cusparselt", ".json", "algorithms of cuSPARSELt are searched in each process")


def _algorithm(compressed: Tensor, inputs: Tensor) -> int:
    """Return the algorithm for a product, searched for if none is known and nothing is being captured."""
    device = compressed.device
    card = torch.cuda.get_device_name(device), driver.driver_version(), torch.backends.cusparselt.version()
    key = sha256(json.dumps([*card, *compressed.shape, str(compressed.dtype)]).encode()).hexdigest()
    known, tokens = _known_algorithms(key), token_bucket(inputs.shape[1])
    if tokens not in known:
        if torch.cuda.is_current_stream_capturing():
            return known[min(known, key=lambda other: abs(other.bit_length() - tokens.bit_length()))] if known else 0
        try:
            known[tokens] = int(_search(compressed, inputs, None, None, None, True)[0])
        except RuntimeError as error:
            log.info("cuSPARSELt finds no best algorithm for %s: %s", tuple(compressed.shape), error)
            return 0
        _FOLDER.write(key, json.dumps(known).encode())
    return known[tokens]


@cache
def _known_algorithms(key: str) -> dict[int, int]:
    """Return what was found so far, by number of tokens, by this process or an earlier one."""
    try:
        return {int(tokens): int(found) for tokens, found in json.loads(_FOLDER.read(key) or b"{}").items()}
    except (ValueError, TypeError, AttributeError):
        return {}


# -------------------------------------------------------------------------------------------------------------- accepts


def _accepts(spec: LinearFormat, dtype: torch.dtype, device: torch.device, _tokens: int) -> str | None:
    return refuses_machine(spec, dtype, device) or _refuses_values(spec) or _refuses_library(device)


def _accepts_decoded(spec: LinearFormat, dtype: torch.dtype, device: torch.device, _tokens: int) -> str | None:
    return refuses(spec, dtype, device) or _refuses_weight(spec.weight) or _refuses_library(device)


def _expects_decoded(case: Case) -> str | None:
    if case.device.type == "cuda" and torch.cuda.get_device_capability(case.device) == HOPPER:
        return "is slower than cuda-prefill"
    if case.tokens < FEWEST_DECODED:
        return f"is slower for fewer than {FEWEST_DECODED} tokens"
    return None


def _refuses_values(spec: LinearFormat) -> str | None:
    """Why the kernel that keeps the library's form cannot compute a layer."""
    if spec.weight.bits is not None:
        return f"computes weights of 16-bit values, not {spec.weight.describe()}"
    for factor in (spec.left, spec.right):
        if factor is not None:
            if factor.dtype != spec.weight.dtype:
                return "needs a weight and adapters of one dtype"
            if reason := refuses_weight(factor):
                return reason
    return _refuses_weight(spec.weight)


def _refuses_weight(weight: WeightFormat) -> str | None:
    if weight.sparsity != NM(2, 4):
        return f"computes 2:4 weights, not {weight.describe()}"
    if weight.dtype != torch.bfloat16:
        return "is for bfloat16: with float16 the library was seen to execute illegal instructions"
    if weight.rows % SIDE_MULTIPLE or weight.columns % SIDE_MULTIPLE:
        return f"needs multiples of {SIDE_MULTIPLE} rows and columns"
    return None


def _refuses_library(device: torch.device) -> str | None:
    if None in (_multiply, _compress, _search) or not torch.backends.cusparselt.is_available():
        return f"PyTorch {torch.__version__} has no cuSPARSELt here"
    if device not in _compared:
        if torch.cuda.is_current_stream_capturing():
            return "was not tried before a CUDA graph was captured"
        _compared[device] = _refuses_form(device)
    return _compared[device]


_compared: dict[torch.device, str | None] = {}
"""What `_refuses_form` found, by device."""


def _refuses_form(device: torch.device) -> str | None:
    """Compress a matrix here and by the library; say why the results differ, or return ``None`` if they are equal."""
    rows, columns = 3 * SIDE_MULTIPLE, 5 * SIDE_MULTIPLE
    masks = torch.tensor([3, 5, 9, 6, 10, 12], dtype=torch.uint8)
    nibbles = masks[torch.arange(rows * columns // 4).mul(7).remainder(53).remainder(6)].view(rows, -1, 2)
    pattern = (nibbles[..., 0] | nibbles[..., 1] << 4).to(device)
    values = torch.ones(rows, columns // 2, dtype=torch.bfloat16, device=pattern.device)
    spec = WeightFormat(rows, columns, sparsity=NM(2, 4), dtype=torch.bfloat16)
    packed = PackedWeight(spec, values.cumsum(1), pattern)
    try:
        ours, theirs = prepare(PackedLinear(packed)).compressed, _compress(packed.decode())
    except RuntimeError as error:
        return f"cuSPARSELt does not work here: {error}"
    if ours.shape != theirs.shape or not torch.equal(ours.view(torch.int16), theirs.view(torch.int16)):
        return f"cuSPARSELt {torch.backends.cusparselt.version()} has another form than the one known here"
    return None


LAYOUT = register_layout(Layout("cusparselt", prepare, tensors, assemble, restore))
"""What a layer of 16-bit values keeps: the library's form holds the same values and places as the canonical one."""

CUSPARSELT = Kernel("cusparselt", _accepts, prepare, run)
"""For layers of 16-bit values."""

DECODED = Kernel(
    "cusparselt-decoded", _accepts_decoded, prepare_fragments, run_decoded, stack_shared, expects=_expects_decoded
)
"""For layers in the order of the tensor cores."""
