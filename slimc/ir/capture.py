"""From a PyTorch module to a :class:`Program`: ``torch.export``, then sites by what the graph does.

Sites are found by the products in the graph, never by module class names: ``aten.linear`` with a constant
weight, and ``addmm`` / ``mm`` / ``matmul`` by a constant matrix (GPT-2's ``Conv1D``). What is not a site is
listed with the reason.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from slimc.errors import CaptureError, RecipeError, closest
from slimc.ir.carrier import CarrierCheck
from slimc.ir.program import LeftAlone, Program, Site, Use, attribute, shared_storage

Batch = tuple[tuple[Any, ...], Mapping[str, Any]]
"""One call of the model: positional and keyword arguments."""

aten = torch.ops.aten

_LINEAR = aten.linear.default
_TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default}
_PRODUCTS = {aten.mm.default: 0, aten.matmul.default: 0, aten.addmm.default: 1}
"""Where a product reads its activation; its weight comes next."""

_EMBEDDINGS = {aten.embedding.default, aten.embedding_bag.default}


def capture(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    dense: Mapping[str, str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Program:
    """Export ``model`` and find its sites.

    Args:
        model: any module that ``torch.export`` takes; its parameters are shared, not copied.
        batches: calls of the model; the first is traced, the others show which sizes vary.
        dense: names of parameters that stay dense by default, each with the reason.
        include: patterns of site names to compress although they are dense by default
            (shell wildcards, or a regular expression after ``re:``).
        exclude: patterns of site names to leave dense.

    Raises:
        CaptureError: ``torch.export`` fails, or the graph has no compressible site.
        RecipeError: a pattern matches no weight.
    """
    if not batches:
        raise CaptureError("There is no example input to capture the model with: pass calibration= with at least one batch.")
    module = _export(model, batches)
    sites, left = _SiteFinder(model, module, dict(dense or {}), include, exclude).find()
    if not sites:
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in left[:5]) or "it has no matrix at all"
        raise CaptureError(f"{type(model).__name__} has no compressible site, so there is nothing to do ({reasons}).")
    args, kwargs = batches[0]
    return Program(module, sites, left, tuple(kwargs), len(args))


def _export(model: nn.Module, batches: Sequence[Batch]) -> fx.GraphModule:
    args, kwargs = batches[0]
    failure: Exception | None = None
    with _evaluation_mode(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's remarks on its own internals
        for shapes in (_dynamic_shapes(model, batches), None):
            try:
                exported = torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
                module = exported.module(check_guards=False)
                assert_graph_module(module)
                return module
            except Exception as error:  # noqa: BLE001 - any failure of the exporter or of the model's own code
                failure = failure or error
    first_line = (str(failure).strip().splitlines() or [""])[0]
    raise CaptureError(
        f"torch.export could not capture {type(model).__name__}: {type(failure).__name__}: {first_line} "
        "To see it whole, run torch.export.export(model, args, kwargs, strict=False) by itself; "
        "control flow in forward() that depends on tensor values is the usual cause."
    ) from failure


def assert_graph_module(module: nn.Module) -> None:
    """Raise ``TypeError`` if the exporter handed out something that is not an fx graph."""
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"expected a GraphModule, got {type(module).__name__}")


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and, for Hugging Face models, the key-value cache off; put both back afterwards."""
    training = {part: part.training for part in model.modules()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if use_cache is not None:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode
        if use_cache is not None:
            config.use_cache = use_cache  # type: ignore[union-attr]


def _dynamic_shapes(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    """Mark as dynamic every axis that differs between batches, the batch axis, and all axes of token ids and masks."""
    signature = inspect.signature(model.forward)
    calls = [signature.bind(*args, **dict(kwargs)).arguments for args, kwargs in batches]
    leaves, structure = pytree.tree_flatten(dict(calls[0]))
    columns = [pytree.tree_leaves(dict(call)) for call in calls]
    shapes = [
        _dynamic_axes([column[index] for column in columns if len(column) == len(leaves)])
        if isinstance(leaf, Tensor)
        else None
        for index, leaf in enumerate(leaves)
    ]
    marked: dict[str, Any] = pytree.tree_unflatten(shapes, structure)
    return marked


def _dynamic_axes(samples: Sequence[Tensor]) -> dict[int, Any] | None:
    first = samples[0]
    axes = {axis for axis, size in enumerate(first.shape) if any(other.shape[axis] != size for other in samples[1:] if other.ndim == first.ndim)}
    axes |= {axis for axis, size in enumerate(first.shape) if size > 1 and (axis == 0 or not first.is_floating_point())}
    return {axis: torch.export.Dim.AUTO for axis in sorted(axes)} or None


class _SiteFinder:
    """Reads the graph once and sorts every matrix into sites and left-alone rows."""

    def __init__(
        self, model: nn.Module, module: fx.GraphModule, dense: dict[str, str], include: Sequence[str], exclude: Sequence[str]
    ) -> None:
        self.module = module
        named = list(model.named_parameters(remove_duplicate=False)) + list(model.named_buffers(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.canonical = shared_storage(named)
        self.dense = {self.canonical.get(name, name): reason for name, reason in dense.items()}
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.constants = {
            node: self.canonical.get(str(node.target), str(node.target))
            for node in module.graph.nodes
            if node.op == "get_attr" and isinstance(attribute(module, str(node.target)), Tensor)
        }
        self.carrier = CarrierCheck(model, module.graph)
        self.uses: dict[str, list[Use]] = {}
        self.others: dict[str, list[fx.Node]] = {}

    def find(self) -> tuple[dict[str, Site], list[LeftAlone]]:
        claimed = self._collect_uses()
        for constant, name in self.constants.items():
            self.others.setdefault(name, []).extend(user for user in constant.users if (user, constant) not in claimed)
        sites: dict[str, Site] = {}
        left: list[LeftAlone] = []
        matched: set[str] = set()
        for name, parameter in self.parameters.items():
            if parameter.ndim < 2 or self.canonical[name] != name:
                continue
            site_name = name.removesuffix(".weight")
            reason = self._reason(name, parameter) or self._by_pattern(site_name, name, matched)
            site = None if reason else self._site(site_name, name, parameter)
            reason = reason or (self.carrier.refusal(site) if site else None)
            if site is None or reason:
                left.append(LeftAlone(site_name, tuple(parameter.shape), str(reason)))
            else:
                sites[site_name] = site
        self._check_patterns(matched, [name.removesuffix(".weight") for name in self.parameters])
        _group_by_input(sites)
        return sites, left

    def _collect_uses(self) -> set[tuple[fx.Node, fx.Node]]:
        claimed: set[tuple[fx.Node, fx.Node]] = set()
        for node in self.module.graph.nodes:
            for use, constant, direct in self._products(node):
                self.uses.setdefault(self.constants[constant], []).append(use)
                claimed.add((direct, constant))
        return claimed

    def _products(self, node: fx.Node) -> Iterator[tuple[Use, fx.Node, fx.Node]]:
        """Yield the use, its constant, and the node that reads the constant directly (the product or a transposition)."""
        if node.op != "call_function":
            return
        position = 0
        if node.target is _LINEAR:
            bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            stored_transposed = False
        elif node.target in _PRODUCTS:
            position = _PRODUCTS[node.target]
            bias = node.args[0] if node.target is aten.addmm.default else None
            if node.kwargs:  # addmm with alpha or beta is not a linear
                return
            stored_transposed = True
        else:
            return
        activation, operand = node.args[position : position + 2]
        weight = operand
        if not (isinstance(activation, fx.Node) and isinstance(weight, fx.Node)):
            return
        direct = node
        while weight.op == "call_function" and weight.target in _TRANSPOSES and len(weight.users) == 1:
            direct, weight = weight, weight.all_input_nodes[0]
            stored_transposed = not stored_transposed
        if weight not in self.constants or activation in self.constants or not isinstance(operand, fx.Node):
            return
        if bias is not None and bias not in self.constants:
            return
        bias_node = bias if isinstance(bias, fx.Node) else None
        yield Use(node, activation, position, operand, bias_node, stored_transposed), weight, direct

    def _reason(self, name: str, parameter: Tensor) -> str | None:
        """Say why ``parameter`` cannot be a site, or return ``None``."""
        uses, others = self.uses.get(name, []), self.others.get(name, [])
        if any(node.target in _EMBEDDINGS for node in others):
            return "shares its storage with an embedding table" if uses else "embedding table"
        if not parameter.is_floating_point():
            return f"holds {_dtype(parameter)}, not floating-point weights"
        if parameter.ndim > 2:
            how = f"used by {_target(others[0])}" if others else "not used by the captured graph"
            return f"a stack of matrices or a filter ({how}), not one matrix"
        if others:
            return f"also read by {_target(others[0])}, which needs it dense" if uses else f"used by {_target(others[0])}, not as the weight of a linear"
        if not uses:
            return "not used by the captured graph"
        if len({use.transposed for use in uses}) > 1:
            return "used both as [out, in] and as [in, out]"
        return None

    def _by_pattern(self, site_name: str, name: str, matched: set[str]) -> str | None:
        included = [pattern for pattern in self.include if _matches(pattern, site_name)]
        excluded = [pattern for pattern in self.exclude if _matches(pattern, site_name)]
        matched.update(included, excluded)
        if excluded:
            return f"excluded by the pattern '{excluded[0]}'"
        return None if included else self.dense.get(name)

    def _check_patterns(self, matched: set[str], names: Sequence[str]) -> None:
        for pattern in (*self.include, *self.exclude):
            if pattern not in matched:
                raise RecipeError(
                    f"The pattern '{pattern}' matches no compressible weight{closest(pattern, names)}. "
                    "Patterns are matched against module paths such as 'model.layers.0.mlp.up_proj'; '*' stands for anything."
                )

    def _site(self, site_name: str, name: str, parameter: Tensor) -> Site:
        uses = tuple(self.uses[name])
        rows, columns = parameter.shape if not uses[0].transposed else parameter.shape[::-1]
        owners = tuple(other.rpartition(".")[0] for other, first in self.canonical.items() if first == name and other.endswith("weight"))
        return Site(site_name, name, (rows, columns), parameter.dtype, uses, owners)


def _group_by_input(sites: Mapping[str, Site]) -> None:
    """Record which sites read the same activation, so that its statistics are taken once."""
    by_input: dict[tuple[fx.Node, ...], list[str]] = {}
    for site in sites.values():
        by_input.setdefault(tuple(use.input for use in site.uses), []).append(site.name)
    for names in by_input.values():
        for name in names:
            sites[name].group = tuple(names)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise RecipeError(f"'{pattern}' is not a regular expression: {error}.") from error
    return fnmatchcase(name, pattern)


def _target(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default") if node.op == "call_function" else node.op


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
