"""LoRA training with Gran-DPO: policy and reference are one set of weights, with the adapter on and off."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.config import Config, TrainConfig
from halo_fast.data import CachedPairs, Pair
from halo_fast.families import Family, family_of, load, source
from halo_fast.functional import GranDPO, gran_dpo
from halo_fast.runs import Run, UserError, progress, write_csv, write_safetensors
from halo_fast.train.adapters import adapter, adapters_off, check_first_loss, check_switch, prepared, ready
from halo_fast.train.checkpoint import resume, save
from halo_fast.train.draws import Batch, check_pairs, draws, make_batch
from halo_fast.train.export import export

__all__ = ["Fit", "fit", "train"]


@dataclass(frozen=True)
class Fit:
    """What training gives.

    Args:
        lora: the LoRA under the names of diffusers, its scale folded in; `pipeline.load_lora_weights(lora)` takes it.
        log: one row a step, under the names of log.csv.
    """

    lora: dict[str, Tensor]
    log: list[dict[str, float]]


def train(config: Config, run: Run) -> None:
    """Train the LoRA of a run directory and export it to train/lora; a stage.

    Raises:
        UserError: whatever `fit` finds wrong.
    """
    name = config.pretrained_model_name_or_path
    inputs = {
        "pairs": run.require("pairs"),
        "cache": run.require("cache"),
        "pretrained_model_name_or_path": source(name),
    }
    with run.stage("train", config.train, inputs) as stage:
        if stage.done:
            return
        result = fit(load(name, device="cpu"), CachedPairs(run), config.train, folder=stage.folder)
        file = stage.folder / "lora" / "pytorch_lora_weights.safetensors"
        write_safetensors(file, result.lora, {"format": "pt"})
        stage.finish({"steps": len(result.log), "loss": result.log[-1]["loss"]})


def fit(
    pipeline: Any,
    pairs: Sequence[Pair],
    config: TrainConfig,
    *,
    folder: Path | None = None,
    progress: Callable[[Iterable[int], int, str], Iterable[int]] = progress,
) -> Fit:
    """Train a LoRA on preference pairs; the pipeline is left as it was.

    Noise and time of a pair's k-th visit come from a seed of their own, so a step depends on nothing but its number.
    The model stays in eval mode throughout: dropout would tell policy and reference apart by chance.

    Args:
        pipeline: a diffusers pipeline or a `Family`.
        pairs: any sequence of `Pair`, in memory or `CachedPairs`.
        config: the settings; `config.objective` says which terms the loss has.
        folder: where log.csv and checkpoints go and training resumes from; None keeps everything in memory.
        progress: wraps the iterable of steps, (iterable, total, label).

    Raises:
        UserError: no pairs, a grid larger than the latent, a model on which "adapter off" is not the base model, a loss
            that is not finite, or checkpoints of other settings.
    """
    from accelerate import Accelerator

    family = family_of(pipeline)
    check_pairs(family, pairs)
    objective = GranDPO(**asdict(config.objective))
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.num_processes > 1:
        raise UserError(f"train: one process is expected, got {accelerator.num_processes}; launch without accelerate")
    with ExitStack() as stack:
        transformer = stack.enter_context(ready(family.transformer, config, accelerator.device))
        first = make_batch(family, pairs, [(0, 0)], config.seed, accelerator.device)
        with accelerator.autocast(), torch.no_grad():
            base = family.predict(transformer, first.noisy, first.t, first.conditions)
        parameters = stack.enter_context(adapter(family, config))
        optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0, fused=True)
        model, optimizer = stack.enter_context(prepared(accelerator, transformer, optimizer))
        # A context each: until it ends, autocast keeps copies of weights, and the first check moves those.
        with accelerator.autocast(), torch.no_grad():
            check_switch(family, model, parameters, first, base)
        with accelerator.autocast(), torch.no_grad():
            check_first_loss(family, model, first, base, objective)
        log = resume(folder, parameters, optimizer, config, len(pairs))
        rows: list[Tensor] = []
        names: list[str] = []
        for step in progress(range(len(log), config.max_train_steps), config.max_train_steps - len(log), "train"):
            batch = make_batch(family, pairs, draws(step, len(pairs), config), config.seed, accelerator.device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            with accelerator.autocast():
                prediction, reference = _predict(family, model, batch, objective)
            out = gran_dpo(
                prediction, batch.target, reference, batch.patch_rewards, batch.video_rewards,
                objective=objective, layout=family.layout,
            )  # fmt: skip
            accelerator.backward(out.loss)
            norm = accelerator.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # Rows stay on the device until they are read together: the step itself never waits for it.
            metrics = {"loss": out.loss, "grad_norm": norm, **out.metrics()}
            names = list(metrics)
            rows.append(torch.stack([value.detach().float() for value in metrics.values()]))
            saving = (step + 1) % config.checkpointing_steps == 0
            if saving or (step + 1) % config.logging_steps == 0 or step + 1 == config.max_train_steps:
                log += _read_rows(rows, names, len(log), config)
                rows.clear()
                if folder is not None:
                    write_csv(folder / "log.csv", log)
            if saving and folder is not None:
                save(folder, step + 1, parameters, optimizer, config, len(pairs))
        lora = export(family, parameters, config)
    return Fit(lora, log)


def _predict(family: Family, model: nn.Module, batch: Batch, objective: GranDPO) -> tuple[Tensor, Tensor]:
    """Predictions of policy and reference for both samples of every pair, each in one call."""
    reference = None
    if objective.video_weight or objective.patch_weight:
        with torch.no_grad(), adapters_off(model):
            reference = family.predict(model, batch.noisy, batch.t, batch.conditions)
    prediction = family.predict(model, batch.noisy, batch.t, batch.conditions)
    # Without a preference term nothing is compared with the reference, so its forward pass is saved.
    return prediction, prediction.detach() if reference is None else reference


def learning_rate(step: int, config: TrainConfig) -> float:
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))


def _read_rows(rows: list[Tensor], names: list[str], done: int, config: TrainConfig) -> list[dict[str, float]]:
    """Read the waiting rows from the device; UserError if a loss or gradient among them is not finite."""
    read = []
    for step, values in enumerate(torch.stack(rows).tolist(), start=done):
        row = dict(zip(names, values, strict=True))
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row[name]):
                raise UserError(
                    f"train: {name} is {row[name]} at step {step + 1}, nothing was saved since the last checkpoint; "
                    "lower learning_rate or the betas"
                )
        read.append({"step": step + 1, "learning_rate": learning_rate(step, config), **row})
    return read
