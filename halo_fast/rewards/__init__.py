"""The reward model: one pass gives the scores of a video and of all its patches."""

from halo_fast.rewards.base import Backbone, RewardConfig, RewardModelConfig, Rewards
from halo_fast.rewards.clips import LabelledClips
from halo_fast.rewards.latent import LatentReward, train_latent_reward
from halo_fast.rewards.losses import calibrate, preference_loss, score_loss
from halo_fast.rewards.model import RewardModel
from halo_fast.rewards.training import train_reward_model

__all__ = [
    "Backbone",
    "LabelledClips",
    "LatentReward",
    "RewardConfig",
    "RewardModel",
    "RewardModelConfig",
    "Rewards",
    "calibrate",
    "preference_loss",
    "score_loss",
    "train_latent_reward",
    "train_reward_model",
]
