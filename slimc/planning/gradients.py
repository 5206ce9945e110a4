"""How much the outputs of each site matter to the output of the model: gradients at every site, for sampled tokens.

To second order, changing the outputs of a site by ``d_t`` at token ``t`` moves what the model says by

    D = 1/2 E[(sum_t g_t . d_t)^2]

where ``g_t`` are gradients of one random scalar ``z`` of the model's output. What D measures is decided by z:

- *A language model:* ``z = sum log p(sampled token)``, with tokens drawn from the model's own distribution. The
  expectation of ``g g^T`` is then the Fisher information, and D the Kullback-Leibler divergence of the changed
  distribution from the dense one, in nats.
- *Any other model:* ``z = <r, y> / |y|`` with normal noise r: the expectation is the Gauss-Newton matrix, and D half
  the squared relative error of the output.

The sum over tokens is taken before the square: errors of one weight at the tokens of a text are alike (a shift of all
values moves what every later token attends to), and summing squares instead misses a third of the damage of values,
and errs by a factor of two either way at keys. What is independent are texts (rows of a batch) and draws of z, so the
expectation is a mean over their pairs: of :data:`PAIRS`, with a relative deviation of ``sqrt(2 / PAIRS)``.

For that, all tokens of a site and their gradients are held while its choices are judged, and no more sites at a time
than :data:`HELD_BYTES` allow: what comes after them in the graph is computed anew for each such part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slimc.errors import CaptureError, NumericsError
from slimc.ir.program import Program, Site, Use
from slimc.passes.constants import Constants
from slimc.passes.sweep import written_values
from slimc.progress import Progress

STAGE = "gradients"

_TINY = torch.finfo(torch.float32).tiny


PAIRS = 128
"""Texts times draws that the expectation is taken over, at least."""

HELD_BYTES = 4 * 2**30
"""What inputs and gradients of a part of the sites may take."""


@dataclass(frozen=True)
class Sample:
    """What is known of one site to judge changes of its outputs by.

    Attributes:
        inputs: of the site, ``[tokens, in_features]``, in the model's dtype.
        gradients: at its outputs, for each draw of z, ``[draws, tokens, out_features]``.
        texts: which text a token is of, int64 ``[tokens]``.
        told: of how many tokens, or batches, D is the mean.
    """

    inputs: Tensor
    gradients: Tensor
    texts: Tensor
    told: int

    def damage(self, differences: Tensor) -> float:
        """Return what adding ``differences``, float32 ``[tokens, out_features]``, to the outputs does to the model."""
        total = 0.0
        for gradients in self.gradients:
            moved = (differences * gradients.float()).sum(1, dtype=torch.float64)
            size = int(self.texts.max()) + 1 if len(self.texts) else 0
            total += float(moved.new_zeros(size).index_add_(0, self.texts, moved).square().sum())
        return total / (2 * self.told * len(self.gradients))


class Samples(Mapping[str, Sample]):
    """The samples of all sites of the dense model, gathered when they are asked for, which is best done in order.

    Args:
        program: the captured model, still dense.
        batches: flat inputs by batch.
        vocabulary: the number of logits a token if the model's first output is a language model's; else ``None``.
        seed: of what is drawn.
        device: where to compute; ``None`` is the device of the model.
        progress: told of each part of the sites.

    Raises:
        CaptureError: (when asked) the outputs do not depend on a site in a way that gradients can follow.
        NumericsError: (when asked) a gradient is NaN or infinite.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Sequence[Any]],
        *,
        vocabulary: int | None,
        seed: int,
        device: torch.device | None,
        progress: Progress,
    ) -> None:
        """Compute nothing yet."""
        self._program = program
        self._batches = batches
        self._vocabulary = vocabulary
        self._seed = seed
        self._device = device
        self._progress = progress
        self._sites = {site.name: site for site in program.site_order()}
        self._draws = -(-PAIRS // sum(map(_texts, batches)))
        self._held: dict[str, Sample] = {}
        self._gathered = 0

    def __iter__(self) -> Iterator[str]:
        """Go through the sites in data-flow order."""
        return iter(self._sites)

    def __len__(self) -> int:
        """Count the sites."""
        return len(self._sites)

    def __getitem__(self, name: str) -> Sample:
        """Return the sample of a site; if it is not held, it and those after it take the place of those that are."""
        if name not in self._held:
            self._held = {}
            part, draws = self._part(self._sites[name])
            if not self._gathered:
                self._progress.start(STAGE, len(self))
            self._held = self._gather(part, draws)
            self._gathered += len(part)
            self._progress.advance(STAGE, len(part), note=name)
            if self._gathered == len(self):
                self._progress.finish(STAGE)
        return self._held[name]

    def _part(self, first: Site) -> tuple[list[Site], int]:
        """Return sites from ``first`` on that can be held together, and with how many draws."""
        order = list(self._sites.values())
        tokens = sum(map(_tokens, self._batches))

        def nbytes(site: Site, draws: int) -> int:
            return tokens * len(site.uses) * (site.shape[1] + draws * site.shape[0]) * site.dtype.itemsize

        draws = self._draws
        while draws > 1 and nbytes(first, draws) > HELD_BYTES:
            draws -= 1
        part: list[Site] = []
        for site in order[order.index(first) :]:
            if part and sum(nbytes(one, draws) for one in (*part, site)) > HELD_BYTES:
                break
            part.append(site)
        return part, draws

    def _gather(self, sites: Sequence[Site], draws: int) -> dict[str, Sample]:
        run = _Run(self._program, sites, self._device)
        inputs: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        gradients: dict[str, list[list[Tensor]]] = {site.name: [[] for _ in range(draws)] for site in sites}
        texts: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        told = seen = 0
        for index, batch in enumerate(self._batches):
            count = _texts(batch)
            with torch.enable_grad(), torch.random.fork_rng():
                torch.manual_seed(self._seed + index)
                outputs = run.outputs(batch)
                for draw in range(draws):
                    z, of = _scalar(outputs, self._vocabulary)
                    found = torch.autograd.grad(
                        z, run.products, allow_unused=True, materialize_grads=True, retain_graph=draw + 1 < draws
                    )
                    for (site, _), gradient in zip(run.inputs, found, strict=True):
                        gradients[site.name][draw].append(gradient.reshape(-1, site.shape[0]))
            for site, x in run.inputs:
                inputs[site.name].append(x.reshape(-1, site.shape[1]))
                texts[site.name].append(seen + _text_of_tokens(x, count))
            told, seen = told + of, seen + count
            run.forget()
        samples: dict[str, Sample] = {}
        for site in sites:
            stacked = torch.stack([torch.cat(parts) for parts in gradients.pop(site.name)])
            if not bool(stacked.isfinite().all()):
                raise NumericsError(
                    f"The gradient at '{site.name}' holds NaN or Inf. Check that the dense model runs without NaN in "
                    "this dtype on this text, or load it in bfloat16 or float32."
                )
            samples[site.name] = Sample(torch.cat(inputs.pop(site.name)), stacked, torch.cat(texts[site.name]), told)
        return samples


def _leading(batch: Sequence[Any]) -> Tensor | None:
    return next((value for value in batch if isinstance(value, Tensor) and value.dim()), None)


def _texts(batch: Sequence[Any]) -> int:
    """Return how many texts a batch has: the rows of its first tensor."""
    leading = _leading(batch)
    return 1 if leading is None else max(len(leading), 1)


def _tokens(batch: Sequence[Any]) -> int:
    """Return about how many tokens a batch has."""
    leading = _leading(batch)
    if leading is None:
        return 1
    return leading.numel() // (leading.shape[-1] if leading.is_floating_point() and leading.dim() > 1 else 1)


def _text_of_tokens(inputs: Tensor, count: int) -> Tensor:
    """Return which of a batch's ``count`` texts each token is of, int64 ``[tokens]``; one for all if nothing tells."""
    tokens = inputs.numel() // inputs.shape[-1]
    if tokens % count or not (inputs.dim() == 2 or len(inputs) == count):
        return torch.zeros(tokens, dtype=torch.int64, device=inputs.device)
    return torch.arange(tokens, device=inputs.device) // max(tokens // count, 1)


def _scalar(outputs: Sequence[Tensor], vocabulary: int | None) -> tuple[Tensor, int]:
    """Return z of the module's documentation, and of how many outputs it tells."""
    logits = next((one for one in outputs if one.shape[-1] == vocabulary), None)
    if logits is not None:
        scores = logits.reshape(-1, logits.shape[-1]).float()
        tokens = torch.multinomial(scores.detach().softmax(-1), 1).squeeze(1)
        return -torch.nn.functional.cross_entropy(scores, tokens, reduction="sum"), len(tokens)
    exact = [one.float() for one in outputs]
    parts = [(torch.randn_like(one) * one).sum() / one.detach().norm().clamp(min=_TINY) for one in exact]
    return torch.stack(parts).sum(), 1


class _Run(fx.Interpreter):
    """Runs the graph with gradients, and keeps what goes into and comes out of the products with sites' weights."""

    def __init__(self, program: Program, sites: Sequence[Site], device: torch.device | None) -> None:
        super().__init__(program.module)
        self.constants = Constants(program.module, device)
        self.uses: Mapping[fx.Node, tuple[Site, Use]] = {use.node: (site, use) for site in sites for use in site.uses}
        self.inputs: list[tuple[Site, Tensor]] = []
        self.products: list[Tensor] = []
        self._written = written_values(program.module)

    def outputs(self, batch: Sequence[Any]) -> list[Tensor]:
        """Run one batch and return the floating-point outputs that gradients reach."""
        # Copies: an in-place operator of the graph must not change the user's data.
        inputs = [self.constants.here(value).clone() if isinstance(value, Tensor) else value for value in batch]
        leaves = torch.utils._pytree.tree_leaves(self.run(*inputs))
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not outputs:
            raise CaptureError(
                "No output of the model depends on its weights in a way that gradients can follow, so nothing tells "
                "which layers matter; name a recipe instead of a budget."
            )
        return outputs

    def forget(self) -> None:
        """Make room for the next batch."""
        self.inputs, self.products = [], []

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; what a site's product computes is the start of gradients."""
        if n.op == "get_attr":
            value = self.constants[n]
            if not isinstance(value, Tensor):
                return value
            return value.detach().clone() if n in self._written else value.detach()
        if n.op == "call_module":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self.constants.submodule(str(n.target))(*args, **kwargs)
        result = super().run_node(n)
        return self._keep(result, *self.uses[n]) if n in self.uses else result

    def _keep(self, product: Tensor, site: Site, use: Use) -> Tensor:
        # Before the first site nothing asks for gradients yet.
        product = product if product.requires_grad else product.requires_grad_()
        inputs = self.env[use.input].detach()
        # What the graph writes may be something else by the time that gradients are there.
        self.inputs.append((site, inputs.clone() if self._written else inputs))
        self.products.append(product)
        return product
