"""The passes, each usable alone and in any order that :func:`check_order` accepts."""

from slimc.passes.activations import Activations
from slimc.passes.allocate_bits import AllocateBits
from slimc.passes.base import Pass, SitePass
from slimc.passes.bias_correction import BiasCorrection
from slimc.passes.calibrate import Calibrate
from slimc.passes.compensate import Compensate
from slimc.passes.decompose import Decompose
from slimc.passes.fuse import Fuse
from slimc.passes.low_rank import LowRank
from slimc.passes.per_site import PerSite
from slimc.passes.permute import Permute
from slimc.passes.pipeline import PASSES, check_order, from_config
from slimc.passes.prune import Prune
from slimc.passes.quantize import Quantize
from slimc.passes.scale_folding import ScaleFolding
from slimc.passes.tune import Tune

__all__ = [
    "PASSES",
    "Activations",
    "AllocateBits",
    "BiasCorrection",
    "Calibrate",
    "Compensate",
    "Decompose",
    "Fuse",
    "LowRank",
    "Pass",
    "PerSite",
    "Permute",
    "Prune",
    "Quantize",
    "ScaleFolding",
    "SitePass",
    "Tune",
    "check_order",
    "from_config",
]
