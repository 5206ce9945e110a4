"""How a weight is stored, without the bytes: the formats that files, modules and kernels agree on.

A weight of ``rows`` x ``columns`` is stored as codes of ``bits`` bits with scales, or (``bits`` None) as plain
floating point values; with a sparsity only the kept positions are stored, beside a bit mask. A linear layer adds
an optional pair of low-rank factors, an optional scale for each input column, what its inputs are rounded to, and an
optional binary part.
Every format can be built from untrusted JSON: whatever is not a valid format raises `FormatError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from slimc.errors import FormatError, closest
from slimc.runtime.bits import stream_bytes

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""The floating point types of scales and of values that are not quantised, by the name used in JSON."""

ACTIVATIONS: Mapping[str, int] = {"int8": 1, "float8_e4m3fn": 2}
"""What the inputs of a layer may be rounded to: the name used in JSON, and the number used as an attribute of ops."""

_SHORT_ACTIVATIONS = {"int8": "int8", "float8_e4m3fn": "fp8"}

_SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_SIDE = 2**31
"""No side of a real weight is longer; a larger number in a file is corruption or malice."""

MAX_WEIGHTS = 2**40
"""The same limit for rows times columns."""

TensorSpecs = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""For each stored tensor its shape and dtype."""


@dataclass(frozen=True)
class NM:
    """N:M sparsity: exactly ``n`` of every ``m`` consecutive columns are kept."""

    n: int
    m: int

    def __post_init__(self) -> None:
        """Reject patterns that keep nothing or everything."""
        if not 0 < self.n < self.m <= MAX_SIDE:
            raise FormatError(f"{self.n}:{self.m} is not an N:M sparsity: 0 < N < M must hold")

    def __str__(self) -> str:
        """The usual notation, such as ``2:4``."""
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Unstructured:
    """Sparsity without a pattern: any position may be kept."""

    def __str__(self) -> str:
        """The name used in JSON."""
        return "unstructured"


Sparsity = NM | Unstructured | None


@dataclass(frozen=True)
class WeightFormat:
    """The storage form of one matrix.

    Attributes:
        rows: Output features.
        columns: Input features.
        bits: Bits a code, 2 to 8, or None for floating point values; the widest ones where groups have ``widths``.
        group: Columns that share a scale (the last group of a row may be short); None means all columns.
        per_tensor: One scale for the whole matrix, of shape [1, 1].
        asymmetric: A zero point is stored for every scale; otherwise the zero point is ``2 ** (bits - 1)``.
        sparsity: Which positions are stored; None stores all.
        nonzeros: How many values an `Unstructured` weight stores; None otherwise.
        dtype: Type of the scales, or of the values when ``bits`` is None.
        widths: Bits a code, 1 to 8, of each group of columns, shared by all rows; None if all have ``bits``. A code of
            1 bit is a sign: it stands for ``(2 * code - 1) * scale`` and has no zero point (0 is stored).
    """

    rows: int
    columns: int
    bits: int | None = None
    group: int | None = None
    per_tensor: bool = False
    asymmetric: bool = False
    sparsity: Sparsity = None
    nonzeros: int | None = None
    dtype: torch.dtype = torch.float32
    widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check that the fields describe something that can exist; raise `FormatError` otherwise."""
        for name in ("rows", "columns"):
            side = getattr(self, name)
            if not 0 < side <= MAX_SIDE:
                raise FormatError(f"a weight cannot have {side} {name}: between 1 and {MAX_SIDE} are possible")
        if self.rows * self.columns > MAX_WEIGHTS:
            raise FormatError(f"a weight of {self.rows} x {self.columns} is larger than {MAX_WEIGHTS} elements")
        if self.dtype not in _DTYPE_NAMES:
            raise FormatError(f"scales and values cannot be {self.dtype}: use one of {', '.join(DTYPES)}")
        self._check_scales()
        self._check_sparsity()
        self._check_widths()

    def _check_scales(self) -> None:
        if self.bits is None:
            if self.group is not None or self.per_tensor or self.asymmetric:
                raise FormatError("group, per_tensor and asymmetric describe scales, but without bits there are none")
            return
        if not (1 if self.widths is not None else 2) <= self.bits <= 8:
            raise FormatError(f"codes cannot have {self.bits} bits: 2 to 8 are possible")
        if self.group is not None and not 0 < self.group <= MAX_SIDE:
            raise FormatError(f"a group cannot have {self.group} columns")
        if self.group is not None and self.per_tensor:
            raise FormatError(f"one scale per tensor excludes groups of {self.group} columns")

    def _check_sparsity(self) -> None:
        if isinstance(self.sparsity, NM) and self.columns % self.sparsity.m:
            raise FormatError(
                f"{self.sparsity} sparsity does not divide {self.columns} columns: the width must be a multiple "
                f"of {self.sparsity.m}"
            )
        if isinstance(self.sparsity, Unstructured) != (self.nonzeros is not None):
            raise FormatError("nonzeros is the number of values of an unstructured weight, and of no other")
        if self.nonzeros is not None and not 0 <= self.nonzeros <= self.rows * self.columns:
            raise FormatError(f"{self.nonzeros} values cannot be stored of {self.rows} x {self.columns}")

    def _check_widths(self) -> None:
        if self.widths is None:
            return
        if self.group is None:
            raise FormatError("widths belong to groups of columns, but the weight has none")
        if len(self.widths) != self.scale_shape[1]:
            raise FormatError(f"{len(self.widths)} widths do not describe {self.scale_shape[1]} groups of columns")
        if not 1 <= min(self.widths) <= max(self.widths) <= 8:
            raise FormatError(f"codes of {min(self.widths)} to {max(self.widths)} bits: 1 to 8 are possible")
        if self.bits != max(self.widths):
            raise FormatError(f"the widest codes have {max(self.widths)} bits, but the weight says {self.bits}")
        if isinstance(self.sparsity, Unstructured) or (isinstance(self.sparsity, NM) and self.group % self.sparsity.m):
            raise FormatError(
                f"groups of {self.group} columns with widths of their own do not go with {self.sparsity} sparsity: "
                "each must keep the same number of values in every row"
            )

    @property
    def stored_per_row(self) -> int:
        """Values stored for each row; meaningless for an unstructured weight."""
        return self.columns // self.sparsity.m * self.sparsity.n if isinstance(self.sparsity, NM) else self.columns

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Shape of ``scale`` and of ``zero_point``."""
        if self.per_tensor:
            return (1, 1)
        return (self.rows, 1 if self.group is None else -(-self.columns // self.group))

    def group_streams(self) -> list[tuple[int, int]]:
        """Return for each group of columns with a width of its own how many codes a row stores, and their bits.

        Each is a bit stream of its own in every row, which starts on a byte; they follow each other.
        """
        if self.widths is None or self.group is None:
            return []
        sizes = [min(self.group, self.columns - start) for start in range(0, self.columns, self.group)]
        if isinstance(self.sparsity, NM):
            sizes = [size // self.sparsity.m * self.sparsity.n for size in sizes]
        return list(zip(sizes, self.widths, strict=True))

    def tensor_specs(self) -> TensorSpecs:
        """Return shape and dtype of every tensor of a `PackedWeight` of this format, in storage order."""
        if self.bits is None:
            shape = (self.rows, self.stored_per_row) if self.nonzeros is None else (self.nonzeros,)
            specs: TensorSpecs = {"values": (shape, self.dtype)}
        elif self.widths is not None:
            row_bytes = sum(stream_bytes(count, bits) for count, bits in self.group_streams())
            specs = {"values": ((self.rows, row_bytes), torch.uint8)}
        elif self.nonzeros is None:
            specs = {"values": ((self.rows, stream_bytes(self.stored_per_row, self.bits)), torch.uint8)}
        else:
            specs = {"values": ((stream_bytes(self.nonzeros, self.bits),), torch.uint8)}
        if self.sparsity is not None:
            specs["pattern"] = ((self.rows, stream_bytes(self.columns, 1)), torch.uint8)
        if self.bits is not None:
            specs["scale"] = (self.scale_shape, self.dtype)
            if self.asymmetric:
                specs["zero_point"] = (self.scale_shape, torch.uint8)
        return specs

    def nbytes(self) -> int:
        """Return the bytes of all tensors together."""
        return specs_nbytes(self.tensor_specs())

    def bits_per_weight(self) -> float:
        """Return stored bits divided by rows times columns: values, pattern, scales and zero points."""
        return 8 * self.nbytes() / (self.rows * self.columns)

    def describe(self) -> str:
        """Return the format for people: ``2:4 int4 per tensor``, ``int3/64 asymmetric``, ``50% unstructured bf16``."""
        words = []
        if isinstance(self.sparsity, NM):
            words.append(str(self.sparsity))
        elif self.nonzeros is not None:
            words.append(f"{100 * (1 - self.nonzeros / (self.rows * self.columns)):.4g}% unstructured")
        if self.bits is None:
            words.append(_SHORT_NAMES[self.dtype])
        elif self.widths is not None:
            narrowest = min(self.widths)
            words.append(f"int{self.bits if narrowest == self.bits else f'{narrowest}-{self.bits}'}/{self.group}")
        elif self.group is not None:
            words.append(f"int{self.bits}/{self.group}")
        else:
            words.append(f"int{self.bits} per {'tensor' if self.per_tensor else 'channel'}")
        if self.asymmetric:
            words.append("asymmetric")
        return " ".join(words)

    def to_json(self) -> dict[str, Any]:
        """Return the format as plain JSON types; ``widths``, a digit a group, are left out if there are none."""
        record = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "widths"}
        record |= {
            "sparsity": None if self.sparsity is None else str(self.sparsity),
            "dtype": _DTYPE_NAMES[self.dtype],
        }
        # A digit a group: a list would take three bytes of the description for each.
        return record if self.widths is None else record | {"widths": "".join(map(str, self.widths))}

    @classmethod
    def from_json(cls, record: object) -> WeightFormat:
        """Build a format from untrusted JSON; raise `FormatError` on anything but the form of :meth:`to_json`."""
        names = [field.name for field in fields(cls)]
        entries = _entries(record, names, "weight format", optional=("widths",))
        return cls(
            rows=_integer(entries, "rows"),
            columns=_integer(entries, "columns"),
            bits=_optional_integer(entries, "bits"),
            group=_optional_integer(entries, "group"),
            per_tensor=_boolean(entries, "per_tensor"),
            asymmetric=_boolean(entries, "asymmetric"),
            sparsity=_parse_sparsity(entries["sparsity"]),
            nonzeros=_optional_integer(entries, "nonzeros"),
            dtype=_dtype(entries["dtype"], "weight"),
            widths=_parse_widths(_optional_text(entries, "widths")),
        )


@dataclass(frozen=True)
class BinaryFormat:
    """The storage form of a binary part: one sign a weight, whose magnitude is a matrix of low rank.

    Attributes:
        rows: Output features.
        columns: Input features.
        rank: Of the magnitude, which is ``left @ right`` with ``left`` [rows, rank] and ``right`` [rank, columns].
        dtype: Type of both factors.
    """

    rows: int
    columns: int
    rank: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Check that the rank and the dtype can be; raise `FormatError` otherwise."""
        if not 0 < self.rank <= min(self.rows, self.columns):
            raise FormatError(
                f"the magnitude of a binary part of {self.rows} x {self.columns} cannot have the rank {self.rank}"
            )
        if self.dtype not in _DTYPE_NAMES:
            raise FormatError(f"the magnitude of a binary part cannot be {self.dtype}: use one of {', '.join(DTYPES)}")

    def tensor_specs(self) -> TensorSpecs:
        """Return shape and dtype of every tensor of a `PackedBinary` of this format, in storage order."""
        return {
            "signs": ((self.rows, stream_bytes(self.columns, 1)), torch.uint8),
            "sign_left": ((self.rows, self.rank), self.dtype),
            "sign_right": ((self.rank, self.columns), self.dtype),
        }

    def describe(self) -> str:
        """Return the format for people: ``signs x rank 1 bf16``."""
        return f"signs x rank {self.rank} {_SHORT_NAMES[self.dtype]}"

    def to_json(self) -> dict[str, Any]:
        """Return what does not follow from the weight beside it, as plain JSON types."""
        return {"rank": self.rank, "dtype": _DTYPE_NAMES[self.dtype]}

    @classmethod
    def from_json(cls, record: object, weight: WeightFormat) -> BinaryFormat:
        """Build the format beside ``weight`` from untrusted JSON; raise `FormatError` on anything else."""
        entries = _entries(record, ["rank", "dtype"], "binary format")
        return cls(weight.rows, weight.columns, _integer(entries, "rank"), _dtype(entries["dtype"], "binary"))


