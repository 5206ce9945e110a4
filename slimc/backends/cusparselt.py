"""``cusparselt``: 2:4 weights of 16 bits on the sparse tensor cores, by NVIDIA's library, through PyTorch's own ops.

The library reads 16-bit values. A layer that stores such values is kept in the library's form; one of fewer bits is
brought into it at every call, which pays off for many tokens: half as many values as a dense weight are written.

Adapters are two dense products more, the second of which adds to y.

The order of the library's metadata is not documented. It is compared, once in a process, with what the library's own
compression gives; that takes milliseconds a layer, too long for a call (22016 x 4096 on an H100: 3 ms, this 0.05 ms).

The library has many algorithms, and its first is slower than a dense product where its best is 1.5 times as fast. The
first call for a size of layer and number of tokens (rounded up to a power of two) searches, and keeps what it finds
on disk; during the capture of a CUDA graph, where nothing can be timed, what is known of the nearest number is taken.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from slimc.backends.cuda import driver
from slimc.backends.cuda.dense import StoredLayer, fill_up
from slimc.backends.cuda.layer import refuses_machine, source
from slimc.backends.cuda.unpack import refuses_weight
from slimc.backends.private_folder import PrivateFolder
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.packing import PackedLinear, PackedWeight
from slimc.runtime.select import Kernel, token_bucket

__all__ = ["CUSPARSELT", "SparseLayer", "prepare", "run"]

KERNEL_NAME = "write_metadata"

BLOCK_ROWS = 64
BLOCK_COLUMNS = 32
THREADS = 256
TOKEN_MULTIPLE = 8

# These bindings are private, so a release may lack one; then the kernel refuses every case.
_multiply: Any = getattr(torch, "_cslt_sparse_mm", None)
_compress: Any = getattr(torch, "_cslt_compress", None)
_search: Any = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)


class _Arguments(ctypes.Structure):
    """``struct Arguments`` of ``compress.cu``."""

    _fields_ = (
        ("pattern", ctypes.c_void_p),
        ("metadata", ctypes.c_void_p),
        ("blocks", ctypes.c_int),
    )


@dataclass
class SparseLayer:
    """A layer for cuSPARSELt.

    Attributes:
        stored: the canonical tensors, and what decodes them.
        kept: what is stored of W as a dense matrix [rows, columns / 2].
        launcher: writes the metadata.
        compressed: the library's form, if it is kept: 16-bit [rows, 9 / 16 of the columns].
    """

    stored: StoredLayer
    kept: PackedWeight
    launcher: driver.Launcher
    compressed: Tensor | None = None

    def compress(self) -> Tensor:
        """Return W in the library's form: values by row, then metadata."""
        spec, pattern = self.kept.format, self.stored.packed.weight.pattern
        blocks = 2 * spec.columns // BLOCK_COLUMNS
        whole = self.kept.values.new_empty(spec.rows, spec.columns // 8 * 9, dtype=spec.dtype)
        values = whole.view(-1)[: spec.rows * spec.columns].view(spec.rows, spec.columns)
        if spec.bits is None:
            values.copy_(self.kept.values)
        else:
            self.stored.decode("kept", self.kept, values)
        metadata = whole.view(-1)[spec.rows * spec.columns :]
        self.launcher(
            _Arguments(None if pattern is None else pattern.data_ptr(), metadata.data_ptr(), blocks),
            grid=(-(-32 * blocks // THREADS), spec.rows // BLOCK_ROWS, 1),
            block=(THREADS, 1, 1),
            stream=torch.cuda.current_stream(whole.device).cuda_stream,
        )
        return whole


def prepare(packed: PackedLinear) -> SparseLayer:
    """Bring a layer of 16-bit values into the library's form; one of fewer bits stays as it is stored.

    Raises:
        KernelError: a kernel cannot be compiled or loaded.
    """
    weight, spec = packed.weight, packed.weight.format
    group = None if spec.group is None else spec.group // 2
    dense = replace(spec, columns=spec.columns // 2, group=group, sparsity=None)
    layer = SparseLayer(
        StoredLayer(packed),
        PackedWeight(dense, weight.values, None, weight.scale, weight.zero_point),
        _launcher(weight.values.get_device()),
    )
    if spec.bits is None:
        layer.compressed = layer.compress()
    return layer


def run(x: Tensor, layer: SparseLayer, bias: Tensor | None) -> Tensor:
    """Compute y [..., rows] from x [..., columns]."""
    packed = layer.stored.packed
    flat = x.reshape(-1, packed.format.columns)
    compressed = layer.compress() if layer.compressed is None else layer.compressed
    inputs = flat if packed.input_scale is None else flat * packed.input_scale
    inputs = fill_up(inputs, 0, TOKEN_MULTIPLE).contiguous().t()
    algorithm = _algorithm(compressed, inputs)
    y = _multiply(compressed, inputs, bias=bias, transpose_result=True, alg_id=algorithm)[: len(flat)]
    return layer.stored.add_adapters(y, flat).view(*x.shape[:-1], packed.format.rows)


@cache
def _launcher(device_index: int) -> driver.Launcher:
    defines = {"BFLOAT16": 1, "ARCH": 10 * torch.cuda.get_device_capability(device_index)[0]}
    module = driver.load(source("compress.cu"), KERNEL_NAME, device_index, defines)
    return module.function(KERNEL_NAME).prepare([_Arguments])


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
        known[tokens] = int(_search(compressed, inputs, None, None, None, True)[0])
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
    return refuses_machine(spec, dtype, device) or _refuses_format(spec) or _refuses_library(device)


def _refuses_format(spec: LinearFormat) -> str | None:
    weight = spec.weight
    if weight.sparsity != NM(2, 4):
        return f"computes 2:4 weights, not {weight.describe()}"
    if weight.dtype != torch.bfloat16:
        return "is for bfloat16: with float16 the library was seen to execute illegal instructions"
    if weight.rows % BLOCK_ROWS or weight.columns % BLOCK_COLUMNS:
        return f"needs multiples of {BLOCK_ROWS} rows and {BLOCK_COLUMNS} columns"
    if weight.group is not None and weight.group % 16:
        return f"knows groups of a multiple of 16 columns, not {weight.group}"
    for factor in (spec.left, spec.right):
        if factor is not None:
            if factor.dtype != weight.dtype:
                return "needs a weight and adapters of one dtype"
            if reason := refuses_weight(factor):
                return reason
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
    rows, columns = 3 * BLOCK_ROWS, 7 * BLOCK_COLUMNS
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
    if ours is None or ours.shape != theirs.shape or not torch.equal(ours.view(torch.int16), theirs.view(torch.int16)):
        return f"cuSPARSELt {torch.backends.cusparselt.version()} has another form than the one known here"
    return None


CUSPARSELT = Kernel("cusparselt", _accepts, prepare, run)
