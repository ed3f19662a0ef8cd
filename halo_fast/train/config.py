"""Settings of training."""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["ObjectiveConfig", "TrainConfig"]


@dataclass
class ObjectiveConfig:
    """Gran-DPO, under the names of halo_fast.GranDPO.

    Args:
        video_weight: weight of the video's preference.
        patch_weight: weight of the patches' preferences.
        video_beta: inverse temperature of the video's preference.
        patch_beta: inverse temperature of the patches' preferences; null for video_beta / sqrt(patches).
        patch_gamma: exponent of the reward gap that weighs a patch.
        patch_delta: patches whose rewards differ by no more than this teach nothing.
        video_delta: videos whose rewards differ by no more than this teach nothing.
        sft_weight: supervised term on the winning clip.
        patch_sft_weight: supervised term on the winning patches.
        anchor_weight: pull of both samples to the reference's predictions; needs the reference in the loop.
        loser_guard: "video" or "patch" scales the loser's gradient so that the winner's error does not rise; null: off.
    """

    video_weight: float = 0.05
    patch_weight: float = 1.0
    video_beta: float = 100.0
    patch_beta: float | None = 10.0
    patch_gamma: float = 0.0
    patch_delta: float = 0.4
    video_delta: float = 0.0
    sft_weight: float = 0.0
    patch_sft_weight: float = 0.5
    anchor_weight: float = 0.0
    loser_guard: Literal["video", "patch"] | None = None


@dataclass
class TrainConfig:
    """Training of a LoRA, or of the weights themselves.

    Args:
        objective: the loss.
        learning_rate: peak of the schedule.
        lr_scheduler: "constant", "linear" or "cosine" to 0, after the warm-up.
        lr_warmup_steps: steps of linear warm-up.
        max_train_steps: optimiser steps.
        reference_draws: noises and times of each pair at which the reference's errors are computed once, beforehand;
            null: new ones at each visit, with the reference in the loop.
        train_batch_size: pairs in a batch of one process.
        gradient_accumulation_steps: batches of each process in a step.
        rank: of the LoRA matrices; 0 trains the weights themselves, in float32.
        lora_alpha: LoRA scale times rank.
        target_modules: layers that get LoRA, by the end of their names; null for the attention of the model's family.
            At rank 0 the layers that are trained; null for all.
        max_grad_norm: gradients are clipped to this norm.
        schedule: "batched", all samples at once; "margin_first", one sample at a time with the same gradient; "auto":
            the first unless its activations do not fit.
        skip_below: margin_first draws a pair whose coefficients are below this share of their first values with a
            probability in proportion, so that it mostly needs no backward pass; 0: no pair is left out.
        gradient_checkpointing: recompute activations in the backward pass: "none", "full", or "selective", which keeps
            outputs that took much work for their size: of attention, and of layers wider in than out.
        offload_activations: keep activations in the CPU's memory until the backward pass.
        compile: compile the model's blocks.
        attention_backend: diffusers' name of it ("native", "flash", "xformers", ...); null: as the model has it.
        mixed_precision: "no" or "bf16", as in accelerate.
        auto_beta: steer video_beta, and patch_beta with it, so that the mean gradient factor is this; null: constant.
        checkpointing_steps: steps between two checkpoints.
        checkpoints_total_limit: newest checkpoints that are kept; null: all.
        logging_steps: steps between two readings of the log from the device; every step has its row.
        report_to: trackers beside log.csv: "tensorboard", "wandb".
        loss_spike_factor: training stops when the loss over 5 steps exceeds its median before by this; null: never.
        winner_alarm: share by which the error on winning patches may rise above the reference's before it is told;
            its root is how far the policy has moved, in units of how far the reference is from the truth.
        off_policy_pairs: pairs whose base errors are compared before training, to tell clips that are not the model's.
        off_policy_fresh: of these, pairs that are also sampled anew for comparison, which costs two clips each.
        heldout_share: share of the prompts whose pairs are kept out of training for diagnostics.csv.
        heldout_pairs: pairs of these that are looked at.
        heldout_draws: noises and times that each of them is looked at with.
        diagnostics_steps: steps between two rows of diagnostics.csv.
        validation_prompts: prompts of previews, base beside policy; null for none.
        validation_steps: steps between two previews; the first is made before training.
        network: part of the pipeline that is trained, where there are several: "transformer_2" is Wan 2.2's expert for
            low noise; null for its first.
        seed: of LoRA weights, order of pairs, noise and timesteps.
    """

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    learning_rate: float = 2e-3
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 10
    max_train_steps: int = 120
    reference_draws: int | None = 4
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    rank: int = 16
    lora_alpha: int = 16
    target_modules: list[str] | None = None
    max_grad_norm: float = 1.0
    schedule: Literal["auto", "batched", "margin_first"] = "auto"
    skip_below: float = 0.0
    gradient_checkpointing: Literal["none", "full", "selective"] = "none"
    offload_activations: bool = False
    compile: bool = False
    attention_backend: str | None = None
    mixed_precision: Literal["no", "bf16"] = "no"
    auto_beta: float | None = None
    checkpointing_steps: int = 50
    checkpoints_total_limit: int | None = None
    logging_steps: int = 10
    report_to: list[str] = field(default_factory=list)
    loss_spike_factor: float | None = 5.0
    winner_alarm: float | None = 0.5
    off_policy_pairs: int = 16
    off_policy_fresh: int = 0
    heldout_share: float = 0.1
    heldout_pairs: int = 16
    heldout_draws: int = 4
    diagnostics_steps: int = 20
    validation_prompts: list[str] | None = None
    validation_steps: int = 500
    network: str | None = None
    seed: int = 0
