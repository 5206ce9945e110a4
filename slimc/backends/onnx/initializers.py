"""Constants of an ONNX graph that are made when they are written, so that no two of them are in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto
from torch import Tensor

from slimc.runtime.bits import pack_bits

__all__ = ["BITS", "DATA_TYPES", "Bytes", "Initializer", "bytes_of", "of_codes", "of_tensor"]

Bytes = npt.NDArray[np.uint8]
"""What a tensor is in a file: little endian, and elements of less than a byte packed from the lowest bits up."""

DATA_TYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}
"""The number that ONNX gives to a type of PyTorch's."""

BITS: dict[int, int] = {
    **{number: 8 * dtype.itemsize for dtype, number in DATA_TYPES.items()},
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    # Types of onnx 1.20 and later; older ones never meet these numbers.
    **{number: 2 for name in ("INT2", "UINT2") if (number := getattr(TensorProto, name, 0))},
}
"""Bits that one element of a type takes in a file."""


@dataclass(frozen=True)
class Initializer:
    """A constant whose content is made each time it is asked for.

    Attributes:
        data_type: one of the numbers in `BITS`.
        dims: its shape.
        make: returns the content, `nbytes` long.
    """

    data_type: int
    dims: tuple[int, ...]
    make: Callable[[], Bytes]

    @cached_property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return (prod(self.dims) * BITS[self.data_type] + 7) // 8

    def content(self) -> Bytes:
        """Make the content; raise `ValueError` if it is not as long as type and shape say, which is a bug."""
        made = self.make()
        if made.nbytes != self.nbytes:
            raise ValueError(f"a constant of {self.dims} was made of {made.nbytes} bytes, not of {self.nbytes}")
        return made

    def proto(self, name: str) -> TensorProto:
        """Return the constant with its content inside, for graphs that are small."""
        return TensorProto(name=name, data_type=self.data_type, dims=self.dims, raw_data=self.content().tobytes())

    def external_proto(self, name: str, location: str, offset: int) -> TensorProto:
        """Return the constant with its content in the file ``location``, from ``offset`` on."""
        proto = TensorProto(name=name, data_type=self.data_type, dims=self.dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(self.nbytes))):
            proto.external_data.add(key=key, value=value)
        return proto


def of_tensor(tensor: Tensor, dtype: torch.dtype | None = None, *, transposed: bool = False) -> Initializer:
    """Return a tensor as a constant, cast to ``dtype`` if there is one, and as [columns, rows] if ``transposed``."""
    kept = dtype or tensor.dtype
    shape = tuple(reversed(tensor.shape)) if transposed else tuple(tensor.shape)

    def make() -> Bytes:
        value = tensor.detach().to("cpu", kept)
        return bytes_of(value.t() if transposed else value)

    return Initializer(DATA_TYPES[kept], shape, make)


def of_codes(data_type: int, dims: tuple[int, ...], codes: Callable[[], Tensor]) -> Initializer:
    """Return integer codes as a constant.

    Args:
        data_type: of the constant, at most 8 bits wide.
        dims: its shape.
        codes: returns them, uint8 and of that shape; the lowest bits of each are stored.
    """
    bits = BITS[data_type]

    def make() -> Bytes:
        flat = codes().flatten()
        return bytes_of(flat if bits == 8 else pack_bits(flat & ((1 << bits) - 1), bits))

    return Initializer(data_type, dims, make)


def bytes_of(tensor: Tensor) -> Bytes:
    """Return the bytes of a tensor in main memory."""
    content: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return content
