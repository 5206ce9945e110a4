"""A decoding step of a Llama as slimc runs it, kernel for kernel, with launch shapes of choice for one linear layer.

Behind its like, as ``slimc bench linear`` measures it, a layer begins while the one before ends. In a model it follows
a norm, a gate or attention, which have the device to themselves for a while: other shapes take the least time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from slimc.backends.cuda import stream
from slimc.backends.cuda.attention import attend_next
from slimc.backends.cuda.between import add_norm, gate_by
from slimc.backends.cuda.layer import FragmentLayer
from slimc.backends.cuda.shapes import LaunchShape
from slimc.bench.linear import DTYPE, microseconds

__all__ = ["DECODERS", "Pair", "Step"]

DECODERS = 4
"""Layers of the decoder that are run in turn: of the smallest model, more than the cache holds."""

CACHE_LENGTH, HEAD = 640, 128
"""Tokens that attention may read, and numbers of a head, in every Llama that is measured."""

EPSILON = 1e-5
"""Of a norm."""

Pair = tuple[LaunchShape, LaunchShape]
"""Shapes of a layer's launch and of the one for t."""


class Step:
    """A new token for each of some sequences.

    Args:
        layers: q, k and v as ``qkv``, then ``o``, gate and up as ``gate_up``, and ``down``: some of each, which
            decoders take in turn.
        rows: of q, of k and of v, whose heads have `HEAD` rows each.
        name: of the layer whose launch shapes vary.
    """

    def __init__(self, layers: Mapping[str, Sequence[FragmentLayer]], rows: Sequence[int], name: str) -> None:
        self._layers, self._rows, self._name = layers, list(rows), name

    def time(self, pair: Pair, sequences: int, replays: int) -> float:
        """Return microseconds of one decoder, one layer of which is launched in a pair of shapes."""
        return microseconds([self.decoder(index, pair, sequences) for index in range(DECODERS)], replays)

    def decoder(self, index: int, pair: Pair, sequences: int) -> partial[Tensor]:
        """Return a call of the decoder of a number."""
        launches = {}
        for one, layers in self._layers.items():
            layer = layers[index % len(layers)]
            plan = stream.make_plan(layer, DTYPE, sequences, *(pair if one == self._name else ()))
            launches[one] = partial(stream.launch, plan, layer=layer, bias=None)
        columns, heads = self._layers["qkv"][0].format.columns, self._rows[1] // HEAD
        x, residual = torch.randn(2, sequences, columns, dtype=DTYPE, device="cuda").unbind()
        keys, values = torch.randn(2, sequences, heads, CACHE_LENGTH, HEAD, dtype=DTYPE, device="cuda").unbind()
        ones = torch.ones(columns, dtype=DTYPE, device="cuda")
        position = torch.tensor(CACHE_LENGTH - 1, device="cuda")
        return partial(self._decode, launches, x, residual, ones, keys, values, position)

    def _decode(
        self,
        launches: Mapping[str, partial[Tensor]],
        x: Tensor,
        residual: Tensor,
        ones: Tensor,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
    ) -> Tensor:
        # Numbers make no difference: all norms' weights, and all turns of q and k, are 1.
        turn = ones[:HEAD].view(1, 1, 1, HEAD)
        residual, x = add_norm(x, residual, ones, EPSILON)
        parts = launches["qkv"](x).split(self._rows, -1)
        q, k, v = (part.view(len(x), 1, -1, HEAD).transpose(1, 2) for part in parts)
        x = attend_next(q, k, v, turn, turn, keys, values, position, None, HEAD**-0.5)
        x = launches["o"](x.transpose(1, 2).reshape(len(x), -1))
        residual, x = add_norm(x, residual, ones, EPSILON)
        gate, up = launches["gate_up"](x).chunk(2, -1)
        return launches["down"](gate_by(gate, up))
