"""The sweep: run the graph node by node over all calibration batches, and compress each site when it is reached.

A site therefore sees its *actual* input: everything before it is already compressed, and the sweep goes on with the
weight decoded from its packed bytes. Besides the dense model, memory is the live activations of all batches plus one
site.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slimc.errors import CaptureError, SlimError
from slimc.ir.program import Program, Site, Use, attribute
from slimc.passes.base import SitePass
from slimc.passes.journal import Journal
from slimc.passes.report import SiteRow
from slimc.passes.statistics import InputStatistics
from slimc.passes.work import SiteWork
from slimc.progress import Progress
from slimc.runtime.ops import decoded_linear
from slimc.runtime.packing import PackedLinear

log = logging.getLogger(__name__)

_SEED = 0
"""Of operators in the graph that draw random numbers."""

Snapshot = Callable[[str, Site, PackedLinear], None]
"""Receives the name of a pass, a site, and the packed form that the site has after that pass."""


class Sweep:
    """One run of the site passes over a program.

    Args:
        program: the captured model; each site's ``packed`` is set.
        passes: the site passes, in recipe order.
        inputs: flat inputs of each calibration batch, in placeholder order. May be empty when no pass needs statistics.
        journal: where finished sites are written and found again, or ``None``.
        progress: told once a site.
        snapshot: called after each pass at each site that is solved (not those found in the journal); packing every
            stage costs time, so only for dumps.
    """

    def __init__(
        self,
        program: Program,
        passes: Sequence[SitePass],
        inputs: Sequence[Sequence[Any]],
        *,
        journal: Journal | None,
        progress: Progress,
        snapshot: Snapshot | None = None,
    ) -> None:
        self.program = program
        self.passes = tuple(passes)
        self.inputs = inputs
        self.journal = journal
        self.progress = progress
        self.snapshot = snapshot
        self.wanted = frozenset().union(*(one.statistics() for one in passes)) if passes else frozenset()
        self.rows: list[SiteRow] = []
        self._written = _written_constants(program.graph)
        self._earlier_inputs: dict[str, list[Tensor]] = {}
        self._shared_statistics: dict[tuple[str, ...], InputStatistics] = {}

    def run(self) -> list[SiteRow]:
        """Compress every site and return their report rows in data-flow order."""
        self.progress.start("compress", len(self.program.sites))
        if self.wanted:
            self._run_graph()
        else:
            for site in self.program.site_order():
                self._finish(site, ())
        self.progress.finish("compress")
        return self.rows

    @torch.no_grad()
    def _run_graph(self) -> None:
        uses = {use.node: (site, use) for site in self.program.sites.values() for use in site.uses}
        remaining = len(uses)
        last_reader = _last_readers(self.program.graph)
        values: dict[fx.Node, list[Any]] = {}
        placeholders = iter(range(len(self.program.placeholders())))
        for node in self.program.graph.nodes:
            if node in uses:
                site, use = uses[node]
                remaining -= 1
                self._reach(site, use, values)
                if not remaining:
                    return
                values[node] = self._products(site, use, values)
            elif node.op == "placeholder":
                position = next(placeholders)
                values[node] = [_copy(batch[position]) for batch in self.inputs]
            elif node.op != "output":
                values[node] = self._run_node(node, values)
            for finished in last_reader.get(node, ()):
                values.pop(finished, None)

    def _run_node(self, node: fx.Node, values: Mapping[fx.Node, list[Any]]) -> list[Any]:
        if node.op == "get_attr":
            constant = attribute(self.program.module, str(node.target))
            return [constant.clone() if node in self._written else constant for _ in self.inputs]
        if node.op == "call_module":
            function: Callable[..., Any] = self.program.module.get_submodule(str(node.target))
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

    def _arguments(
        self, node: fx.Node, values: Mapping[fx.Node, list[Any]]
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        for batch in range(len(self.inputs)):

            def value(source: fx.Node, batch: int = batch) -> Any:
                return values[source][batch]

            yield fx.node.map_arg((node.args, node.kwargs), value)

    def _reach(self, site: Site, use: Use, values: Mapping[fx.Node, list[Any]]) -> None:
        """Note the input of one product of a site's weight; at its last use the site is compressed.

        A weight with several uses stays dense until its last one, where the statistics of all of them are known.
        """
        activations: list[Tensor] = values[use.input]
        if use is not site.uses[-1]:
            self._earlier_inputs.setdefault(site.name, []).extend(activations)
            return
        self._finish(site, [*self._earlier_inputs.pop(site.name, []), *activations])

    def _products(self, site: Site, use: Use, values: Mapping[fx.Node, list[Any]]) -> list[Any]:
        """Run one product: with the compressed weight, decoded once for all batches, or still with the dense one."""
        if use is not site.uses[-1]:
            return self._run_node(use.node, values)
        activations: list[Tensor] = values[use.input]
        biases = values[use.bias] if use.bias is not None else [None] * len(activations)
        linear = decoded_linear(_packed(site))
        return [linear(x, bias) for x, bias in zip(activations, biases, strict=True)]

    def _finish(self, site: Site, inputs: Sequence[Tensor]) -> None:
        """Take the site from the journal, or solve it and write it there."""
        recorded = self.journal.read(site, self.program.dense_weight(site).device) if self.journal else None
        if recorded is None:
            packed, row = self._solve(site, self._statistics(site, inputs))
            if self.journal:
                self.journal.write(site.name, packed, row)
        else:
            packed, row = recorded
        site.packed = packed
        if all(self.program.sites[name].packed for name in site.group):
            self._shared_statistics.pop(site.group, None)
        self.rows.append(row)
        self.progress.advance("compress", note=site.name)

    def _statistics(self, site: Site, inputs: Sequence[Tensor]) -> InputStatistics | None:
        """Gather the statistics of the site's input, once for all sites that share it."""
        if not self.wanted:
            return None
        if site.group not in self._shared_statistics:
            statistics = InputStatistics.gather(inputs, self.wanted, site.name)
            if statistics.is_silent:
                log.warning(
                    "Calibration never reached %s: its inputs are all zero, so only its weights can guide the choices.",
                    " and ".join(f"'{name}'" for name in site.group),
                )
            self._shared_statistics[site.group] = statistics
        return self._shared_statistics[site.group]

    def _solve(self, site: Site, statistics: InputStatistics | None) -> tuple[PackedLinear, SiteRow]:
        work = SiteWork(
            name=site.name,
            dense=self.program.dense_weight(site).float(),
            dtype=site.dtype,
            statistics=statistics,
            siblings=[self.program.dense_weight(self.program.sites[name]) for name in site.group],
        )
        for one in self.passes:
            try:
                one.apply(work)
            except SlimError as error:
                raise type(error)(f"{one.name}, at '{site.name}': {error}") from error
            if self.snapshot:
                self.snapshot(one.name, site, work.pack())
        packed = work.pack()
        return packed, work.row(packed)


def _packed(site: Site) -> PackedLinear:
    if site.packed is None:
        raise CaptureError(f"'{site.name}' is used before it is compressed; this is a bug in the order of its uses.")
    return site.packed


def _copy(value: Any) -> Any:
    """Return a tensor of its own, so that an in-place operator of the graph cannot change the user's data."""
    return value.clone() if isinstance(value, Tensor) else value


def _written_constants(graph: fx.Graph) -> set[fx.Node]:
    """Return the parameters and buffers that an in-place operator writes, directly or through a view."""
    written: set[fx.Node] = set()
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, source in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(source, fx.Node):
                written.add(_base(source))
    return {node for node in written if node.op == "get_attr"}


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
