"""The sweep: run the graph node by node over all calibration batches, and compress each site when it is reached.

A site therefore sees its *actual* input: everything before it is already compressed, and the sweep goes on with the
weight decoded from its packed bytes. A pass may ask for what the dense model computes at the same place: then a second
stream runs beside the first, from the first compressed site on.

The sweep may compute on another device than the one the model is on. Constants are then brought over when a node reads
them and dropped after it, so that device memory is the live activations of all batches plus one site.
"""

from __future__ import annotations

import logging
import operator
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from slimc.errors import CaptureError, SlimError
from slimc.ir.channels import ConstantReaders
from slimc.ir.match import RefusedError
from slimc.ir.program import Program, Site, Use, attribute
from slimc.passes.base import SitePass, Statistic
from slimc.passes.constants import Constants
from slimc.passes.journal import Journal
from slimc.passes.report import SiteRow
from slimc.passes.statistics import InputStatistics, Shortfall
from slimc.passes.work import SiteWork
from slimc.progress import Progress
from slimc.runtime.ops import decoded_linear
from slimc.runtime.packing import PackedLinear, PackedWeight

log = logging.getLogger(__name__)

_JUDGED = frozenset({"gram", "cross_gram"})
"""Statistics that held-out batches have too."""

_SEED = 0
"""Of operators in the graph that draw random numbers."""

Snapshot = Callable[[str, Site, PackedLinear], None]
"""Receives the name of a pass, a site, and the packed form that the site has after that pass."""

Values = Mapping[fx.Node, list[Any]]
"""What a node computed, by batch."""

Solved = tuple[PackedLinear, SiteRow, Tensor | None]
"""The packed form of a site, its report row, and its bias if that is not the dense one."""

Inputs = tuple[list[Tensor], list[Tensor] | None]
"""What a product reads, by batch, and what it reads in the dense model, if that runs beside."""


