"""From a PyTorch module to a :class:`Program`: ``torch.export``, then sites by what the graph does.

Sites are found by the products in the graph, never by module class names: ``aten.linear`` with a constant
weight, and ``addmm`` / ``mm`` / ``matmul`` by a constant matrix (GPT-2's ``Conv1D``). What is not a site is
listed with the reason.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from slimc.errors import CaptureError, InputError, RecipeError, closest
from slimc.ir.carrier import CarrierCheck, ModuleCalls, recorded_calls
from slimc.ir.patterns import matches
from slimc.ir.program import EMBEDDINGS, LeftAlone, Program, Site, Use, attribute, shared_storage
from slimc.ir.text import innermost_module, operator_name

Batch = tuple[tuple[Any, ...], Mapping[str, Any]]
"""One call of the model: positional and keyword arguments."""

aten = torch.ops.aten

_LINEAR = aten.linear.default
_ADDMM = aten.addmm.default
_PRODUCTS = {_LINEAR: 0, aten.mm.default: 0, aten.matmul.default: 0, _ADDMM: 1}
"""Where a product reads its activation; its weight comes next."""

_EXPORTER_LOGGERS = ("torch._subclasses.fake_tensor", "torch.export", "torch.fx.experimental.symbolic_shapes")
"""Who of torch logs a failure that is also raised; each has a handler of its own."""


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
        batches: calls of the model; one is traced, the others show which sizes vary.
        dense: names of parameters that stay dense by default, each with the reason.
        include: patterns of site names to compress although they are dense by default
            (shell wildcards, or a regular expression after ``re:``).
        exclude: patterns of site names to leave dense.

    Raises:
        CaptureError: ``torch.export`` fails, the graph does not take every batch, or it has no compressible site.
        InputError: a batch does not fit the model's ``forward``, or the model fails on the one that is traced.
        RecipeError: a pattern matches no weight, or asks for one that cannot be compressed.
    """
    if not batches:
        raise CaptureError(
            "There is no example input to capture the model with: pass calibration= with at least one batch."
        )
    example = min(batches, key=_single_sizes)
    module, calls = _export(model, batches, example)
    sites, left = _SiteFinder(model, module, calls, dict(dense or {}), include, exclude).find()
    args, kwargs = example
    program = Program(module, sites, left, tuple(kwargs), len(args))
    _check_batches(program, batches, example)
    if not sites:
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in left[:5]) or "it has no matrix at all"
        raise CaptureError(f"{type(model).__name__} has no compressible site, so there is nothing to do ({reasons}).")
    return program


def _single_sizes(batch: Batch) -> int:
    """Count sizes of 1: the exporter takes them for constants, so a batch with fewer is the better example."""
    return sum(size == 1 for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) for size in leaf.shape)


def _export(model: nn.Module, batches: Sequence[Batch], example: Batch) -> tuple[fx.GraphModule, ModuleCalls]:
    """Trace with every size dynamic that may vary, or failing that, with the sizes of the example."""
    shapes = _dynamic_shapes(model, batches, example)
    with _evaluation_mode(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's remarks on its own internals
        try:
            with _quiet_exporter():
                return _trace(model, example, shapes)
        except Exception as error:
            try:
                with _quiet_exporter():
                    return _trace(model, example, None)
            except Exception:
                _check_model_runs(model, batches, example)
                raise _explained(model, error) from error


def _trace(model: nn.Module, example: Batch, shapes: Any) -> tuple[fx.GraphModule, ModuleCalls]:
    args, kwargs = example
    with recorded_calls(model) as calls:
        exported = torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
    module = exported.module(check_guards=False)
    if not isinstance(module, fx.GraphModule):
        raise TypeError(f"expected a GraphModule, got {type(module).__name__}")
    return module, calls


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter from logging, with a traceback of every frame, what it also raises; what is asked for stays."""

    def asked_for(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    loggers = [logging.getLogger(name) for name in _EXPORTER_LOGGERS]
    for logger in loggers:
        logger.addFilter(asked_for)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(asked_for)


def _check_model_runs(model: nn.Module, batches: Sequence[Batch], example: Batch) -> None:
    """Raise an InputError if the model cannot compute the example: then the exporter is not to blame."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (example[0], dict(example[1])))
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        model(*args, **kwargs)
    except Exception as error:
        number = next(index for index, batch in enumerate(batches, start=1) if batch is example)
        place = "the first calibration batch" if number == 1 else f"calibration batch {number}"
        given = ", ".join(_summary(leaf) for leaf in pytree.tree_leaves(example))
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{type(model).__name__}, the model itself, fails on {place} ({given}): {reason}. Give batches that "
            "model(*args, **kwargs) takes."
        ) from error
    finally:
        for buffer, before in buffers.items():
            buffer.copy_(before)


