"""Settings of training."""

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from halo_fast.train.optimizers import Optimizer

__all__ = ["TrainConfig", "deciding_settings"]

Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]


@dataclass
class TrainConfig:
    """Training of a LoRA, or of the weights themselves.

    Args:
        objective: the loss: a preset and the fields to change, {preset: halo_bounded, video_beta: 100}, or the name of
            a preset. `preset` takes an objective of your own as "package.module:attribute".
        learning_rate: peak of the schedule.
        lr_scheduler: "constant", "linear" or "cosine" to 0, after the warm-up.
        lr_warmup_steps: steps of linear warm-up.
        max_train_steps: optimiser steps.
        reference_draws: noises and times of each pair at which the reference's errors are computed once, before
            training; null or 0: fresh ones in every epoch, with the reference in the loop.
        noise: "shared", drawn anew for each draw, the same for both clips of a pair; or "own", the noise that each clip
            was sampled from, so that only times are drawn. Pairs whose noise is not known share theirs.
        reference: what the policy is compared with if it starts from an earlier training, as in later rounds: "base",
            the model without that training; "start", the policy as it starts. From the base itself both are the same.
        train_batch_size: pairs in a batch of one process.
        gradient_accumulation_steps: batches of each process in a step.
        rank: of the LoRA matrices; 0 trains the weights themselves, in float32.
        lora_alpha: LoRA scale times rank.
        target_modules: layers that get LoRA, by the end of their names; null for the attention of the model's family.
            At rank 0 the layers that are trained; null for all.
        optimizer: "adamw", or "adamw_8bit", whose moments take a quarter (bitsandbytes).
        max_grad_norm: gradients are clipped to this norm; .inf clips nothing.
        schedule: "batched", all samples at once; "margin_first", one sample at a time with the same gradient; "auto":
            the first unless its activations do not fit.
        gradient_checkpointing: recompute activations in the backward pass: "none", "full", or "selective", which keeps
            outputs that took much work for their size: of attention, and of layers wider in than out.
        offload_activations: keep activations in the CPU's memory until the backward pass.
        offload_blocks: keep the frozen weights of the model's blocks in the CPU's memory; a block has them on the
            device while it runs. Needs gradient_checkpointing.
        compile: compile the model's blocks.
        attention_backend: diffusers' name of it ("native", "flash", "xformers", ...); null: as the model has it.
        mixed_precision: "no" or "bf16", as in accelerate.
        auto_beta: adjust video_beta, and patch_beta with it, so that the mean of sigma(-|z|) over videos is this; null:
            constant.
        time_weights: weights of the pairs' preferences by time: equal parts of 0 (clean) to 1 (noise), as many as there
            are numbers. [0, 1, 1, 0.5] masks the first quarter and halves the last. null: 1 everywhere.
        checkpointing_steps: steps between two checkpoints.
        checkpoints_total_limit: newest checkpoints that are kept; null: all.
        logging_steps: steps between two readings of the log from the device; every step has its row.
        report_to: trackers beside log.csv: "tensorboard", "wandb".
        loss_spike_factor: training stops when the loss over 5 steps exceeds its median before by this; null: never.
        winner_alarm: share by which the error on winning patches may exceed the reference's before a warning. Its root
            is how far the policy has moved, in units of how far the reference is from the truth. null: no warning.
        displacement_alarm: share by which the errors on winners and on losers may both exceed the reference's before
            a warning. null: no warning.
        margin_alarm: mean logit beyond which a warning says that the margin is over-maximised. null: no warning.
        off_policy_pairs: pairs whose base errors are compared before training, to recognise clips of another model.
        off_policy_fresh: of these, pairs for which two clips are also sampled and compared.
        heldout_share: share of the prompts whose pairs are kept out of training for diagnostics.csv.
        heldout_pairs: pairs of these that are evaluated.
        heldout_draws: noises and times at which each of them is evaluated.
        diagnostics_steps: steps between two rows of diagnostics.csv; 0: none.
        validation_prompts: prompts of previews, base beside policy; null for none.
        validation_steps: steps between two previews; the first is made before training.
        network: part of the pipeline that is trained, where there are several: "transformer_2" is Wan 2.2's expert for
            low noise; null for its first.
        seed: of LoRA weights, order of pairs, noise and timesteps.
    """

    objective: dict[str, Any] | str = field(default_factory=lambda: {"preset": "halo_bounded"})
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: CountOrZero = 50
    max_train_steps: Count = 2000
    reference_draws: CountOrZero | None = 4
    noise: Literal["shared", "own"] = "shared"
    reference: Literal["base", "start"] = "base"
    train_batch_size: Count = 1
    gradient_accumulation_steps: Count = 16
    rank: CountOrZero = 32
    lora_alpha: Count = 32
    target_modules: list[str] | None = None
    optimizer: Optimizer = "adamw"
    max_grad_norm: Annotated[float, Interval(gt=0, le=math.inf)] = 1.0
    schedule: Literal["auto", "batched", "margin_first"] = "auto"
    gradient_checkpointing: Literal["none", "full", "selective"] = "selective"
    offload_activations: bool = False
    offload_blocks: bool = False
    compile: bool = False
    attention_backend: str | None = None
    mixed_precision: Literal["no", "bf16"] = "bf16"
    auto_beta: Annotated[float, Interval(gt=0, lt=0.5)] | None = None
    time_weights: list[Annotated[float, Ge(0)]] | None = None
    checkpointing_steps: Count = 100
    checkpoints_total_limit: Count | None = 3
    logging_steps: Count = 10
    report_to: list[str] = field(default_factory=list)
    loss_spike_factor: Annotated[float, Gt(0)] | None = 5.0
    winner_alarm: Annotated[float, Gt(0)] | None = 0.5
    displacement_alarm: Annotated[float, Gt(0)] | None = 0.1
    margin_alarm: Annotated[float, Gt(0)] | None = 5.0
    off_policy_pairs: CountOrZero = 16
    off_policy_fresh: CountOrZero = 0
    heldout_share: Annotated[float, Interval(ge=0, le=1)] = 0.1
    heldout_pairs: CountOrZero = 16
    heldout_draws: Count = 4
    diagnostics_steps: CountOrZero = 100
    validation_prompts: list[str] | None = None
    validation_steps: Count = 500
    network: str | None = None
    seed: CountOrZero = 0


CHANGEABLE = (
    "loss_spike_factor", "logging_steps", "report_to", "winner_alarm", "displacement_alarm", "margin_alarm",
    "checkpoints_total_limit",
)  # fmt: skip
"""Settings that decide no weight: a training goes on with others."""


def deciding_settings(config: TrainConfig, started: bool) -> dict[str, Any]:
    """The settings that a training's result depends on, as earlier versions kept them where nothing new is set.

    Args:
        config: the settings.
        started: whether the policy starts from an earlier training.
    """
    left_out = [] if started else ["reference"]  # without a start every reference is the same
    left_out += ["noise"] if config.noise == "shared" else []
    return {name: value for name, value in asdict(config).items() if name not in left_out}