class Sweep:
    """One run of the site passes over a program.

    Args:
        program: the captured model; each site's ``packed`` is set.
        passes: the site passes, in recipe order.
        inputs: flat inputs of each calibration batch, in placeholder order. May be empty when no pass needs statistics.
        held_out: how many of the last batches are kept out of the statistics, for passes that judge a choice by them.
        device: where to compute; ``None`` is the device of the model.
        journal: where finished sites are written and found again, or ``None``.
        progress: told once a site.
        snapshot: called after each pass at each site that is solved (not those found in the journal); packing every
            stage costs time, so only for dumps.
        stage: what the progress is told that this is.
    """

    def __init__(
        self,
        program: Program,
        passes: Sequence[SitePass],
        inputs: Sequence[Sequence[Any]],
        *,
        held_out: int = 0,
        device: torch.device | None = None,
        journal: Journal | None,
        progress: Progress,
        snapshot: Snapshot | None = None,
        stage: str = "compress",
    ) -> None:
        self.program = program
        self.passes = tuple(passes)
        self.inputs = inputs
        self.fitted = len(inputs) - held_out
        self.constants = Constants(program.module, device)
        self.journal = journal
        self.progress = progress
        self.snapshot = snapshot
        self.stage = stage
        self.wanted = frozenset().union(*(one.statistics() for one in passes)) if passes else frozenset()
        self.rows: list[SiteRow] = []
        self._written = written_values(program.module)
        self._values: dict[fx.Node, list[Any]] = {}
        # What the dense model computes, where that is something else: after the first site, or wherever an operator
        # that writes its argument would change what both streams read.
        self._apart: dict[fx.Node, list[Any]] = {}
        self._two_streams = bool({"cross_gram", "shortfall"} & self.wanted)
        self._always_apart = self._two_streams and bool(self._written)
        self._readers = ConstantReaders(program)
        # Siblings that were solved together with one before them.
        self._solved: dict[str, Solved] = {}
        self._earlier_inputs: dict[str, list[Inputs]] = {}
        self._shared_statistics: dict[tuple[str, ...], tuple[InputStatistics, InputStatistics | None]] = {}

    def run(self) -> list[SiteRow]:
        """Compress every site and return their report rows in data-flow order."""
        self.progress.start(self.stage, len(self.program.sites))
        if self.wanted:
            self._run_graph()
        else:
            for site in self.program.site_order():
                self._finish(site, ())
        self.progress.finish(self.stage)
        return self.rows

    @property
    def _dense_values(self) -> Values:
        """The values of the dense stream."""
        return ChainMap(self._apart, self._values)

    @torch.no_grad()
    def _run_graph(self) -> None:
        uses = {use.node: (site, use) for site in self.program.sites.values() for use in site.uses}
        remaining = len(uses)
        last_reader = _last_readers(self.program.graph)
        placeholders = iter(range(len(self.program.placeholders())))
        for node in self.program.graph.nodes:
            if node in uses:
                site, use = uses[node]
                remaining -= 1
                self._reach(site, use)
                if not remaining:
                    return
                self._compute_product(site, use)
            elif node.op == "placeholder":
                self._copy_inputs(node, next(placeholders))
            elif node.op != "output" and not self._is_constant(node):
                self._compute(node)
            for finished in last_reader.get(node, ()):
                self._values.pop(finished, None)
                self._apart.pop(finished, None)

    def _is_constant(self, node: fx.Node) -> bool:
        """Tell whether ``node`` is looked up by those who read it, because nobody writes it."""
        return node.op == "get_attr" and node not in self._written

    def _copy_inputs(self, node: fx.Node, position: int) -> None:
        """Make tensors of their own, so that an in-place operator of the graph cannot change the user's data."""

        def copies() -> list[Any]:
            return [self._copy(batch[position]) for batch in self.inputs]

        self._values[node] = copies()
        if self._always_apart:
            self._apart[node] = copies()

    def _copy(self, value: Any) -> Any:
        return value.to(self.constants.device, copy=True) if isinstance(value, Tensor) else value

    def _compute(self, node: fx.Node) -> None:
        """Compute a node in the streams that differ at it."""
        apart = self._always_apart or any(source in self._apart for source in node.all_input_nodes)
        if apart:
            self._apart[node] = self._run_node(node, self._dense_values)
        self._values[node] = self._run_node(node, self._values)

    def _compute_product(self, site: Site, use: Use) -> None:
        """Compute a product with the compressed weight, decoded once for all batches, or still with the dense one."""
        if use is not site.uses[-1]:
            self._compute(use.node)
            return
        if self._two_streams:
            self._apart[use.node] = self._run_node(use.node, self._dense_values)
        activations: list[Tensor] = self._values[use.input]
        bias = None if use.bias is None else self._value(use.bias)
        if site.bias is not None:
            bias = site.bias.to(self.constants.device)
        linear = decoded_linear(_moved(_packed(site), self.constants.device))
        self._values[use.node] = [linear(x, bias) for x in activations]

    def _value(self, bias: fx.Node) -> Any:
        """Return a bias, which is the same in all batches."""
        return self.constants[bias] if self._is_constant(bias) else self._values[bias][0]

    def _run_node(self, node: fx.Node, values: Values) -> list[Any]:
        if node.op == "get_attr":
            return [self.constants[node].clone() for _ in self.inputs]
        if node.op == "call_module":
            function: Callable[..., Any] = self.constants.submodule(str(node.target))
        elif node.op == "call_function" and callable(node.target):
            function = node.target
        else:
            raise CaptureError(f"The graph has a node of a kind that slimc cannot run: {node.format_node()}.")
        if torch.Tag.nondeterministic_seeded in getattr(function, "tags", ()):
            function = self._seeded(function)
        return [function(*args, **kwargs) for args, kwargs in self._arguments(node, values)]

    def _seeded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make an operator that draws random numbers draw the same ones in every run, whatever was drawn before."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.random.fork_rng():
                torch.manual_seed(_SEED)
                return function(*args, **kwargs)

        return run

    def _arguments(self, node: fx.Node, values: Values) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        constants = {source: self.constants[source] for source in node.all_input_nodes if self._is_constant(source)}
        for batch in range(len(self.inputs)):

            def value(leaf: Any, batch: int = batch) -> Any:
                if isinstance(leaf, fx.Node):
                    return constants[leaf] if leaf in constants else values[leaf][batch]
                return self.constants.here(leaf) if isinstance(leaf, torch.device) else leaf

            yield fx.node.map_aggregate((node.args, node.kwargs), value)

    def _reach(self, site: Site, use: Use) -> None:
        """Note the input of one product of a site's weight; at its last use the site is compressed.

        A weight with several uses stays dense until its last one, where the statistics of all of them are known.
        """
        dense: list[Tensor] | None = self._dense_values[use.input] if self._two_streams else None
        inputs: Inputs = (self._values[use.input], dense)
        if use is not site.uses[-1]:
            # What is written before the last use must be kept as it is now.
            if _base(use.input) in self._written:
                inputs = ([value.clone() for value in inputs[0]], dense and [value.clone() for value in dense])
            self._earlier_inputs.setdefault(site.name, []).append(inputs)
            return
        self._finish(site, [*self._earlier_inputs.pop(site.name, []), inputs])

    def _finish(self, site: Site, inputs: Sequence[Inputs]) -> None:
        """Take the site from the journal, or solve it and write it there; it goes to the device of the model."""
        home = self.program.dense_weight(site).device
        recorded = self.journal.read(site, home) if self.journal else None
        if recorded is None:
            stack = self._stack_of(site)
            if stack and site.name not in self._solved:
                self._solved |= self._solve_together(stack, inputs)
            packed, row, bias = self._solved.pop(site.name) if stack else self._solve(site, inputs)
            packed = _moved(packed, home)
            bias = None if bias is None else bias.to(home)
            if self.journal:
                self.journal.write(site.name, packed, row, bias)
        else:
            packed, row, bias = recorded
        site.packed, site.bias = packed, bias
        if all(self.program.sites[name].packed for name in site.group):
            self._shared_statistics.pop(site.group, None)
        self.rows.append(row)
        self.progress.advance(self.stage, note=site.name)

    def _statistics(
        self, site: Site, inputs: Sequence[Inputs]
    ) -> tuple[InputStatistics | None, InputStatistics | None]:
        """Gather the statistics of the site's input, of fitted and of held-out batches, once for all that share it."""
        if not self.wanted:
            return None, None
        # A value that is written between two products that read it is another input for each of them.
        changes = any(_base(use.input) in self._written for use in site.uses)
        if changes or site.group not in self._shared_statistics:
            names = " and ".join(f"'{name}'" for name in site.group)
            fitted = self._gather(site, inputs, slice(self.fitted), self.wanted)
            if fitted.is_silent:
                log.warning(
                    "Calibration never reached %s: its inputs are all zero, so only its weights can guide the choices.",
                    names,
                )
            held_out = None
            if self.fitted < len(self.inputs):
                held_out = self._gather(site, inputs, slice(self.fitted, None), self.wanted & _JUDGED)
                if held_out.is_silent:
                    log.warning("No held-out batch reached %s: nothing is judged by them there.", names)
                    held_out = None
            self._shared_statistics[site.group] = fitted, held_out
        return self._shared_statistics[site.group]

    def _gather(
        self, site: Site, inputs: Sequence[Inputs], batches: slice, wanted: frozenset[Statistic]
    ) -> InputStatistics:
        activations = [x for actual, _ in inputs for x in actual[batches]]
        dense = [x for _, exact in inputs if exact is not None for x in exact[batches]]
        return InputStatistics.gather(activations, wanted, site.name, dense=dense or None)

    def _shortfalls(self, site: Site, inputs: Sequence[Inputs]) -> tuple[Shortfall | None, Shortfall | None]:
        """Gather what is missing where the site's only product is added to another value, fitted and held out."""
        other = _added_to(site.uses[0].node) if "shortfall" in self.wanted and len(site.uses) == 1 else None
        if other not in self._values:
            return None, None
        activations, _ = inputs[0]
        actual: list[Tensor] = self._values[other]
        dense: list[Tensor] = self._dense_values[other]
        if actual[0].shape != (*activations[0].shape[:-1], site.shape[0]):
            return None, None

        def gather(part: slice) -> Shortfall:
            return Shortfall.gather(activations[part], actual[part], dense[part])

        held_out = gather(slice(self.fitted, None)) if self.fitted < len(self.inputs) else None
        return gather(slice(self.fitted)), held_out

    def _own_bias(self, site: Site) -> tuple[Tensor | None, str | None]:
        """Return the site's bias if nothing else adds it, or why there is none to be changed."""
        biases = {None if use.bias is None else str(use.bias.target) for use in site.uses}
        name = biases.pop()
        if biases or name is None:
            return None, "its uses add different biases" if biases else "it has no bias"
        try:
            self._readers.require_sole(name)
        except RefusedError as refusal:
            return None, str(refusal)
        bias: Tensor = attribute(self.program.module, name)
        return bias.detach().to(self.constants.device), None

    def _solve(self, site: Site, inputs: Sequence[Inputs]) -> Solved:
        statistics, held_out = self._statistics(site, inputs)
        work = SiteWork(
            name=site.name,
            dense=self.program.dense_weight(site).to(self.constants.device).float(),
            dtype=site.dtype,
            statistics=statistics,
            held_out=held_out,
            shortfalls=self._shortfalls(site, inputs),
            siblings=self._siblings(site),
            own_bias=lambda: self._own_bias(site),
        )
        for one in self.passes:
            self._apply(one, work, {site.name: lambda: work})
        packed = work.pack()
        return packed, work.row(packed), work.bias

    def _siblings(self, site: Site) -> Callable[[], list[Tensor]]:
        device = self.constants.device
        return lambda: [self.program.dense_weight(self.program.sites[name]).to(device) for name in site.group]

    def _apply(self, one: SitePass, work: SiteWork, sites: Mapping[str, Callable[[], SiteWork]]) -> None:
        try:
            one.apply(work)
        except SlimError as error:
            raise type(error)(f"{one.name}, at '{work.name}': {error}") from error
        if self.snapshot:
            for name, part in sites.items():
                self.snapshot(one.name, self.program.sites[name], part().pack())

    def _stack_of(self, site: Site) -> list[Site]:
        """Return the sites that are solved together with this one, if a pass asks for it and they read one value."""
        if not any(one.stacks for one in self.passes) or len(site.group) == 1:
            return []
        sites = [self.program.sites[name] for name in site.group]
        alike = all(len(one.uses) == 1 and one.dtype == site.dtype for one in sites)
        return sites if alike and _base(site.uses[0].input) not in self._written else []

    def _solve_together(self, sites: Sequence[Site], inputs: Sequence[Inputs]) -> dict[str, Solved]:
        """Solve the weights of siblings, below each other, as one; passes after the last that stacks see each."""
        statistics, held_out = self._statistics(sites[0], inputs)
        dense = [self.program.dense_weight(site).to(self.constants.device).float() for site in sites]
        ends = [sum(len(weight) for weight in dense[: index + 1]) for index in range(len(dense))]
        work = SiteWork(
            name="' with '".join(site.name for site in sites),
            dense=torch.cat(dense),
            dtype=sites[0].dtype,
            statistics=statistics,
            held_out=held_out,
            siblings=self._siblings(sites[0]),
        )

        def part(index: int) -> SiteWork:
            site = sites[index]
            rows = slice(ends[index] - site.shape[0], ends[index])
            return work.part(site.name, rows, siblings=self._siblings(site), own_bias=lambda: self._own_bias(site))

        parts = {site.name: partial(part, index) for index, site in enumerate(sites)}
        last = max(index for index, one in enumerate(self.passes) if one.stacks)
        for one in self.passes[: last + 1]:
            self._apply(one, work, parts)
        solved: dict[str, Solved] = {}
        right: PackedWeight | None = None
        for name, of_site in parts.items():
            own = of_site()
            for one in self.passes[last + 1 :]:
                self._apply(one, own, {name: lambda own=own: own})  # type: ignore[misc]
            packed = own.pack()
            row = own.row(packed)
            if packed.right is not None:
                right = right or packed.right
                packed = replace(packed, right=right)
                # The right factor is stored once: each site answers for its share of the rows.
                spared = right.format.bits_per_weight() * right.format.rows / len(own.dense)
                row = replace(row, bits=row.bits - spared * (1 - len(own.dense) / ends[-1]))
            solved[name] = packed, row, own.bias
        return solved


