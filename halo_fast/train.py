"""LoRA training with Gran-DPO: policy and reference are one set of weights, with the adapter on and off."""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.config import Config, TrainConfig
from halo_fast.data import CachedPairs, Pair
from halo_fast.families import Family, family_of, load, source
from halo_fast.functional import GranDPO, gran_dpo
from halo_fast.runs import Run, UserError, progress, write_csv, write_json, write_safetensors

__all__ = ["Fit", "adapters_off", "fit", "train"]

_ADAPTER = "halo"


@dataclass(frozen=True)
class Fit:
    """What training gives.

    Args:
        lora: the LoRA under the names of diffusers, its scale folded in; `pipeline.load_lora_weights(lora)` takes it.
        log: one row a step, under the names of log.csv.
    """

    lora: dict[str, Tensor]
    log: list[dict[str, float]]


@dataclass(frozen=True)
class _Batch:
    """[2B, ...] each: samples a of all pairs first, then their partners b, which share noise, time and conditions."""

    noisy: Tensor
    target: Tensor
    t: Tensor
    conditions: dict[str, Tensor]
    patch_rewards: Tensor
    video_rewards: Tensor


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
    _check_pairs(family, pairs)
    objective = GranDPO(**asdict(config.objective))
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.num_processes > 1:
        raise UserError(f"train: one process is expected, got {accelerator.num_processes}; launch without accelerate")
    with ExitStack() as stack:
        transformer = stack.enter_context(_ready(family.transformer, config, accelerator.device))
        first = _batch(family, pairs, [(0, 0)], config.seed, accelerator.device)
        with accelerator.autocast(), torch.no_grad():
            base = family.predict(transformer, first.noisy, first.t, first.conditions)
        parameters = stack.enter_context(_adapter(family, config))
        optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0, fused=True)
        model, optimizer = stack.enter_context(_prepared(accelerator, transformer, optimizer))
        # A context each: until it ends, autocast keeps copies of weights, and the first check moves those.
        with accelerator.autocast(), torch.no_grad():
            _check_switch(family, model, parameters, first, base)
        with accelerator.autocast(), torch.no_grad():
            _check_first_loss(family, model, first, base, objective)
        log = _resume(folder, parameters, optimizer, config, len(pairs))
        rows: list[Tensor] = []
        names: list[str] = []
        for step in progress(range(len(log), config.max_train_steps), config.max_train_steps - len(log), "train"):
            batch = _batch(family, pairs, _draws(step, len(pairs), config), config.seed, accelerator.device)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, config)
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
                _save(folder, step + 1, parameters, optimizer, config, len(pairs))
        lora = _export(family, parameters, config)
    return Fit(lora, log)


def _check_pairs(family: Family, pairs: Sequence[Pair]) -> None:
    if not len(pairs):
        raise UserError("pairs: training needs at least one, got none; generate more candidates or lower the deltas")
    pair = pairs[0]
    shape = pair.latents.shape[-4:]
    size = shape[1:] if family.layout == "BCFHW" else (shape[0], *shape[2:])
    grid = tuple(pair.patch_rewards.shape[1:])
    if any(patches > length for patches, length in zip(grid, size, strict=True)):
        raise UserError(f"grid: at most {tuple(size)} patches on these latents, got {grid}; use fewer patches")


