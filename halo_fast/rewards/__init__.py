"""The reward model: one pass gives the scores of a video and of all its patches."""

from halo_fast.rewards.model import RewardModel, RewardModelConfig, Rewards
from halo_fast.rewards.scoring import score, score_columns
from halo_fast.rewards.training import LabelledClips, fit, read_labels, score_loss, train_reward

__all__ = [
    "LabelledClips",
    "RewardModel",
    "RewardModelConfig",
    "Rewards",
    "fit",
    "read_labels",
    "score",
    "score_columns",
    "score_loss",
    "train_reward",
]
