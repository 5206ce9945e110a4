"""How much the outputs of each site matter to the output of the model: gradients at every site, for sampled tokens.

To second order, changing the outputs of a site by ``d_t`` at token ``t`` moves what the model says by

    D = 1/2 E[(sum_t g_t . d_t)^2]

where ``g_t`` are gradients of one random scalar ``z`` of the model's output. What D measures is decided by z:

- *A language model:* ``z = sum log p(sampled token)``, with tokens drawn from the model's own distribution. The
  expectation of ``g g^T`` is then the Fisher information, and D the Kullback-Leibler divergence of the changed
  distribution from the dense one, in nats.
- *Any other model:* ``z = <r, y> / |y|`` with normal noise r: the expectation is the Gauss-Newton matrix, and D half
  the squared relative error of the output.

Errors of different tokens are taken as independent, so that D is a sum over tokens; one draw of z serves them all. It
is told a token that is predicted, or a batch of a model that predicts none. For that the gradients are scaled, so that
it is ``1/2 mean_t (g_t . d_t)^2`` over the sampled tokens of any site, however many arrive there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slimc.errors import CaptureError, NumericsError
from slimc.ir.program import Program, Site, Use
from slimc.passes.constants import Constants
from slimc.passes.statistics import SAMPLE_TOKENS, evenly_spaced
from slimc.passes.sweep import written_values
from slimc.progress import Progress

STAGE = "gradients"

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sample:
    """Sampled tokens of one site.

    Attributes:
        inputs: of the site, ``[tokens, in_features]``, in the model's dtype.
        gradients: at its outputs, ``[tokens, out_features]``, scaled as the module's documentation says.
    """

    inputs: Tensor
    gradients: Tensor

    def damage(self, differences: Tensor) -> float:
        """Return what adding ``differences``, float32 ``[tokens, out_features]``, to the outputs does to the model."""
        moved = (differences * self.gradients.float()).sum(1, dtype=torch.float64)
        return float(moved.square().sum()) / (2 * max(len(moved), 1))


def site_samples(
    program: Program,
    batches: Sequence[Sequence[Any]],
    *,
    vocabulary: int | None,
    seed: int,
    device: torch.device | None,
    progress: Progress,
) -> dict[str, Sample]:
    """Return sampled inputs of every site of the dense model, and the gradients at its outputs.

    Args:
        program: the captured model, still dense.
        batches: flat inputs by batch.
        vocabulary: the number of logits a token if the model's first output is a language model's; else ``None``.
        seed: of what is drawn.
        device: where to compute; ``None`` is the device of the model.
        progress: told once a batch.

    Returns:
        About as many tokens of each site as :data:`slimc.passes.statistics.SAMPLE_TOKENS`.

    Raises:
        CaptureError: the outputs do not depend on a site in a way that gradients can follow.
        NumericsError: a gradient is NaN or infinite.
    """
    run = _Run(program, device, len(batches))
    taken: dict[str, list[_Taken]] = {name: [] for name in program.sites}
    told = 0
    progress.start(STAGE, len(batches))
    for index, batch in enumerate(batches):
        with torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(seed + index)
            z, count = _scalar(run.outputs(batch), vocabulary)
            gradients = torch.autograd.grad(z, run.products, allow_unused=True, materialize_grads=True)
        told += count
        for (site, positions, inputs), product, gradient in zip(run.inputs, run.products, gradients, strict=True):
            rows = gradient.reshape(-1, product.shape[-1])
            taken[site.name].append(_Taken(inputs, rows[positions], len(rows)))
        run.forget()
        progress.advance(STAGE)
    progress.finish(STAGE)
    return {name: _sample(parts, told, name) for name, parts in taken.items()}


@dataclass(frozen=True)
class _Taken:
    """The tokens that were taken of one product in one batch, and of how many."""

    inputs: Tensor
    gradients: Tensor
    tokens: int


def _sample(parts: Sequence[_Taken], told: int, where: str) -> Sample:
    """Put the tokens of a site together; a token counts for all those beside which it was taken."""
    size = sum(len(part.inputs) for part in parts)
    scales = [math.sqrt(part.tokens / max(len(part.inputs), 1) * size / told) for part in parts]
    gradients = torch.cat([part.gradients * scale for part, scale in zip(parts, scales, strict=True)])
    if not bool(gradients.isfinite().all()):
        raise NumericsError(
            f"The gradient at '{where}' holds NaN or Inf. Check that the dense model runs without NaN in this dtype on "
            "this text, or load it in bfloat16 or float32."
        )
    return Sample(torch.cat([part.inputs for part in parts]), gradients)


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

    def __init__(self, program: Program, device: torch.device | None, batches: int) -> None:
        super().__init__(program.module)
        self.constants = Constants(program.module, device)
        self.uses: Mapping[fx.Node, tuple[Site, Use]] = {
            use.node: (site, use) for site in program.sites.values() for use in site.uses
        }
        self.inputs: list[tuple[Site, Tensor, Tensor]] = []
        self.products: list[Tensor] = []
        self._batches = batches
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
        rows = self.env[use.input].detach().reshape(-1, site.shape[1])
        positions = evenly_spaced(len(rows), -(-SAMPLE_TOKENS // (self._batches * len(site.uses)))).to(rows.device)
        self.inputs.append((site, positions, rows[positions]))
        self.products.append(product)
        return product