def _draws(step: int, count: int, config: TrainConfig) -> list[tuple[int, int]]:
    """Pair and visit of each place in the step's batch: every epoch takes all pairs once, in an order of its own."""
    places = range(step * config.train_batch_size, (step + 1) * config.train_batch_size)
    orders = {
        epoch: torch.randperm(count, generator=_generator(config.seed, "order", epoch)).tolist()
        for epoch in {place // count for place in places}
    }
    return [(orders[place // count][place % count], place // count) for place in places]


def _generator(*counter: object) -> torch.Generator:
    digest = hashlib.sha256(" ".join(map(str, counter)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _batch(
    family: Family, pairs: Sequence[Pair], draws: Sequence[tuple[int, int]], seed: int, device: torch.device
) -> _Batch:
    """Assemble the pairs of (index, visit) draws; the noise is drawn on the CPU, so it is the same on every device."""
    chosen = [pairs[index] for index, _ in draws]
    generators = [_generator(seed, "pair", index, visit) for index, visit in draws]
    latents = torch.stack([pair.latents for pair in chosen], dim=1).flatten(0, 1).to(device)
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    u = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    noise, t = noise.to(device).repeat(2, *[1] * (noise.ndim - 1)), family.timesteps(u).to(device).repeat(2)
    conditions = family.stack([pair.conditions for pair in chosen])
    return _Batch(
        noisy=family.add_noise(latents, noise, t),
        target=family.target(latents, noise, t),
        t=t,
        conditions={name: torch.cat((value, value)).to(device) for name, value in conditions.items()},
        patch_rewards=torch.stack([pair.patch_rewards for pair in chosen], dim=1).flatten(0, 1).to(device),
        video_rewards=torch.stack([pair.video_rewards for pair in chosen], dim=1).flatten(0, 1).to(device),
    )


def _predict(family: Family, model: nn.Module, batch: _Batch, objective: GranDPO) -> tuple[Tensor, Tensor]:
    """Predictions of policy and reference for both samples of every pair, each in one call."""
    reference = None
    if objective.video_weight or objective.patch_weight:
        with torch.no_grad(), adapters_off(model):
            reference = family.predict(model, batch.noisy, batch.t, batch.conditions)
    prediction = family.predict(model, batch.noisy, batch.t, batch.conditions)
    # Without a preference term nothing is compared with the reference, so its forward pass is saved.
    return prediction, prediction.detach() if reference is None else reference


def _learning_rate(step: int, config: TrainConfig) -> float:
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model inside the block; adapters and their requires_grad flags are restored after it in any case."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    disabled = [layer.disable_adapters for layer in layers]
    # peft's switch also sets requires_grad, on adapters that were frozen too.
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer.enable_adapters(not was_disabled)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _adapter(family: Family, config: TrainConfig) -> Iterator[dict[str, nn.Parameter]]:
    """A fresh LoRA on the transformer, its float32 parameters by name; taken off again at the end, whatever happens."""
    from diffusers.utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = family.transformer
    if getattr(model, "peft_config", None):
        raise UserError("model: expected one without adapters, got one that has some; fuse or unload them first")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    targets = config.target_modules or list(family.lora_targets)
    lora = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, target_modules=targets)
    try:
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            inject_adapter_in_model(lora, model, _ADAPTER)
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
        yield parameters
    finally:
        recurse_remove_peft_layers(model)
        model.__dict__.pop("peft_config", None)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _ready(model: Any, config: TrainConfig, device: torch.device) -> Iterator[Any]:
    """The model on the device, in eval mode and with activation checkpointing if asked for; all put back at the end."""
    home = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.to(device).eval()
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        yield model
    finally:
        if config.gradient_checkpointing:
            model.disable_gradient_checkpointing()
        for module, training in modes:
            module.training = training
        model.to(home)


@contextmanager
def _prepared(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Module, Any]]:
    """Model and optimizer as accelerate runs them; the model's own forward is put back at the end."""
    try:
        yield accelerator.prepare(model, optimizer)
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)


_ADVICE = "this model's adapter cannot serve as its own reference; use it uncompiled and unquantised"


def _check_switch(
    family: Family, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: _Batch, base: Tensor
) -> None:
    """Hold that the adapter acts when it is on and leaves exactly the base model when it is off."""
    if not base.isfinite().all():
        raise UserError("train: the base model's prediction on the first pair is not finite; check latents and dtype")
    # A fresh adapter adds nothing, so a switch without effect would go unnoticed: the weights are moved for the check.
    fresh = [parameter.clone() for parameter in parameters.values()]
    for parameter in parameters.values():
        parameter.add_(0.01)
    on = family.predict(model, batch.noisy, batch.t, batch.conditions)
    with adapters_off(model):
        off = family.predict(model, batch.noisy, batch.t, batch.conditions)
    for parameter, value in zip(parameters.values(), fresh, strict=True):
        parameter.copy_(value)
    if not torch.equal(off, base):
        raise UserError(
            f"model: with the adapter off, expected the base, got {(off - base).abs().max()} off; {_ADVICE}"
        )
    if torch.equal(on, base):
        raise UserError(f"model: with the adapter on, expected another output than the base's; {_ADVICE}")


def _check_first_loss(family: Family, model: nn.Module, batch: _Batch, base: Tensor, objective: GranDPO) -> None:
    """Hold that a fresh adapter starts at a preference loss of log 2 per unit weight."""
    policy = family.predict(model, batch.noisy, batch.t, batch.conditions)
    preference = replace(objective, sft_weight=0.0, patch_sft_weight=0.0)
    loss = gran_dpo(
        policy, batch.target, base, batch.patch_rewards, batch.video_rewards, objective=preference, layout=family.layout
    ).loss.item()
    # Comparisons with NaN, which is "not labelled", are False: a tie.
    margin = batch.video_rewards.diff().abs() > objective.video_delta
    margins = batch.patch_rewards.diff(dim=0).abs() > objective.patch_delta
    weight = objective.video_weight * bool(margin.any()) + objective.patch_weight * bool(margins.any())
    if not math.isclose(loss, weight * math.log(2), rel_tol=1e-6, abs_tol=1e-12):
        raise UserError(f"model: expected a first loss of {weight:g} x log 2, got {loss}; {_ADVICE}")


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
        read.append({"step": step + 1, "learning_rate": _learning_rate(step, config), **row})
    return read


def _settings(config: TrainConfig, count: int) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config) | {"pairs": count}))


