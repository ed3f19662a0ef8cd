"""Preference pairs: two candidates of one prompt, with the rewards of both for the video and for every patch."""

from dataclasses import dataclass, field

from torch import Tensor

__all__ = [
    "Pair",
]


@dataclass(frozen=True)
class Pair:
    """Two clips of one prompt as the trainer takes them; the rewards say where which of them is better.

    Args:
        latents: [2, *latent_shape] in model space.
        conditions: what `Family.encode_prompts` made of the prompt.
        patch_rewards: [2, f, h, w]; NaN is not labelled.
        video_rewards: [2]; NaN is not labelled.
    """

    latents: Tensor
    conditions: dict[str, Tensor]
    patch_rewards: Tensor
    video_rewards: Tensor


@dataclass
class PairsConfig:
    """Preference pairs out of the scored candidates.

    Args:
        patch_delta: patches whose rewards differ by no more than this are ties; the loss has its own, train.objective.
        video_delta: videos whose rewards differ by no more than this are ties; a pair of nothing but ties is left out.
        dimensions: weight of each video dimension in the video reward.
    """

    patch_delta: float = 0.4
    video_delta: float = 0.0
    dimensions: dict[str, float] = field(
        default_factory=lambda: {"visual_quality": 1.0, "text_alignment": 1.0, "dynamic_degree": 1.0}
    )