def _explained(model: nn.Module, failure: Exception) -> CaptureError:
    first_line = (str(failure).strip().splitlines() or [""])[0]
    return CaptureError(
        f"torch.export could not capture {type(model).__name__}: {type(failure).__name__}: {first_line} "
        "To see it whole, run torch.export.export(model, args, kwargs, strict=False) by itself; "
        "control flow in forward() that depends on tensor values is the usual cause."
    )


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


def _dynamic_shapes(model: nn.Module, batches: Sequence[Batch], example: Batch) -> dict[str, Any]:
    """Mark the sizes that may vary, argument by argument."""
    signature = inspect.signature(model.forward)
    try:
        leaves, structure = pytree.tree_flatten(dict(signature.bind(*example[0], **example[1]).arguments))
        columns = [pytree.tree_leaves(dict(signature.bind(*args, **kwargs).arguments)) for args, kwargs in batches]
    except TypeError as error:
        raise InputError(f"A batch does not fit forward() of {type(model).__name__}: {error}.") from error
    shapes = [
        _dynamic_axes(leaf, [column[index] for column in columns if len(column) == len(leaves)])
        for index, leaf in enumerate(leaves)
    ]
    marked: dict[str, Any] = pytree.tree_unflatten(shapes, structure)
    return marked


def _dynamic_axes(leaf: Any, samples: Sequence[Any]) -> dict[int, Any] | None:
    """Every axis that differs between batches, the first one, and all axes of token ids and masks.

    These are wishes (``Dim.AUTO``): the exporter fixes a size that the model's code fixes.
    """
    if not isinstance(leaf, Tensor):
        return None
    others = [other for other in samples if isinstance(other, Tensor) and other.ndim == leaf.ndim]
    varies = [
        axis == 0 or not leaf.is_floating_point() or any(other.shape[axis] != size for other in others)
        for axis, size in enumerate(leaf.shape)
    ]
    return {axis: torch.export.Dim.AUTO for axis, size in enumerate(leaf.shape) if size > 1 and varies[axis]} or None


def _check_batches(program: Program, batches: Sequence[Batch], example: Batch) -> None:
    """Refuse a batch that the graph would compute wrongly: one that differs where the example was built in."""
    inputs = program.placeholders()
    captured = program.flatten_inputs(*example)
    for batch in batches:
        for node, built_in, leaf in zip(inputs, captured, program.flatten_inputs(*batch), strict=True):
            if not _fits(node.meta.get("val"), built_in, leaf):
                raise CaptureError(
                    f"The captured model takes {_summary(built_in)} as '{node.name}', and another batch has "
                    f"{_summary(leaf)}. Its code fixes that size or value, so give all batches the same (pad or cut)."
                )


def _fits(recorded: Any, built_in: Any, leaf: Any) -> bool:
    if not isinstance(built_in, Tensor):
        return not isinstance(leaf, Tensor) and bool(built_in == leaf)
    if not isinstance(leaf, Tensor) or not isinstance(recorded, Tensor) or recorded.ndim != leaf.ndim:
        return False
    # A size that the exporter has fixed may still be a symbol, but it reads as a number.
    sizes = [(str(ours), str(theirs)) for ours, theirs in zip(recorded.shape, leaf.shape, strict=True)]
    return leaf.dtype == recorded.dtype and all(ours == theirs or not ours.isdigit() for ours, theirs in sizes)


def _summary(value: Any) -> str:
    return f"{_dtype(value)}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


