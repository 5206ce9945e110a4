"""The rules of ``fuse``: storage ops, product and adapters of a site become one ``slim.linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from slimc.ir.match import Anything, Call, Match, OneOf, Pattern, arguments
from slimc.ir.rules import Rule
from slimc.runtime.ops import LINEAR_TENSORS

aten = torch.ops.aten
slim = torch.ops.slim

_STORAGE_OPS = (slim.dequant.default, slim.dequant_nm.default, slim.dequant_mask.default)
_STORED = Call(_STORAGE_OPS, name="weight", shareable=True)
_STORED_TRANSPOSED = Call((aten.t.default,), {"self": _STORED}, shareable=True)


def _product_of(activation: Pattern) -> tuple[Pattern, ...]:
    """Return the four forms of a product whose weight is in a storage form."""
    bias = Anything("bias")
    return (
        Call((aten.linear.default,), {"weight": _STORED, "input": activation, "bias": bias}),
        Call((aten.addmm.default,), {"mat2": _STORED_TRANSPOSED, "mat1": activation, "self": bias}),
        Call((aten.mm.default,), {"mat2": _STORED_TRANSPOSED, "self": activation}),
        Call((aten.matmul.default,), {"other": _STORED_TRANSPOSED, "self": activation}),
    )


_PLAIN = Anything("x")
_SCALED = Call(
    (aten.mul.Tensor,),
    {"self": Anything("x"), "other": Anything("input_scale")},
    shareable=True,
)


def _rounded(x: Pattern) -> Pattern:
    return Call((slim.round_activations.default,), {"x": x, "activation": Anything("activation")}, shareable=True)


_ROUNDED, _SCALED_AND_ROUNDED = _rounded(_PLAIN), _rounded(_SCALED)
_OF_SCALED = (*_product_of(_SCALED_AND_ROUNDED), *_product_of(_SCALED))
_PRODUCT = OneOf((*_OF_SCALED, *_product_of(_ROUNDED), *_product_of(_PLAIN)))


class FuseLinear(Rule):
    """``linear(round_activations(x * s), dequant(values, ...), b)  ->  slim.linear(x, values, ..., s, b)``.

    Scaling and rounding are taken in where they are there.
    """

    def pattern(self) -> Pattern:
        """A product whose weight is in a storage form."""
        return _PRODUCT

    def check(self, found: Match) -> None:
        """A multiplication is taken in only if it belongs to the storage form."""
        _require_own_scale(found)

    def rewrite(self, graph: fx.Graph, found: Match) -> fx.Node:
        """One ``slim.linear`` without adapters."""
        return _fused(graph, found, {"rank": 0} | _factor("left", None) | _factor("right", None))


class FuseLowRank(Rule):
    """``linear(x * s, dequant(values, ...), b) + low_rank(x, l, r)  ->  slim.linear(x, values, ..., s, l, r, b)``.

    The product may read ``x * s`` rounded. Without a scale both may read x rounded, but not one alone.
    """

    benefit = 2
    near = 3

    def pattern(self) -> Pattern:
        """The sum of a product and of adapters that read the same input, unscaled."""
        factors = {"left": Anything("left"), "right": Anything("right")}

        def total(products: tuple[Pattern, ...], x: Pattern) -> Pattern:
            adapters = Call((slim.low_rank.default,), {"x": x, **factors})
            return Call(
                (aten.add.Tensor,),
                {"self": OneOf(products), "other": adapters, "alpha": Anything("alpha")},
                commutes=("self", "other"),
            )

        rounded = total(_product_of(_ROUNDED), _ROUNDED)
        return OneOf((rounded, total((*_OF_SCALED, *_product_of(_PLAIN)), _PLAIN)))

    def check(self, found: Match) -> None:
        """The factors must be constants, plain or in the dense symmetric storage form, and added as they are."""
        _require_own_scale(found)
        found.require(found["alpha"] == 1, f"the adapters are added {found['alpha']} times")
        for side in ("left", "right"):
            factor = found[side]
            stored = factor.target is slim.dequant.default
            found.require(factor.op == "get_attr" or stored, f"the {side} factor is neither a constant nor its dequant")
            found.require(not stored or arguments(factor)["zero_point"] is None, f"the {side} factor has a zero point")

    def rewrite(self, graph: fx.Graph, found: Match) -> fx.Node:
        """One ``slim.linear`` with adapters."""
        rank = int(found["right"].meta["val"].shape[0])
        return _fused(graph, found, {"rank": rank} | _factor("left", found["left"]) | _factor("right", found["right"]))


class FuseSigns(Rule):
    """``slim.linear(x, values, ...) + sign_low_rank(x, signs, u, v)  ->  slim.linear(x, values, ..., signs, u, v)``."""

    near = 3

    def pattern(self) -> Pattern:
        """The sum of a fused linear and of a binary part that reads the same input."""
        factors = {"signs": Anything("signs"), "left": Anything("sign_left"), "right": Anything("sign_right")}
        signs = Call((slim.sign_low_rank.default,), {"x": Anything("x"), **factors})
        fused = Call((slim.linear.default,), {"x": Anything("x")}, name="linear")
        return Call(
            (aten.add.Tensor,),
            {"self": fused, "other": signs, "alpha": Anything("alpha")},
            commutes=("self", "other"),
        )

    def check(self, found: Match) -> None:
        """The parts must be constants, added once, to a linear that has none of its own."""
        found.require(found["alpha"] == 1, f"the binary part is added {found['alpha']} times")
        for name in ("signs", "sign_left", "sign_right"):
            found.require(getattr(found[name], "op", None) == "get_attr", f"{name} is not a constant")
        own = arguments(found["linear"])["signs"]
        found.require(own is None, "the linear has a binary part already")

    def rewrite(self, graph: fx.Graph, found: Match) -> fx.Node:
        """One ``slim.linear`` with a binary part."""
        given = arguments(found["linear"])
        given |= {name: found[name] for name in ("signs", "sign_left", "sign_right")}
        tensors = [given.pop(name) for name in ("x", *LINEAR_TENSORS, "bias")]
        return graph.call_function(slim.linear.default, tuple(tensors), given)


FUSION_RULES: tuple[Rule, ...] = (FuseLowRank(), FuseLinear(), FuseSigns())


def _require_own_scale(found: Match) -> None:
    """The input scale must be the constant stored beside the weight's values, not a multiplication of the model's."""
    scale = found["input_scale"]
    values = arguments(found["weight"])["values"]
    own = str(values.target).removesuffix("values") + "input_scale"
    found.require(
        scale is None or (isinstance(scale, fx.Node) and scale.op == "get_attr" and scale.target == own),
        "its input is multiplied by something other than the input scale that is stored with the weight",
    )


def _factor(side: str, node: fx.Node | None) -> dict[str, Any]:
    """Return the tensors and attributes of one factor, under the names of ``slim.linear``."""
    stored = arguments(node) if node is not None and node.op == "call_function" else {}
    return {
        f"{side}_values": stored.get("values", node),
        f"{side}_scale": stored.get("scale"),
        f"{side}_bits": stored.get("bits", 0),
        f"{side}_group": stored.get("group", 0),
    }


def _fused(graph: fx.Graph, found: Match, adapters: dict[str, Any]) -> fx.Node:
    given = {"n": 0, "m": 0} | arguments(found["weight"]) | {"input_scale": found["input_scale"]} | adapters
    given |= {"activation": found["activation"] or 0}
    if not given.get("widths"):
        given.pop("widths", None)
    tensors = [found["x"], *(given.pop(name, None) for name in LINEAR_TENSORS), found["bias"]]
    return graph.call_function(slim.linear.default, tuple(tensors), given)