def _added_to(product: fx.Node) -> fx.Node | None:
    """Return the value that the result of ``product`` is added to, if a plain sum is all that reads it."""
    readers = list(product.users)
    if len(readers) != 1 or readers[0].target is not torch.ops.aten.add.Tensor or readers[0].kwargs:
        return None
    others = [source for source in readers[0].all_input_nodes if source is not product]
    return others[0] if len(others) == 1 else None


def _packed(site: Site) -> PackedLinear:
    if site.packed is None:
        raise CaptureError(f"'{site.name}' is used before it is compressed; this is a bug in the order of its uses.")
    return site.packed


def _moved(packed: PackedLinear, device: torch.device) -> PackedLinear:
    """Return ``packed`` with its tensors on ``device``."""
    return PackedLinear.assemble(packed.format, {name: tensor.to(device) for name, tensor in packed.tensors().items()})


def written_values(module: fx.GraphModule) -> set[fx.Node]:
    """Return the values that an in-place operator writes, directly, through a view, or in a graph inside this one."""
    written: set[fx.Node] = set()
    for node in module.graph.nodes:
        written |= {_base(source) for source in _written_arguments(node)}
        inner = [one for one in (_graph_of(module, source) for source in (node, *node.all_input_nodes)) if one]
        # Which of its arguments an inner graph writes is not worth telling apart.
        if node.op != "get_attr" and any(written_values(one) for one in inner):
            written |= {_base(source) for source in node.all_input_nodes if _graph_of(module, source) is None}
    return written


def _graph_of(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """Return the graph that ``node`` names or calls, if it does."""
    if node.op not in ("get_attr", "call_module"):
        return None
    found = operator.attrgetter(str(node.target))(module)
    return found if isinstance(found, fx.GraphModule) else None


def _written_arguments(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that the operator of ``node`` writes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | dict(node.kwargs)
    written = (given.get(one.name) for one in arguments if one.alias_info is not None and one.alias_info.is_write)
    return [source for source in written if isinstance(source, fx.Node)]


def _base(node: fx.Node) -> fx.Node:
    """Return the value that ``node`` is a view of."""
    while isinstance(node.target, torch._ops.OpOverload) and node.all_input_nodes:
        first = node.target._schema.arguments[0]
        if first.alias_info is None:
            break
        node = node.all_input_nodes[0]
    return node


def _last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Map each node to the values that nobody reads after it; its own is among them if nobody ever does."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    readers: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        readers.setdefault(node, []).append(source)
    return readers