class _SiteFinder:
    """Reads the graph once and sorts every matrix into sites and left-alone rows."""

    def __init__(
        self,
        model: nn.Module,
        module: fx.GraphModule,
        calls: ModuleCalls,
        dense: Mapping[str, str],
        include: Sequence[str],
        exclude: Sequence[str],
    ) -> None:
        self.module = module
        parameters = list(model.named_parameters(remove_duplicate=False))
        canonical = shared_storage([*parameters, *model.named_buffers(remove_duplicate=False)])
        self.canonical = canonical
        self.matrices = {name: tensor for name, tensor in parameters if tensor.ndim >= 2}
        self.dense = {canonical.get(name, name): reason for name, reason in dense.items()}
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.constants = {
            node: canonical.get(str(node.target), str(node.target))
            for node in module.graph.nodes
            if node.op == "get_attr" and isinstance(attribute(module, str(node.target)), Tensor)
        }
        self.carrier = CarrierCheck(model, module.graph, calls, canonical)
        self.uses: dict[str, list[Use]] = {}
        self.others: dict[str, list[fx.Node]] = {}
        self.sites: dict[str, Site] = {}
        self.left: list[LeftAlone] = []
        self.incompressible: dict[str, str] = {}

    def find(self) -> tuple[dict[str, Site], list[LeftAlone]]:
        self._collect_uses()
        for name in self.matrices:
            if self.canonical[name] == name:
                self._sort(name)
        self._check_patterns()
        _group_by_input(self.sites)
        return self.sites, self.left

    def _collect_uses(self) -> None:
        """Split the readers of each constant into products by it and everything else."""
        claimed: set[tuple[fx.Node, fx.Node]] = set()
        for node in self.module.graph.nodes:
            found = self._product(node)
            if found is not None:
                use, constant, reader = found
                self.uses.setdefault(self.constants[constant], []).append(use)
                claimed.add((reader, constant))
        for constant, name in self.constants.items():
            others = [user for user in constant.users if (user, constant) not in claimed]
            self.others.setdefault(name, []).extend(others)

    def _product(self, node: fx.Node) -> tuple[Use, fx.Node, fx.Node] | None:
        """Return the use, its constant, and the node that reads the constant: the product or a transposition."""
        if node.op != "call_function" or node.target not in _PRODUCTS or node.kwargs:
            return None
        position = _PRODUCTS[node.target]
        activation, operand = node.args[position : position + 2]
        if not isinstance(activation, fx.Node) or not isinstance(operand, fx.Node):
            return None
        transposed = node.target is not _LINEAR
        reader, weight = node, operand
        while _is_transposition(weight) and len(weight.users) == 1:
            reader, weight = weight, weight.all_input_nodes[0]
            transposed = not transposed
        if weight not in self.constants or activation in self.constants:
            return None
        shape = attribute(self.module, str(weight.target)).shape
        if len(shape) != 2:
            return None
        bias = _bias(node)
        if bias is not None and not self._is_vector(bias, shape[1] if transposed else shape[0]):
            return None
        return Use(node, activation, position, operand, bias, transposed), weight, reader

    def _is_vector(self, node: fx.Node, size: int) -> bool:
        return node in self.constants and tuple(attribute(self.module, str(node.target)).shape) == (size,)

    def _sort(self, name: str) -> None:
        """Make a site of one tensor, or leave it, under all its names."""
        names = [other for other in self.matrices if self.canonical[other] == name]
        lookups = [node for node in self.others.get(name, []) if node.target in EMBEDDINGS]
        tables = _held_by({innermost_module(node) for node in lookups}, names) or (names[:1] if lookups else [])
        names = [other for other in names if other not in tables]
        for table in tables:
            self._leave(table, "embedding table")
        if not names:
            return
        default = self.dense.get(name)
        if tables:
            default = f"shares its storage with the embedding table '{_site_name(tables[0])}'; include it by its name"
        site = self._site(name, names)
        reason = self._obstacle(name) or self.carrier.refusal(site, tuple(names))
        if reason is not None:
            for other in names:
                self._leave(other, reason)
            return
        reason = self._by_pattern([_site_name(other) for other in names], default)
        if reason is None:
            self.sites[site.name] = site
            return
        for other in names:
            self.left.append(LeftAlone(_site_name(other), tuple(self.matrices[other].shape), reason))

    def _leave(self, name: str, reason: str) -> None:
        """Leave a weight that no pattern could include."""
        self.incompressible[_site_name(name)] = reason
        self.left.append(LeftAlone(_site_name(name), tuple(self.matrices[name].shape), reason))

    def _obstacle(self, name: str) -> str | None:
        """Say why the graph does not allow the tensor to be a site, or return ``None``."""
        tensor, uses = self.matrices[name], self.uses.get(name, [])
        others = [node for node in self.others.get(name, []) if node.target not in EMBEDDINGS]
        if not tensor.is_floating_point():
            return f"holds {_dtype(tensor)}, not floating-point weights"
        if tensor.ndim > 2:
            how = f"used by {_target(others[0])}" if others else "not used by the captured graph"
            return f"a stack of matrices or a filter ({how}), not one matrix"
        if others and uses:
            return f"also read by {_target(others[0])}, which needs it dense"
        if others and others[0].target in _PRODUCTS:
            return f"used by {_target(others[0])}, but not as x @ W^T plus a constant bias"
        if others:
            return f"used by {_target(others[0])}, not as the weight of a linear"
        if len({use.transposed for use in uses}) > 1:
            return "used both as [out, in] and as [in, out]"
        return None if uses else "not used by the captured graph"

    def _by_pattern(self, names: Sequence[str], default: str | None) -> str | None:
        """Say which pattern, or else which default, leaves the site dense."""
        excluded = [pattern for pattern in self.exclude if any(matches(pattern, name) for name in names)]
        if excluded:
            return f"excluded by the pattern '{excluded[0]}'"
        included = any(matches(pattern, name) for pattern in self.include for name in names)
        return None if included else default

    def _check_patterns(self) -> None:
        """Every pattern names a matrix, and one that includes names at least one that can be compressed."""
        names = [_site_name(name) for name in self.matrices]
        for pattern in (*self.include, *self.exclude):
            matched = [name for name in names if matches(pattern, name)]
            if not matched:
                raise RecipeError(
                    f"The pattern '{pattern}' matches no weight{closest(pattern, names)}. Patterns are matched against "
                    "module paths such as 'model.layers.0.mlp.up_proj'; '*' stands for anything."
                )
            if pattern in self.include and all(name in self.incompressible for name in matched):
                raise RecipeError(
                    f"The pattern '{pattern}' includes only what cannot be compressed: "
                    f"{matched[0]}: {self.incompressible[matched[0]]}."
                )

    def _site(self, name: str, names: Sequence[str]) -> Site:
        uses = tuple(self.uses.get(name, ()))
        tensor = self.matrices[name]
        transposed = bool(uses) and uses[0].transposed
        rows, columns = tensor.shape[::-1][:2] if transposed else tensor.shape[:2]
        owners = tuple(other.rpartition(".")[0] for other in names)
        return Site(_site_name(names[0]), name, (rows, columns), tensor.dtype, uses, owners)


