"""Objectives: what is done with the [N, f, h, w] tables of patch errors. A file each; small plain PyTorch."""

from halo_fast.loss.inputs import Inputs
from halo_fast.loss.objectives.base import Objective, PairObjective, Preferences, Table
from halo_fast.loss.objectives.beta import AutoBeta, convert_beta, timestep_weight
from halo_fast.loss.objectives.granular import GranDPO
from halo_fast.loss.objectives.kto import DiffusionKTO
from halo_fast.loss.objectives.labels import local_dpo_rewards, video_dpo_rewards
from halo_fast.loss.objectives.mapo import MaPO
from halo_fast.loss.objectives.pooled import PooledDPO
from halo_fast.loss.objectives.presets import PRESETS, Spec, build
from halo_fast.loss.objectives.regression import WeightedRegression

__all__ = [
    "PRESETS",
    "AutoBeta",
    "DiffusionKTO",
    "GranDPO",
    "Inputs",
    "MaPO",
    "Objective",
    "PairObjective",
    "PooledDPO",
    "Preferences",
    "Spec",
    "Table",
    "WeightedRegression",
    "build",
    "convert_beta",
    "local_dpo_rewards",
    "timestep_weight",
    "video_dpo_rewards",
]
