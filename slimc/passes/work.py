"""A site while its passes run: the dense weight, and how it is expressed so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimc.errors import RecipeError
from slimc.passes.report import SiteRow
from slimc.passes.solvers.gptq import ChooseWidths
from slimc.passes.solvers.hessian import Metric
from slimc.passes.solvers.quantization import Quantized
from slimc.passes.statistics import InputStatistics, Shortfall
from slimc.runtime.activations import refuses_codes, round_tokens
from slimc.runtime.packing import NM, PackedBinary, PackedLinear, PackedWeight, Unstructured, pack_signs, pack_weight

Quantizer = Callable[[Tensor, Tensor | None], Quantized]
"""Puts a float32 ``[rows, columns]`` weight on a grid; the mask says which entries count."""


@dataclass
class SiteWork:
    """The working state of one site; every matrix is float32 ``[out_features, in_features]``.

    The weight is expressed as ``base * input_scale + left @ right``, plus a binary part if there is one, where ``base``
    may read rounded inputs. ``base`` is what will be stored: on the grid of ``quantized`` if there is one, zero outside
    ``mask`` if there is one.

    Attributes:
        name: of the site.
        dense: the exact weight.
        dtype: of the stored 16-bit values and scales.
        statistics: of the site's input; ``None`` when no pass of the recipe needs them.
        held_out: sample and channel sums of batches that no choice was fitted to, to judge choices by; ``None``
            without such batches, or where none of them arrived.
        base: the part that is stored as values.
        target: what ``base`` and the adapters shall amount to; the dense weight unless a pass moves it.
        shortfalls: what is missing in the sum that the site's result is added to, at fitted and at held-out tokens.
        siblings: brings the dense weights of all sites that read the same input, this one too, in their own dtypes.
        quantizer: how ``base`` was quantised, so that it can be done again after the adapters are known.
        adapters: the low-rank factors, as floats or as codes.
        choose_widths: chooses the width of each group of ``width_group`` columns; ``None`` if all have the same.
        activation: what the inputs of ``base`` shall be rounded to, one of `slimc.runtime.formats.ACTIVATIONS`.
        binary: where a sign is negative, bool ``[rows, columns]``, and the factors of the magnitude of the signs,
            float32 numbers that ``dtype`` can hold.
        compression_ratio: as the literature counts it, where a pass was asked for one.
        fallback: what a pass did in place of what it was asked for, and why.
        own_bias: brings the bias that the site adds, in its own dtype, if it alone adds it, or else why there is none
            to change.
        bias: what the site adds in place of it.
        shift: by how much that is more, float32 ``[out_features]``.
    """

    name: str
    dense: Tensor
    dtype: torch.dtype
    statistics: InputStatistics | None
    siblings: Callable[[], list[Tensor]]
    target: Tensor = field(init=False)
    base: Tensor = field(init=False)
    mask: Tensor | None = None
    sparsity: NM | Unstructured | None = None
    quantized: Quantized | None = None
    quantizer: Quantizer | None = None
    held_out: InputStatistics | None = None
    shortfalls: tuple[Shortfall | None, Shortfall | None] = (None, None)
    input_scale: Tensor | None = None
    adapters: tuple[Tensor | Quantized, Tensor | Quantized] | None = None
    choose_widths: ChooseWidths | None = None
    width_group: int | None = None
    activation: str | None = None
    binary: tuple[Tensor, Tensor, Tensor] | None = None
    compression_ratio: float | None = None
    fallback: str | None = None
    own_bias: Callable[[], tuple[Tensor | None, str | None]] = lambda: (None, "it has no bias")
    bias: Tensor | None = None
    shift: Tensor | None = None
    _gridded: tuple[Tensor, Quantized] | None = None

    def __post_init__(self) -> None:
        """Start from the dense weight itself."""
        self.base = self.target = self.dense

    def part(
        self,
        name: str,
        rows: slice,
        *,
        siblings: Callable[[], list[Tensor]],
        own_bias: Callable[[], tuple[Tensor | None, str | None]],
    ) -> SiteWork:
        """Return one of the sites whose weights are below each other in this one, in its present state."""

        def factor(left: Tensor | Quantized) -> Tensor | Quantized:
            return left.rows(rows) if isinstance(left, Quantized) else left[rows]

        part = SiteWork(
            name=name,
            dense=self.dense[rows],
            dtype=self.dtype,
            statistics=self.statistics,
            siblings=siblings,
            own_bias=own_bias,
            held_out=self.held_out,
            mask=None if self.mask is None else self.mask[rows],
            sparsity=self.sparsity,
            quantized=None if self.quantized is None else self.quantized.rows(rows),
            quantizer=self.quantizer,
            input_scale=self.input_scale,
            adapters=None if self.adapters is None else (factor(self.adapters[0]), self.adapters[1]),
            choose_widths=self.choose_widths,
            width_group=self.width_group,
            activation=self.activation,
            binary=None if self.binary is None else (self.binary[0][rows], self.binary[1][rows], self.binary[2]),
            compression_ratio=self.compression_ratio,
            fallback=self.fallback,
        )
        part.base = self.base[rows]
        part.target = part.dense if self.target is self.dense else self.target[rows]
        return part

    @property
    def scale_dtype(self) -> torch.dtype:
        """The precision in which scales are solved: that of the weight, but no more than float32."""
        return torch.float32 if self.dtype == torch.float64 else self.dtype

    @property
    def reached(self) -> bool:
        """Whether calibration saw anything but zeros here; if not, its statistics say nothing about the inputs."""
        return self.statistics is None or not self.statistics.is_silent

    @property
    def unrounded(self) -> str | None:
        """Why the inputs stay as they are although ``activation`` asks for rounding; ``None`` if they do not."""
        if self.activation is None:
            return None
        grid = self.quantized
        if grid is None:
            return refuses_codes(None, False, self.activation)
        return refuses_codes(grid.bits, grid.zero_point is not None, self.activation)

    @property
    def rounding(self) -> str | None:
        """What the inputs of ``base`` are rounded to."""
        return None if self.unrounded else self.activation

    def require_statistics(self, name: str) -> InputStatistics:
        """Return the input statistics that the pass ``name`` declared to need."""
        if self.statistics is None:
            raise RecipeError(f"{name} needs the statistics of '{self.name}': put calibrate before it.")
        return self.statistics

    def require_gram(self, name: str) -> Tensor:
        """Return the Gram matrix of the input that the pass ``name`` declared to need."""
        gram = self.require_statistics(name).gram
        if gram is None:
            raise RecipeError(f"{name} needs the Gram matrix of the input of '{self.name}': put calibrate before it.")
        return gram

    def note(self, fallback: str) -> None:
        """Say in the report what a pass did in place of what it was asked for, and why."""
        said = [] if self.fallback is None else self.fallback.split("; ")
        self.fallback = "; ".join(dict.fromkeys([*said, fallback]))

    def require_metric(self, name: str, damping: float) -> Metric:
        """Return the damped Gram matrix of the input as a norm; the pass ``name`` declared to need it."""
        metric = self.require_statistics(name).metric(damping)
        if metric is None:
            raise RecipeError(f"{name} needs the Gram matrix of the input of '{self.name}': put calibrate before it.")
        return metric

    def grid_for(self, weight: Tensor) -> Quantized | None:
        """Return the grid that the quantiser of this site gives ``weight``, none of it pruned; ``None`` without one."""
        if self.quantizer is None:
            return None
        if self._gridded is None or self._gridded[0] is not weight:
            self._gridded = weight, self.quantizer(weight, None)
        return self._gridded[1]

    def quantize(self) -> None:
        """Put ``base`` on the grid again, with the quantiser of this site."""
        if self.quantizer is None:
            self.base = self.base.to(self.dtype).float()
            return
        if self.mask is None:
            # Whoever solves this weight once more finds its grid.
            self._gridded = self.base, self.quantizer(self.base, None)
            self.quantized = self._gridded[1]
        else:
            self.quantized = self.quantizer(self.base, self.mask)
        self.base = self.quantized.dequantize()
        if self.mask is not None:
            self.base = self.base * self.mask

    def effective_base(self) -> Tensor:
        """Return what the stored values and the signs amount to on the unscaled input."""
        base = self.base if self.input_scale is None else self.base * self.input_scale
        return base if self.binary is None else base + self.binary_part()

    def binary_part(self) -> Tensor:
        """Return the signs with their magnitude as they will be decoded, or zeros."""
        if self.binary is None:
            return torch.zeros_like(self.dense)
        negative, left, right = self.binary
        magnitude = left @ right
        return torch.where(negative, -magnitude, magnitude)

    def correction(self) -> Tensor:
        """Return ``left @ right`` as it will be decoded, or zeros."""
        if self.adapters is None:
            return torch.zeros_like(self.dense)
        left, right = self.adapters
        return _dense(left) @ _dense(right)

    def pack(self) -> PackedLinear:
        """Return the packed form of what has been reached."""
        left, right = (None, None) if self.adapters is None else (self._pack_factor(factor) for factor in self.adapters)
        return PackedLinear(
            weight=self._pack_base(),
            left=left,
            right=right,
            input_scale=None if self.input_scale is None else self.input_scale.to(self.dtype),
            activation=self.rounding,
            binary=self._pack_binary(),
        )

    def row(self, packed: PackedLinear) -> SiteRow:
        """Return the report row of ``packed``, its errors measured on the decoded weight."""
        decoded, base = packed.decode(), packed.decode_base().float()
        rows, columns = self.dense.shape
        return SiteRow(
            name=self.name,
            shape=(rows, columns),
            expression=packed.format.describe(),
            bits=packed.format.bits_per_weight(),
            weight_error=_relative(decoded - self.dense, self.dense),
            base_output_error=self.output_error(base, self.statistics),
            output_error=self.output_error(decoded, self.statistics),
            held_out_error=self.output_error(decoded, self.held_out),
            stream_error=self._stream_error(decoded, self.statistics, None),
            unrounded=self.unrounded,
            compression_ratio=self.compression_ratio,
            fallback=self.fallback,
        )

    def _pack_base(self) -> PackedWeight:
        quantized = self.quantized
        return pack_weight(
            self.base.to(self.dtype) if quantized is None else quantized.codes,
            bits=None if quantized is None else quantized.bits,
            scale=None if quantized is None else quantized.scale.to(self.dtype),
            zero_point=None if quantized is None else quantized.zero_point,
            group=None if quantized is None else _group_columns(quantized),
            mask=self.mask,
            sparsity=self.sparsity,
            widths=None if quantized is None else quantized.group_widths(),
        )

    def _pack_binary(self) -> PackedBinary | None:
        if self.binary is None:
            return None
        negative, left, right = self.binary
        return PackedBinary(pack_signs(negative), left.to(self.dtype), right.to(self.dtype))

    def _pack_factor(self, factor: Tensor | Quantized) -> PackedWeight:
        if isinstance(factor, Quantized):
            return pack_weight(
                factor.codes,
                bits=factor.bits,
                scale=factor.scale.to(self.dtype),
                zero_point=factor.zero_point,
                group=_group_columns(factor),
            )
        return pack_weight(factor.to(self.dtype), bits=None)

    def output_error(self, weight: Tensor, statistics: InputStatistics | None) -> float | None:
        """Return ``|X (weight - dense)^T| / |X dense^T|`` on the sampled tokens of ``statistics``, if there are any.

        The numerator counts the rounding of the inputs in.
        """
        if statistics is None:
            return None
        # Passes that only look at sites leave all of them as they are, which products need not find out.
        if self.rounding is None and self.shift is None and torch.equal(weight, self.dense):
            return 0.0
        return _relative(self.output_difference(weight, statistics.sample), statistics.sample @ self.dense.t())

    def output_difference(self, weight: Tensor, inputs: Tensor) -> Tensor:
        """Return ``X (weight - dense)^T`` for inputs ``[tokens, in_features]``, their rounding counted in."""
        return inputs @ (weight - self.dense).t() + self._rounding_noise(inputs) + self._shift()

    def _shift(self) -> Tensor | float:
        """Return what the outputs have more for the bias that is added to them."""
        return 0.0 if self.shift is None else self.shift

    def _rounding_noise(self, sample: Tensor) -> Tensor | float:
        """Return by how much rounding changes the outputs of ``base`` and the adapters on sampled inputs."""
        if self.rounding is None:
            return 0.0
        exact = sample.to(self.dtype)
        rounded = self.base + self.correction()
        if self.input_scale is not None:
            exact = exact * self.input_scale.to(self.dtype)
            rounded = self.base
        return (round_tokens(exact, self.rounding).float() - exact.float()) @ rounded.t()

    def judge(self, weight: Tensor) -> float | None:
        """Return the error of ``weight`` on held-out tokens, ``None`` without them.

        Where the target was moved toward the output of the dense model, that output is what counts.
        """
        if self.held_out is None or self.target is self.dense:
            return self.output_error(weight, self.held_out)
        return self._stream_error(weight, self.held_out, self.shortfalls[1])

    def _stream_error(
        self, weight: Tensor, statistics: InputStatistics | None, shortfall: Shortfall | None
    ) -> float | None:
        """Return the error against the output of the dense model, the errors of earlier sites included."""
        if statistics is None or statistics.dense_sample is None:
            return None
        exact = statistics.dense_sample @ self.dense.t()
        sample = statistics.sample
        wanted = exact if shortfall is None else exact + shortfall.sample
        return _relative(sample @ weight.t() - wanted + self._rounding_noise(sample) + self._shift(), exact)


def _dense(factor: Tensor | Quantized) -> Tensor:
    return factor.dequantize() if isinstance(factor, Quantized) else factor.float()


def _relative(difference: Tensor, exact: Tensor) -> float:
    """Return the ratio of two Frobenius norms; they are summed in float64, where no square of a float32 overflows."""
    size, error = (float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in (exact, difference))
    return error / size if size else error


def _group_columns(quantized: Quantized) -> int | None:
    return quantized.group if isinstance(quantized.group, int) else None
