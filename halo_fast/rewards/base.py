"""What every part of the reward model shares: its settings, its scores and the protocol of the network behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from annotated_types import Ge, Gt, Interval
from torch import Tensor

from halo_fast.families.quantization import Quantization
from halo_fast.patches import LatentFactors, PatchGrid
from halo_fast.train.optimizers import Optimizer

__all__ = ["Backbone", "Calibration", "RewardConfig", "RewardModelConfig", "Rewards"]

Calibration = tuple[tuple[float, float], ...]
"""Slope and offset of the logit of each dimension."""


@dataclass
class RewardConfig:
    """Reward model: the video phase first, then the same weights in the patch phase.

    Args:
        video_steps: optimiser steps of the video phase.
        patch_steps: optimiser steps of the patch phase.
        learning_rate: peak of the schedule of either phase. The default is that of the small backbones; a
            vision-language model needs about 1e-5, by LoRA 1e-4.
        batch_size: clips in a step.
        video_weight: weight of the video loss in the patch phase, which keeps the video scores from being forgotten.
        patch_weight: weight of the patch loss in the patch phase.
        swap_weight: weight of the preference for a clip's own prompt over another clip's, in text_alignment.
        motion_weight: weight of two preferences in dynamic_degree: for a clip over a frozen copy of it, and for its
            prompt over that of the opposite motion, which needs word evidence.
        mirror: "horizontal" mirrors clips with their labels and exchanges left and right in their prompts. "both" also
            turns them upside down, which is false where things fall or stand on ground. "none" leaves them alone.
        loss: "regression", "bradley_terry", "bradley_terry_ties" or "combined" (regression and Bradley-Terry).
        tie_margin: scores that differ by no more are a tie to the preference losses.
        held_out_share: share of the prompts whose clips calibrate the scores instead of training them.
        examples: registered or dotted name of further labelled clips that train beside the run's own; null for none.
        num_examples: how many of them.
        pretrained: add pretrained frame features and a prompt encoder to the backbone "compact" (the extra "reward").
        backbone: "compact" or "frames"; a vision-language model's folder or hub name; or your own as
            "package.module:Class".
        lora_rank: rank of the LoRA matrices in a vision-language model; 0 trains its whole language model, null the
            head alone.
        quantization: of a vision-language model's frozen language model, in 4 or 8 bits: "bnb_nf4", "bnb_int8",
            "torchao_int8" or "torchao_float8"; null for none.
        precision: of a vision-language model's frozen language model: "fp32", "bf16", or "auto", which is bf16 on a GPU
            that has it and fp32 elsewhere. What is trained is float32 always, and so is the vision tower.
        optimizer: "adamw", or "adamw_8bit", whose moments take a quarter (bitsandbytes).
        start: reward model of the same backbone that training starts from: a folder that `halo reward` wrote, or
            "fetv", which is shipped; null starts anew.
        checkpointing_steps: steps between two checkpoints.
    """

    video_steps: Annotated[int, Ge(0)] = 100
    patch_steps: Annotated[int, Ge(0)] = 900
    learning_rate: Annotated[float, Gt(0)] = 4e-3
    batch_size: Annotated[int, Ge(1)] = 16
    video_weight: Annotated[float, Ge(0)] = 1.0
    patch_weight: Annotated[float, Ge(0)] = 10.0
    swap_weight: Annotated[float, Ge(0)] = 1.0
    motion_weight: Annotated[float, Ge(0)] = 1.0
    mirror: Literal["none", "horizontal", "both"] = "horizontal"
    loss: Literal["regression", "bradley_terry", "bradley_terry_ties", "combined"] = "regression"
    tie_margin: Annotated[float, Ge(0)] = 0.2
    held_out_share: Annotated[float, Interval(ge=0, lt=1)] = 0.05
    examples: str | None = None
    num_examples: Annotated[int, Ge(1)] = 768
    pretrained: bool = True
    backbone: str = "compact"
    lora_rank: Annotated[int, Ge(0)] | None = 0
    quantization: Quantization | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    optimizer: Optimizer = "adamw"
    start: str | None = None
    checkpointing_steps: Annotated[int, Ge(1)] = 50


class Rewards(NamedTuple):
    """Scores on the rubric's scale, 1 to 5, 5 best.

    Args:
        video: [N, D] float32.
        patches: [N, Q, f, h, w] float32.
    """

    video: Tensor
    patches: Tensor


@dataclass(frozen=True)
class RewardModelConfig:
    """What fixes the weights' shapes and meaning.

    Args:
        video_dimensions: names of the video scores, in the order of Rewards.video.
        patch_dimensions: names of the patch scores, in the order of Rewards.patches.
        spatial_factor: pixels a side that one position of the latent stands for, as in PatchGrid.
        temporal_factor: frames that one latent frame stands for.
        causal: whether the first latent frame stands for one frame alone.
        padding: latent frames in front that stand for no frame.
        features_factor: pixels a side of one position of the frames' features; None for spatial_factor.
        width: channels of the compact backbone's finest stage; the next two have 3/2 and 2 times as many.
        pretrained: whether the compact backbone also has pretrained frame features and a prompt encoder.
        backbone: as in RewardConfig.
        lora_rank: as in RewardConfig.
        quantization: as in RewardConfig.
        precision: "fp32", or "bf16" for a frozen language model whose weights and products are bfloat16.
        fps: frames a second of the clips that it was trained on; None if unknown.
        video_calibration: (slope, offset) of each video dimension's logit; empty for none.
        patch_calibration: likewise of each patch dimension's.

    Raises:
        ValueError: a calibration that is not finite, would reverse the order of scores, or has another length.
    """

    video_dimensions: tuple[str, ...]
    patch_dimensions: tuple[str, ...] = ("quality",)
    spatial_factor: int = 8
    temporal_factor: int = 4
    causal: bool = True
    padding: int = 0
    features_factor: int | None = None
    width: int = 32
    pretrained: bool = True
    backbone: str = "compact"
    lora_rank: int | None = 0
    quantization: Quantization | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    fps: float | None = None
    video_calibration: Calibration = ()
    patch_calibration: Calibration = ()

    def __post_init__(self) -> None:
        for part in ("video", "patch"):
            pairs, dimensions = getattr(self, f"{part}_calibration"), getattr(self, f"{part}_dimensions")
            if not all(len(pair) == 2 and math.isfinite(sum(pair)) and pair[0] > 0 for pair in pairs):
                raise ValueError(f"{part}_calibration: expected finite (slope above 0, offset), got {pairs}")
            if pairs and len(pairs) != len(dimensions):
                raise ValueError(f"{part}_calibration: expected a pair for each of {dimensions}, got {len(pairs)}")

    def patches(self, grid: Sequence[int], size: tuple[int, int, int]) -> PatchGrid:
        """The patches (f, h, w) of clips of `size` (frames, height, width in pixels)."""
        return PatchGrid((grid[0], grid[1], grid[2]), *size, **self.factors._asdict())

    @property
    def factors(self) -> LatentFactors:
        """How the latents lie on the clips whose patches are scored."""
        return LatentFactors(self.spatial_factor, self.temporal_factor, self.causal, self.padding)

    def scoring(self, factors: LatentFactors) -> RewardModelConfig:
        """The config of the same model for clips of a generator whose latents lie otherwise on them."""
        return replace(self, **factors._asdict(), features_factor=self.features_factor or self.spatial_factor)


class Backbone(Protocol):
    """The network behind a reward model: an nn.Module built as `Class(config: RewardModelConfig)`.

    Training calls, once: frozen_features of all clips, fit_closed_form. Then in each step: encode, logits,
    video_logits_for. Scoring calls frozen_features, encode, logits.

    A backbone whose frozen features are each of one frame may say so by `features_by_frame = True`. Those of a frozen
    copy of a clip are then the clip's own at that moment; otherwise they are computed anew in each step.

    A backbone whose word evidence knows directions may have `exchange_words(evidence, words)`: the evidence [N, k] of
    clips that show each of the words where they showed the word that it becomes, as in a mirror.

    A backbone with `save_pretrained(folder)` keeps files of its own beside the weights; RewardModel.load then gives
    that folder as `config.backbone`.
    """

    negatives: int
    """Other prompts of the batch that training compares a clip's own prompt with; each is a column of
    `video_logits_for`, so a backbone that pays for every prompt says 1."""

    def frozen_features(self, videos: Tensor) -> Tensor | None:
        """Features that training does not change, which are computed once and kept in half precision.

        Args:
            videos: uint8 [N, F, H, W, 3].

        Returns:
            [N, c, f', y, x] float32; None if there are none, or they are too large to keep.
        """

    def fit_closed_form(self, frozen: Tensor | None, prompts: Sequence[str], weight: Tensor) -> Tensor | None:
        """Fit whatever has a closed form, before the first step.

        Args:
            frozen: frozen features of all training clips, half precision.
            prompts: of each clip.
            weight: [N] in [0, 1], how far each clip shows what its prompt says.

        Returns:
            [N, k], what the fit to all *other* clips predicts for each one, which `encode` gets in training in place of
            the fit itself; None without such a fit.
        """

    def encode(self, videos: Tensor, frozen: Tensor | None, word_evidence: Tensor | None = None) -> Any:
        """Features of clips, whatever the prompt.

        Args:
            videos: uint8 [N, F, H, W, 3].
            frozen: their frozen features, float32.
            word_evidence: rows of what `fit_closed_form` returned; None computes them from the fit.
        """

    def logits(self, features: Any, prompts: Sequence[str], grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits of the video scores [N, D] and of the patch scores [N, Q, f, h, w], from one pass."""

    def video_logits_for(self, features: Any, prompts: Sequence[str], others: Tensor) -> Tensor:
        """Video logits [N, M, D] of clip n with prompts[others[n, m]]; others is int64 [N, M].

        Where several processes train, `features` are of this one's share of a batch and `prompts` of the whole batch.
        """