@dataclass(frozen=True)
class LinearFormat:
    """The storage form of a linear layer's weight, its adapters and its input scale (the bias is not part of it).

    ``left`` is [rows, rank] and ``right`` [rank, columns]; there are both or neither. ``activation`` is one of
    `ACTIVATIONS`, if what the weight is multiplied by is rounded token by token (`slimc.runtime.activations`), and what
    the adapters are multiplied by unless inputs are scaled first; it takes no space. ``binary`` adds a matrix of signs
    with a magnitude of low rank, if there is one.
    """

    weight: WeightFormat
    left: WeightFormat | None = None
    right: WeightFormat | None = None
    input_scaled: bool = False
    activation: str | None = None
    binary: BinaryFormat | None = None

    def __post_init__(self) -> None:
        """Check that all parts fit the weight and the activation is known; raise `FormatError` otherwise."""
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise FormatError(
                f"inputs cannot be rounded to {self.activation!r}: use one of {', '.join(ACTIVATIONS)}"
                f"{closest(str(self.activation), ACTIVATIONS)}"
            )
        if self.binary is not None and (self.binary.rows, self.binary.columns) != (self.rows, self.columns):
            raise FormatError(
                f"a binary part of {self.binary.rows} x {self.binary.columns} does not fit a weight of "
                f"{self.rows} x {self.columns}"
            )
        if (self.left is None) != (self.right is None):
            raise FormatError("a low-rank correction needs both factors, left and right")
        if self.left is None or self.right is None:
            return
        for name, factor in (("left", self.left), ("right", self.right)):
            if factor.sparsity is not None or factor.asymmetric or factor.widths is not None:
                raise FormatError(
                    f"the {name} factor is {factor.describe()}: factors are dense, symmetric and of one width"
                )
        outer = (self.left.rows, self.right.columns)
        if outer != (self.weight.rows, self.weight.columns) or self.left.columns != self.right.rows:
            raise FormatError(
                f"factors of {self.left.rows} x {self.left.columns} and {self.right.rows} x {self.right.columns} "
                f"do not correct a weight of {self.weight.rows} x {self.weight.columns}"
            )

    @property
    def rows(self) -> int:
        """Output features."""
        return self.weight.rows

    @property
    def columns(self) -> int:
        """Input features."""
        return self.weight.columns

    @property
    def rank(self) -> int:
        """Rank of the correction, 0 without one."""
        return 0 if self.left is None else self.left.columns

    def tensor_specs(self) -> TensorSpecs:
        """Return shape and dtype of every tensor of a `PackedLinear` of this format, under its flat name."""
        specs = self.weight.tensor_specs()
        if self.input_scaled:
            specs["input_scale"] = ((self.columns,), self.weight.dtype)
        for prefix, factor in (("left", self.left), ("right", self.right)):
            if factor is not None:
                specs |= {f"{prefix}_{name}": spec for name, spec in factor.tensor_specs().items()}
        return specs if self.binary is None else specs | self.binary.tensor_specs()

    def nbytes(self) -> int:
        """Return the bytes of all tensors together."""
        return specs_nbytes(self.tensor_specs())

    def bits_per_weight(self) -> float:
        """Return all stored bits, adapters, signs and input scale included, divided by rows times columns."""
        return 8 * self.nbytes() / (self.rows * self.columns)

    def describe(self) -> str:
        """Return the format for people: ``2:4 int4 per tensor, int8 inputs + low-rank 57 int4/64``."""
        text = self.weight.describe()
        if self.activation is not None:
            text += f",{' scaled' if self.input_scaled else ''} {_SHORT_ACTIVATIONS[self.activation]} inputs"
        elif self.input_scaled:
            text += " scaled inputs"
        if self.left is not None and self.right is not None:
            left, right = self.left.describe(), self.right.describe()
            text += f" + low-rank {self.rank} " + (left if left == right else f"{left} x {right}")
        return text if self.binary is None else f"{text} + {self.binary.describe()}"

    def to_json(self) -> dict[str, Any]:
        """Return the format as plain JSON types; ``activation`` and ``binary`` are left out if there are none."""
        record: dict[str, Any] = {
            "weight": self.weight.to_json(),
            "left": None if self.left is None else self.left.to_json(),
            "right": None if self.right is None else self.right.to_json(),
            "input_scaled": self.input_scaled,
        }
        if self.activation is not None:
            record["activation"] = self.activation
        if self.binary is not None:
            record["binary"] = self.binary.to_json()
        return record

    @classmethod
    def from_json(cls, record: object) -> LinearFormat:
        """Build a format from untrusted JSON; raise `FormatError` on anything but the form of :meth:`to_json`."""
        names = [field.name for field in fields(cls)]
        entries = _entries(record, names, "linear format", optional=("activation", "binary"))
        weight = WeightFormat.from_json(entries["weight"])
        binary = entries.get("binary")
        return cls(
            weight=weight,
            left=None if entries["left"] is None else WeightFormat.from_json(entries["left"]),
            right=None if entries["right"] is None else WeightFormat.from_json(entries["right"]),
            input_scaled=_boolean(entries, "input_scaled"),
            activation=_optional_text(entries, "activation"),
            binary=None if binary is None else BinaryFormat.from_json(binary, weight),
        )


