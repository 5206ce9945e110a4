"""A captured model and the typed view of its compressible weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from slimc.errors import InputError
from slimc.runtime.packing import PackedLinear

if TYPE_CHECKING:
    import networkx as nx

EMBEDDINGS = frozenset({torch.ops.aten.embedding.default, torch.ops.aten.embedding_bag.default})
"""Operators that look rows of a constant up."""


@dataclass(frozen=True)
class Use:
    """One product of a site's weight with an activation, as it was captured.

    Attributes:
        node: the product: ``linear``, ``addmm``, ``mm`` or ``matmul``.
        input: the activation, read at ``node.args[input_position]``.
        weight: the operand after it: the parameter itself, or a transposition of it.
        bias: the constant that the product adds, if any.
        transposed: the parameter is stored as ``[in, out]``, not as ``[out, in]``.
    """

    node: fx.Node
    input: fx.Node
    input_position: int
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool

    @property
    def product_reads_transposed(self) -> bool:
        """Whether the product takes its weight as ``[in, out]``; only ``linear`` does not."""
        return self.node.target is not torch.ops.aten.linear.default


@dataclass
class Site:
    """One compressible weight, always looked at as ``[out_features, in_features]``.

    Attributes:
        name: path of the module that owns the weight (the weight's own name if that is the model itself).
        weight_name: fully qualified name of the parameter in the captured module.
        shape: ``(out_features, in_features)``.
        dtype: of the dense weight.
        uses: every product that reads it, in data-flow order.
        group: names of all sites that read the same input (q/k/v, gate/up), this one included.
        modules: paths of the modules that hold the weight (more than one when it is shared).
        packed: the compressed form, once a sweep has produced it.
        written: the graph nodes that hold the compressed form.
        bias: what the compressed site adds in place of its dense bias, once a sweep has found something else.
    """

    name: str
    weight_name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    uses: tuple[Use, ...]
    modules: tuple[str, ...]
    group: tuple[str, ...] = ()
    packed: PackedLinear | None = None
    written: list[fx.Node] = field(default_factory=list)
    bias: Tensor | None = None

    @property
    def transposed(self) -> bool:
        """Whether the parameter is stored as ``[in, out]``."""
        return self.uses[0].transposed


@dataclass(frozen=True)
class LeftAlone:
    """A weight of two or more dimensions that is not a site, and the reason."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass
class Program:
    """The exported graph with its sites.

    ``module`` holds the user's own parameters (no copy); rewriting the graph never touches the user's model.
    ``replaced`` has the dense tensors that differ from the user's, by name.
    """

    module: fx.GraphModule
    sites: dict[str, Site]
    left: list[LeftAlone]
    keywords: tuple[str, ...]
    positional: int
    replaced: dict[str, Tensor] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.module.graph

    def dense_weight(self, site: Site) -> Tensor:
        """Return the site's dense weight as ``[out_features, in_features]`` in its own dtype (a view)."""
        weight: Tensor = attribute(self.module, site.weight_name)
        return weight.detach().t() if site.transposed else weight.detach()

    def replace(self, name: str, tensor: Tensor) -> None:
        """Set a parameter or buffer of the captured module to another tensor of its shape; the user's model stays."""
        path, _, last = name.rpartition(".")
        owner = self.module.get_submodule(path)
        if last in owner._parameters:
            owner._parameters[last] = torch.nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[last] = tensor
        self.replaced[name] = tensor

    def placeholders(self) -> list[fx.Node]:
        """Return the input nodes in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def flatten_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the flat inputs of one call, in the order of the placeholders.

        Raises:
            InputError: the call does not have the arguments that the model was captured with.
        """
        if len(args) != self.positional or set(kwargs) != set(self.keywords):
            raise InputError(
                f"A calibration batch has {len(args)} positional arguments and the keywords {sorted(kwargs)}, but the "
                f"model was captured with {self.positional} and {sorted(self.keywords)}; give all the same form."
            )
        ordered = {name: kwargs[name] for name in self.keywords}
        leaves, _ = torch.utils._pytree.tree_flatten((args, ordered))
        expected = len(self.placeholders())
        if len(leaves) != expected:
            raise InputError(f"A calibration batch has {len(leaves)} inputs, the captured model takes {expected}.")
        return leaves

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph in its present form, in plain PyTorch."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def site_order(self) -> Iterator[Site]:
        """Yield the sites in data-flow order (by their last use)."""
        position = {node: index for index, node in enumerate(self.graph.nodes)}
        yield from sorted(self.sites.values(), key=lambda site: max(position[use.node] for use in site.uses))

    def digraph(self) -> nx.DiGraph:
        """Return the data flow as a networkx graph of node names, for questions and pictures."""
        import networkx as nx

        graph = nx.DiGraph()
        for node in self.graph.nodes:
            graph.add_node(node.name, op=node.op, target=str(node.target))
            graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
        return graph


def attribute(module: torch.nn.Module, name: str) -> Any:
    """Return the attribute at a dotted path."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def shared_storage(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Map every name to the first name that views the same memory in the same way."""
    first: dict[tuple[Any, ...], str] = {}
    return {name: first.setdefault(memory(tensor), name) for name, tensor in tensors}


def memory(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that two tensors share exactly if they are the same view of the same storage."""
    view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return (tensor.untyped_storage()._cdata, *view)
