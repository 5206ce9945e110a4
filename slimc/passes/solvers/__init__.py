"""The mathematics of the passes: tensors in, tensors out, with no graph, no module and no files."""

from slimc.passes.solvers.covariance import covariance_adapters, quantized_covariance_adapters
from slimc.passes.solvers.descent import descend
from slimc.passes.solvers.gptq import gptq
from slimc.passes.solvers.hessian import damped, factored, regression
from slimc.passes.solvers.joint import solve_jointly
from slimc.passes.solvers.low_rank import (
    plain_adapters,
    quantize_factor,
    resolve_rank,
    slim_adapters,
    truncated_svd,
)
from slimc.passes.solvers.pruning import magnitude_scores, nm_mask, unstructured_mask, wanda_scores
from slimc.passes.solvers.quantization import (
    Group,
    Quantized,
    activation_aware_scales,
    important_channels,
    quantize_absmax,
    quantize_slim,
    round_to_grid,
)
from slimc.passes.solvers.ranges import PRESETS, RangeSearch
from slimc.passes.solvers.slab import Decomposition, compression_ratio, kept_in_row, kept_share, slab
from slimc.passes.solvers.sparsegpt import sparsegpt

__all__ = [
    "PRESETS",
    "Decomposition",
    "Group",
    "Quantized",
    "RangeSearch",
    "activation_aware_scales",
    "compression_ratio",
    "covariance_adapters",
    "damped",
    "descend",
    "factored",
    "gptq",
    "important_channels",
    "kept_in_row",
    "kept_share",
    "magnitude_scores",
    "nm_mask",
    "plain_adapters",
    "quantize_absmax",
    "quantize_factor",
    "quantize_slim",
    "quantized_covariance_adapters",
    "regression",
    "resolve_rank",
    "round_to_grid",
    "slab",
    "slim_adapters",
    "solve_jointly",
    "sparsegpt",
    "truncated_svd",
    "unstructured_mask",
    "wanda_scores",
]