def specs_nbytes(specs: TensorSpecs) -> int:
    """Return the bytes that tensors of these shapes and dtypes occupy."""
    total = 0
    for shape, dtype in specs.values():
        elements = 1
        for side in shape:
            elements *= side
        total += elements * dtype.itemsize
    return total


def _entries(record: object, names: list[str], what: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise FormatError(f"a {what} must be a JSON object, not {type(record).__name__}")
    for key in record:
        if key not in names:
            raise FormatError(f"unknown key {key!r} in a {what}{closest(str(key), names)}")
    missing = [name for name in names if name not in record and name not in optional]
    if missing:
        raise FormatError(f"a {what} lacks {', '.join(missing)}")
    return record


def _integer(entries: dict[str, Any], name: str) -> int:
    value = entries[name]
    if type(value) is not int:
        raise FormatError(f"{name} of a weight format must be an integer, not {value!r}")
    return value


def _dtype(name: object, what: str) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        hint = closest(name, DTYPES) if isinstance(name, str) else ""
        raise FormatError(f"dtype of a {what} format is {name!r}: use one of {', '.join(DTYPES)}{hint}")
    return DTYPES[name]


def _optional_integer(entries: dict[str, Any], name: str) -> int | None:
    return None if entries[name] is None else _integer(entries, name)


def _optional_text(entries: dict[str, Any], name: str) -> str | None:
    value = entries.get(name)
    if value is not None and type(value) is not str:
        raise FormatError(f"{name} of a format must be text, not {value!r}")
    return value


def _boolean(entries: dict[str, Any], name: str) -> bool:
    value = entries[name]
    if type(value) is not bool:
        raise FormatError(f"{name} of a format must be true or false, not {value!r}")
    return value


def _parse_widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise FormatError(
            f"widths of a weight format are {text[:40]!r}: a digit for each group of columns was expected"
        )
    return tuple(map(int, text))


def _parse_sparsity(text: object) -> Sparsity:
    if text is None:
        return None
    if text == str(Unstructured()):
        return Unstructured()
    n, separator, m = text.partition(":") if isinstance(text, str) else ("", "", "")
    # At most ten ASCII digits: int() refuses absurdly long numbers with an error of its own.
    if separator and all(len(part) <= 10 and part.isascii() and part.isdigit() for part in (n, m)):
        return NM(int(n), int(m))
    raise FormatError(f"sparsity of a weight format is {text!r}: use 'unstructured' or N:M such as '2:4'")
