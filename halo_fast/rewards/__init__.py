"""The reward model: one pass gives the scores of a video and of all its patches."""

from halo_fast.rewards.losses import calibrate, preference_loss, score_loss
from halo_fast.rewards.model import RewardModel, RewardModelConfig, Rewards
from halo_fast.rewards.training import LabelledClips, fit

__all__ = [
    "LabelledClips",
    "RewardModel",
    "RewardModelConfig",
    "Rewards",
    "calibrate",
    "fit",
    "preference_loss",
    "score_loss",
]
