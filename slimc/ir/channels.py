"""Inner channels: what indexes rows of some weights and columns of others, and nothing else that is stored.

Such channels may be put into another order (:func:`permutable`) without changing what the model computes, as long as
all that they index is put into that order. The proof is the graph's: starting from the input of a site, indices are
carried over every operator that they run through, to the sites and vectors where they end; whatever reads elements in
their order keeps them there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from slimc.ir.axes import Axes, Axis, Index, sizes
from slimc.ir.match import RefusedError
from slimc.ir.program import Program, Site, attribute, memory
from slimc.ir.relations import IGNORED, Relation, is_cut, part_of, rank, relation, scaled_operands
from slimc.ir.text import operator_name


@dataclass(frozen=True)
class Stretch:
    """Part of an axis of a stored tensor that channels run along.

    Attributes:
        tensor: its qualified name in the program's module.
        axis: of the tensor as it is stored.
        start: where the part begins.
        order: for every position of the part, which channel is there, int64 ``[length]``.
        repeats: for every position, which of several copies of the channels it belongs to, int64 ``[length]``.
    """

    tensor: str
    axis: int
    start: int
    order: Tensor
    repeats: Tensor

    def sources(self, permutation: Tensor) -> Tensor:
        """Return where to fetch what belongs at each position: channel ``permutation[c]`` comes to ``c``."""
        position = torch.full((int(self.repeats.max()) + 1, len(permutation)), -1)
        position[self.repeats, self.order] = torch.arange(len(self.order))
        return position[self.repeats, permutation[self.order]]


@dataclass(frozen=True)
class Channels:
    """Channels that may be reordered within blocks.

    Attributes:
        blocks: how many blocks there are; no channel leaves its own.
        size: of a block.
        produced: rows of weights, biases, and vectors.
        consumed: columns of weights, by the name of the site.
    """

    blocks: int
    size: int
    produced: tuple[Stretch, ...]
    consumed: dict[str, Stretch]

    @property
    def count(self) -> int:
        """How many channels there are."""
        return self.blocks * self.size

    def __str__(self) -> str:
        """Return for example ``64 channels in each of 3 blocks, from ... to ...``."""
        blocks = f" in each of {self.blocks} blocks" if self.blocks > 1 else ""
        return (
            f"{self.size} channels{blocks}, from {', '.join(one.tensor for one in self.produced)} "
            f"to {', '.join(self.consumed)}"
        )


@dataclass(frozen=True)
class Found:
    """What may be reordered, and of every other site's input, why it may not.

    Attributes:
        channels: in data-flow order.
        refused: reasons by site.
    """

    channels: tuple[Channels, ...]
    refused: dict[str, str]


def permutable(program: Program) -> Found:
    """Find the channels that may be reordered at the inputs of the sites of ``program``, which is not changed."""
    context = _Context(program)
    found: list[Channels] = []
    refused: dict[str, str] = {}
    done: set[str] = set()
    for site in program.site_order():
        if site.name in done:
            continue
        try:
            channels = _Region(context, site).channels()
        except RefusedError as refusal:
            refused |= dict.fromkeys(site.group, str(refusal))
            done.update(site.group)
        else:
            found.append(channels)
            done.update(channels.consumed)
    return Found(tuple(found), refused)


def scalable(program: Program) -> Found:
    """Find the channels at the inputs of sites that may be made smaller by a factor each, which the sites take on.

    All readers of the input must be sites, and a factor of each channel must come from what is stored: the weight and
    bias of a norm, rows of a site, a vector. ``program`` is not changed; every channel is a block of its own.
    """
    context = _Context(program)
    found: list[Channels] = []
    refused: dict[str, str] = {}
    for site in program.site_order():
        if site.name in refused or any(site.name in one.consumed for one in found):
            continue
        try:
            found.append(_Factors(context, site).channels())
        except RefusedError as refusal:
            refused |= dict.fromkeys(site.group, str(refusal))
    return Found(tuple(found), refused)


class ConstantReaders:
    """Who reads the memory of a stored tensor: only what one node reads, under one name, may be rewritten."""

    def __init__(self, program: Program) -> None:
        """Look at every constant of the graph."""
        self.module = program.module
        self._nodes: dict[tuple[object, ...], list[fx.Node]] = {}
        self._names: dict[tuple[object, ...], set[str]] = {}
        for node in program.graph.nodes:
            value = attribute(self.module, str(node.target)) if node.op == "get_attr" else None
            if isinstance(value, Tensor):
                self._nodes.setdefault(memory(value), []).append(node)
        named = [*self.module.named_parameters(remove_duplicate=False)]
        for name, tensor in [*named, *self.module.named_buffers(remove_duplicate=False)]:
            self._names.setdefault(memory(tensor), set()).add(name)

    def require_sole(self, name: str) -> None:
        """Refuse the tensor of this name unless one node reads it, and under this name only."""
        key = memory(attribute(self.module, name))
        others = sorted(self._names.get(key, set()) - {name})
        if others:
            raise RefusedError(f"{name} shares its memory with {others[0]}")
        readers = [user for node in self._nodes.get(key, []) for user in node.users if user.target not in IGNORED]
        if len(readers) > 1:
            raise RefusedError(f"{name} is read more than once, by %{readers[0].name} and %{readers[1].name}")


class _Context:
    """What all regions of a program need to know of it.

    Attributes:
        stopped: values whose last axis is known to stay in its order, with the reason.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.readers = ConstantReaders(program)
        self.products = {use.node: (site, use) for site in program.sites.values() for use in site.uses}
        self.stopped: dict[fx.Node, str] = {}
        self._relations: dict[fx.Node, Relation] = {}

    def relation(self, node: fx.Node) -> Relation:
        if node not in self._relations:
            self._relations[node] = relation(node)
        return self._relations[node]


