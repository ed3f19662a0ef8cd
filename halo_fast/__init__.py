"""Preference alignment of text-to-video diffusion models at patch granularity."""

from halo_fast.loss.backends import using_backend
from halo_fast.loss.functional import (
    gran_dpo,
    gran_dpo_coefficients,
    patch_error,
    patch_log_ratio,
    patch_weighted_mse,
    unpack_tokens,
)
from halo_fast.loss.objectives import PRESETS, AutoBeta, GranDPO, convert_beta, timestep_weight
from halo_fast.loss.output import GranDPOOutput
from halo_fast.patches import PatchGrid, guard_band

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AutoBeta",
    "GranDPO",
    "GranDPOOutput",
    "PatchGrid",
    "__version__",
    "convert_beta",
    "gran_dpo",
    "gran_dpo_coefficients",
    "guard_band",
    "patch_error",
    "patch_log_ratio",
    "patch_weighted_mse",
    "timestep_weight",
    "unpack_tokens",
    "using_backend",
]
