"""BiasCorrection: what a compressed site's output lacks on average is added to its bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slimc.errors import RecipeError
from slimc.passes.base import Pass, SitePass, Statistic
from slimc.passes.work import SiteWork


@dataclass(frozen=True)
class BiasCorrection(SitePass):
    """``b' = b + mean(X_dense) W^T - mean(X) W_c^T``: the mean error of the output becomes zero on calibration tokens.

    ``X`` is what the compressed site reads and ``W_c`` all that it multiplies by, adapters included. ``X_dense`` is
    what the site reads in the dense model, where a pass such as ``compensate`` has the sweep compute that beside;
    else it is ``X``. (M. Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV
    2019, section 4.2.)

    Only a bias that is there already is corrected, and that nothing else adds: that costs nothing. None is made where
    there is none, for that would be one more operation at every call (layers that are computed together add their
    biases after the product).
    """

    name: ClassVar[str] = "bias_correction"
    compresses: ClassVar[bool] = False

    def statistics(self) -> frozenset[Statistic]:
        """The mean of the inputs."""
        return frozenset({"activations"})

    def check_after(self, earlier: Sequence[Pass]) -> None:
        """There must be an error, and nothing may change it afterwards."""
        names = [one.name for one in earlier]
        if self.name in names:
            raise RecipeError("bias_correction appears twice: the second would find nothing. Remove one of the two.")
        if not {"quantize", "prune", "decompose", "per_site"} & set(names):
            raise RecipeError("bias_correction has no error to correct: put quantize, prune or decompose before it.")

    def apply(self, work: SiteWork) -> None:
        """Add the mean error to the bias of the site."""
        bias, _ = work.own_bias()
        if bias is None or not work.reached:
            return
        statistics = work.require_statistics(self.name)
        stored = work.pack().decode().float()
        missing = work.dense @ statistics.dense_mean - stored @ statistics.mean
        work.bias = (bias.float() + missing).to(bias.dtype)
        work.shift = work.bias.float() - bias.float()