@dataclass(frozen=True)
class _End:
    """Where channels are stored: the indices along part of an axis of a tensor, and the site that consumes them."""

    tensor: str
    axis: int
    start: int
    indices: Axis
    consumer: str | None = None


class _Region:
    """The values that the channels at one site's input run through."""

    def __init__(self, context: _Context, site: Site) -> None:
        self.context = context
        self.site = site
        self.axes = Axes()
        self.whole = Index(site.shape[1])
        self._explore()

    def channels(self) -> Channels:
        """Return the largest channels that may be reordered here.

        Raises:
            RefusedError: there are none.
        """
        free = [part for part in self.whole.parts() if not part.fixed]
        if not free:
            reason = next(str(part.fixed) for part in self.whole.parts())
            for node in self.axes.known:
                if self.axes.of(node, rank(node) - 1) == self.whole.parts():
                    self.context.stopped[node] = reason
            raise RefusedError(reason)
        return self._channels(max(free, key=lambda one: one.size))

    def _explore(self) -> None:
        """Follow the indices from value to value, as long as something is learnt, or until all are fixed."""
        start = self.site.uses[0].input
        self.axes.set(start, rank(start) - 1, [self.whole])
        waiting = deque([start])
        while waiting and not all(part.fixed for part in self.whole.parts()):
            node = waiting.popleft()
            if node in self.context.stopped and self.axes.of(node, rank(node) - 1) == self.whole.parts():
                self.whole.fix(self.context.stopped[node])
                return
            waiting.extend(self._cross_source(node))
            for user in node.users:
                waiting.extend(self._cross_reader(user, node))

    def _cross_source(self, node: fx.Node) -> Iterator[fx.Node]:
        """Carry what is known of a value over the operator that computes it."""
        if node.op == "placeholder":
            self._fix(node, range(rank(node)), f"%{node.name} is an input of the model")
        elif node in self.context.products or self._is_piece(node):
            self._fix(node, range(rank(node) - 1), f"%{node.name} has another axis for them")
        elif node.op != "get_attr":
            yield from self._relate(node)

    def _cross_reader(self, user: fx.Node, node: fx.Node) -> Iterator[fx.Node]:
        """Carry what is known of a value over an operator that reads it."""
        product = self.context.products.get(user)
        if product is not None:
            inner = node is product[1].input
            self._fix(node, range(rank(node) - inner), f"%{user.name} multiplies along another axis")
        elif user.op == "output":
            self._fix(node, range(rank(node)), f"%{node.name} is a result of the model")
        elif is_cut(user) or self._is_piece(user):
            self._fix(node, range(rank(node)), f"%{user.name} cuts them into pieces")
        else:
            yield from self._relate(user)

    def _relate(self, node: fx.Node) -> Iterator[fx.Node]:
        found = self.context.relation(node)
        for one, axis, reason in found.fixed:
            self._fix(one, [axis], reason)
        for tie in found.ties:
            yield from self.axes.apply(tie)

    def _is_piece(self, node: fx.Node) -> bool:
        part = part_of(node)
        return part is not None and sizes(part[0])[-1] != sizes(node)[-1]

    def _fix(self, node: fx.Node, axes: Sequence[int], reason: str) -> None:
        for axis in axes:
            for index in self.axes.of(node, axis):
                index.fix(reason)

    def _channels(self, free: Index) -> Channels:
        ends = [end for end in self._ends() if free in end.indices]
        shared = [one for one in ends[0].indices if one is not free and all(one in end.indices for end in ends)]
        return self._collect(ends, [*shared, free], free.size)

    def _collect(self, ends: Sequence[_End], order: Sequence[Index], size: int) -> Channels:
        produced, consumed = ([end for end in ends if (end.consumer is None) is kind] for kind in (True, False))
        if not produced:
            raise RefusedError("nothing that is stored produces them")
        for end in ends:
            if len(set(end.indices)) < len(end.indices):
                raise RefusedError(f"an axis of {end.tensor} has the same index twice")
        for tensor in {end.tensor for end in ends}:
            self.context.readers.require_sole(tensor)
        return Channels(
            math.prod(one.size for one in order) // size,
            size,
            tuple(_stretch(end, order) for end in produced),
            {str(end.consumer): _stretch(end, order) for end in consumed},
        )

    def _ends(self) -> Iterator[_End]:
        """Yield the stored axes that the indices end at."""
        for node in self.axes.known:
            if node.op == "get_attr":
                for axis in range(rank(node)):
                    if indices := self.axes.of(node, axis):
                        yield _End(str(node.target), axis, 0, indices)
                continue
            last = self.axes.of(node, rank(node) - 1) if rank(node) else []
            if not last:
                continue
            for user in node.users:
                site, use = self.context.products.get(user, (None, None))
                if site is not None and use is not None and use.input is node:
                    yield _End(site.weight_name, 0 if site.transposed else 1, 0, last, site.name)
            source = (node, 0) if node in self.context.products else self._piece(node)
            if source is not None:
                product, start = source
                site, use = self.context.products[product]
                yield _End(site.weight_name, 1 if site.transposed else 0, start, last)
                if use.bias is not None:
                    yield _End(str(use.bias.target), 0, start, last)

    def _piece(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """Return the product that a piece is cut from, and where it begins; ``None`` if the value is no piece.

        Raises:
            RefusedError: it is cut from something else.
        """
        part = part_of(node)
        if part is None or not self._is_piece(node):
            return None
        whole, start = part
        while whole not in self.context.products:
            if not self.context.relation(whole).ties or not self._keeps_last_axis(whole):
                raise RefusedError(f"%{node.name} is a piece of %{whole.name}, which is not the result of a site")
            whole = whole.all_input_nodes[0]
        return whole, start

    def _keeps_last_axis(self, node: fx.Node) -> bool:
        """Tell whether the last axis of a value is that of what it is made from, which has no other reader."""
        source, last = node.all_input_nodes[0], rank(node) - 1
        kept = any(
            tie.first is source and tie.first_axes == (rank(source) - 1,) and tie.second_axes == (last,)
            for tie in self.context.relation(node).ties
        )
        readers = [user for user in source.users if user.target not in IGNORED]
        return kept and len(readers) == 1


class _Factors(_Region):
    """The values that take a factor from what is stored to one input of sites."""

    def _explore(self) -> None:
        """Follow a factor backwards; then carry the indices over what it went through."""
        start = self.site.uses[0].input
        for user in start.users:
            product = self.context.products.get(user)
            if user not in _ignored(start) and (product is None or product[1].input is not start):
                raise RefusedError(
                    f"%{user.name} reads %{start.name} too, and is no site that could take the factor on"
                )
        self.path = self._trace(start)
        self.axes.set(start, rank(start) - 1, [self.whole])
        waiting = deque([start])
        while waiting:
            node = waiting.popleft()
            for one in (node, *node.users):
                ties = self.context.relation(one).ties if one in self.path and not self._ends_at(one) else []
                for tie in ties:
                    if tie.first in self.path:
                        waiting.extend(self.axes.apply(tie))

    def channels(self) -> Channels:
        """Return all channels here, each of which may have a factor of its own.

        Raises:
            RefusedError: there are none.
        """
        ends = list(self._ends())
        for node in self.path:
            if self._ends_at(node) and not self.axes.indices(node):
                raise RefusedError(f"%{node.name} has one value for all of them")
        order = [one for one in ends[0].indices if all(one in end.indices for end in ends)]
        if not order:
            raise RefusedError("nothing that is stored has all of them")
        return self._collect(ends, order, 1)

    def _ends_at(self, node: fx.Node) -> bool:
        return node.op == "get_attr" or node in self.context.products or self._is_piece(node)

    def _trace(self, node: fx.Node) -> set[fx.Node]:
        """Return the values that a factor of ``node`` runs through, to where it is stored."""
        if self._ends_at(node):
            return {node}
        refusal = RefusedError(f"%{node.name} ({operator_name(node)}) does not pass factors on")
        for operands in scaled_operands(node):
            try:
                found = {node}
                for operand in operands:
                    others = [user for user in operand.users if user is not node and user not in _ignored(operand)]
                    if others:
                        raise RefusedError(f"%{others[0].name} reads %{operand.name} too")
                    found |= self._trace(operand)
            except RefusedError as reason:
                refusal = reason
            else:
                return found
        raise refusal


def _ignored(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target in IGNORED]


def _stretch(end: _End, order: Sequence[Index]) -> Stretch:
    """Number the positions of a stored axis by the channels ``order`` and by everything else."""
    others = [one for one in end.indices if one not in order]
    shape = [one.size for one in end.indices]
    length = math.prod(shape)
    coordinates = torch.unravel_index(torch.arange(length), shape)
    place = dict(zip(end.indices, coordinates, strict=True))

    def number(indices: Sequence[Index]) -> Tensor:
        total = torch.zeros(length, dtype=torch.int64)
        for one in indices:
            total = total * one.size + place[one]
        return total

    return Stretch(end.tensor, end.axis, end.start, number(order), number(others))
