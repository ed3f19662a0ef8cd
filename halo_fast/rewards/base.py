"""Settings of a reward model and of its training."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["RewardConfig"]


@dataclass
class RewardConfig:
    """Reward model: the video phase first, then the same weights in the patch phase.

    Args:
        video_steps: optimiser steps of the video phase.
        patch_steps: optimiser steps of the patch phase.
        learning_rate: peak of the schedule of either phase.
        batch_size: clips in a step.
        video_weight: weight of the video loss in the patch phase, where it keeps the video scores from being forgotten.
        patch_weight: weight of the patch loss in the patch phase.
        swap_weight: weight of the preference for a clip's own prompt over another clip's, in text_alignment.
        motion_weight: weight of the preference for a clip over a frozen copy of it, in dynamic_degree.
        mirror: clips are mirrored with their labels and the words left and right ("horizontal"), also upside down with
            up and down ("both"), which is false where things fall or stand on ground, or not ("none"); null: "both"
            in the demo, else "horizontal".
        loss: "regression", "bradley_terry", "bradley_terry_ties" or "combined" (regression and Bradley-Terry).
        tie_margin: scores that differ by no more are a tie to the preference losses.
        held_out_share: share of the prompts whose clips calibrate the scores instead of training them.
        examples: clips of the demo's world, damaged on purpose and scored by what was done to them, that train beside
            the run's own; null: 768 with the demo teacher. Other teachers go without: 0.
        pretrained: add pretrained frame features and a prompt encoder (the extra "reward").
        backbone: "compact", or a vision-language model of transformers: a folder or a hub name.
        lora_rank: rank of the LoRA matrices in such a model; 0 trains its whole language model.
        checkpointing_steps: steps between two checkpoints.
    """

    video_steps: int = 100
    patch_steps: int = 900
    learning_rate: float = 4e-3
    batch_size: int = 16
    video_weight: float = 1.0
    patch_weight: float = 10.0
    swap_weight: float = 1.0
    motion_weight: float = 1.0
    mirror: Literal["none", "horizontal", "both"] | None = None
    loss: str = "regression"
    tie_margin: float = 0.2
    held_out_share: float = 0.05
    examples: int | None = None
    pretrained: bool = True
    backbone: str = "compact"
    lora_rank: int = 0
    checkpointing_steps: int = 50