def _bias(product: fx.Node) -> fx.Node | None:
    position = 0 if product.target is _ADDMM else 2
    bias = product.args[position] if len(product.args) > position and product.target in (_ADDMM, _LINEAR) else None
    return bias if isinstance(bias, fx.Node) else None


def _is_transposition(node: fx.Node) -> bool:
    """Tell whether ``node`` exchanges the two axes of a matrix."""
    if node.target in (aten.t.default, aten.numpy_T.default):
        return True
    if node.target is aten.transpose.int:
        return {int(axis) % 2 for axis in node.args[1:3]} == {0, 1}  # type: ignore[arg-type]
    return node.target is aten.permute.default and [axis % 2 for axis in node.args[1]] == [1, 0]  # type: ignore[union-attr,operator]


def _held_by(paths: set[str], names: Sequence[str]) -> list[str]:
    """Return the tensors of ``names`` that modules at ``paths`` hold."""
    return [name for name in names if name.rpartition(".")[0] in paths]


def _site_name(name: str) -> str:
    return name.removesuffix(".weight")


def _group_by_input(sites: Mapping[str, Site]) -> None:
    """Record which sites read the same activation, so that its statistics are taken once."""
    by_input: dict[tuple[fx.Node, ...], list[str]] = {}
    for site in sites.values():
        by_input.setdefault(tuple(use.input for use in site.uses), []).append(site.name)
    for names in by_input.values():
        for name in names:
            sites[name].group = tuple(names)


def _target(node: fx.Node) -> str:
    return operator_name(node) if node.op == "call_function" else f"the {node.op} node"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