def _save(
    folder: Path, step: int, parameters: Mapping[str, Tensor], optimizer: Any, config: TrainConfig, count: int
) -> None:
    """Write checkpoints/step_NNNNNN; state.json comes last and makes it valid."""
    checkpoint = folder / "checkpoints" / f"step_{step:06d}"
    moments = {
        f"{name}.{key}": value.contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    write_safetensors(checkpoint / "adapter.safetensors", {name: value.detach() for name, value in parameters.items()})
    write_safetensors(checkpoint / "optimizer.safetensors", moments)
    write_json(checkpoint / "state.json", {"step": step, "settings": _settings(config, count)})


def _resume(
    folder: Path | None, parameters: Mapping[str, Tensor], optimizer: Any, config: TrainConfig, count: int
) -> list[dict[str, float]]:
    """Load the last complete checkpoint, if there is one, and give the log up to it."""
    from safetensors.torch import load_file

    states = sorted(folder.glob("checkpoints/step_*/state.json")) if folder is not None else []
    if folder is None or not states:
        return []
    state = json.loads(states[-1].read_text())
    for name, value in _settings(config, count).items():
        if state["settings"].get(name) != value:
            was = state["settings"].get(name)
            raise UserError(f"{states[-1].parent}: made with {name} {was}, now it is {value}; use another folder")
    adapter = load_file(states[-1].with_name("adapter.safetensors"))
    moments = load_file(states[-1].with_name("optimizer.safetensors"))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapter[name])
            optimizer.state[parameter] = {
                key: moments[f"{name}.{key}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
    with open(folder / "log.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"])} for row in rows if row["step"] <= state["step"]]


def _export(family: Family, parameters: Mapping[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """The LoRA as diffusers names it; alpha / rank goes into B, so that no loader needs to know it."""
    scale = config.lora_alpha / config.rank
    return {
        f"{family.lora_prefix}.{name.replace(f'.{_ADAPTER}.', '.')}": (
            value.detach().cpu() * (scale if ".lora_B." in name else 1.0)
        )
        for name, value in parameters.items()
    }
