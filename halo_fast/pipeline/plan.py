"""`halo plan`: memory, work, disk space and the teacher's cost of a run, predicted before anything is downloaded."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast import registry
from halo_fast.data.prompts import read_prompts
from halo_fast.errors import UserError
from halo_fast.families import Family, load
from halo_fast.families.pipeline import PipelineFamily
from halo_fast.families.quantization import quantized_bytes
from halo_fast.families.sampling import sampling_steps
from halo_fast.families.shells import PUBLISHED, find_shell, load_shell, network_of
from halo_fast.families.weights import stored_dtype
from halo_fast.files import write_bytes
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.preflight import check_budget, check_required
from halo_fast.train.devices import USABLE, Device, find_device, fits, size_text, this_device
from halo_fast.train.predicted import (
    SUPERVISED,
    Option,
    cheapest,
    predict_autoencoder,
    predict_forward,
    predict_options,
)

__all__ = ["Prediction", "plan", "plan_text", "predict", "write_recipe"]

# From the best model to the smallest, each with the frames of its clips; heights and widths are 480 x 832.
_LADDER = [("Wan-AI/Wan2.1-T2V-14B-Diffusers", 81)]
_LADDER += [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", frames) for frames in (81, 49, 33, 17)]
_RECIPE = """\
# Written by halo doctor for {device}: predicted, not measured.
# Training: peak {peak}. Sampling: peak {sampling}{warning}.
# Prompts: text files with a prompt a line. The teacher's key comes from OPENAI_API_KEY.
output_dir: runs/mine
pretrained_model_name_or_path: {model}
prompts: prompts.txt              # 500 or more
evaluation_prompts: heldout.txt   # none of them among the prompts
precision: bf16
grid: [{grid}, 4, 6]

generate: {{num_frames: {frames}, height: 480, width: 832, fps: 16, num_videos_per_prompt: 4}}

annotate:
  teacher: openai
  num_clips: 200                  # the reward model scores the rest
  openai: {{budget: 20.0}}          # US dollars

train:
  schedule: {schedule}
  gradient_checkpointing: {checkpointing}
  offload_activations: {offload}
"""
SHARE = 0.4
"""Of a card's highest bf16 rate that whole steps are taken to reach, where times are predicted."""


@dataclass(frozen=True)
class Prediction:
    """What was predicted of a model with the settings of a run.

    Args:
        family: the model, without weights.
        latents: shape of a clip's latents.
        conditions: of the longest prompt.
        dtype: of the weights in sampling, and in training unless the weights themselves are trained.
        options: of training.
        forward: bytes and operations of one forward pass of a batch of clips.
        decode: bytes that decoding a clip needs.
        quantization: of the denoising networks; None for none.
    """

    family: Family
    latents: tuple[int, ...]
    conditions: dict[str, Tensor]
    dtype: torch.dtype
    options: list[Option]
    forward: tuple[int, int]
    decode: int
    quantization: str | None = None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Each network of the pipeline, the one that is trained first."""
        networks = {self.family.network: self.family.transformer}
        components = getattr(self.family.pipeline, "components", {})
        networks |= {name: components[name] for name in sorted(components) if isinstance(components[name], nn.Module)}
        return networks

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """Parameters of each network, and bytes of its weights as they are loaded."""
        found = {}
        for name, network in self.networks.items():
            count = sum(value.numel() for value in network.parameters())
            size = count * self.dtype.itemsize
            if self.quantization and (name == self.family.network or name.startswith(("transformer", "unet"))):
                size = quantized_bytes(network, self.quantization, self.dtype)
            found[name] = count, size
        return found

    @property
    def sampling(self) -> tuple[int, int]:
        """Bytes of the weights and of the rest while clips are sampled: all parts are on the device."""
        return sum(size for _, size in self.parts.values()), max(self.forward[0], self.decode)


def plan(config: Config, device: str = "") -> None:
    """Print what a run will need: memory by part, work and time of each stage, disk space and the teacher's cost.

    Args:
        config: of the run.
        device: name of a card, or a size such as "24 GiB"; this machine's by default.

    Raises:
        UserError: an unknown device or model, or settings that do not fit it.
    """
    card = find_device(device) if device else this_device()
    print(plan_text(config, predict(config), card))


def plan_text(config: Config, found: Prediction, card: Device) -> str:
    """What `halo plan` prints.

    Args:
        config: of the run.
        found: what was predicted of it.
        card: the device.
    """
    sections = [_head(config, found, card), _memory(found, card), _work(config, found, card), _disk(config, found)]
    return "\n\n".join([*sections, _teacher(config)])


def predict(
    config: Config, choices: Sequence[tuple[str, str, bool]] | None = None, known: Prediction | None = None
) -> Prediction:
    """Predict a run's memory and work from the model's configuration.

    Args:
        config: of the run.
        choices: schedule, checkpointing and offload of each training option; None for all.
        known: a prediction of the same config, which has all but these options.

    Raises:
        UserError: an unknown model, or settings that do not fit it.
    """
    check_required(config, ["cache", "train"])
    family, dtype = (known.family, known.dtype) if known else _family(config)
    settings = config.generate
    family.set_conditions(settings.guidance_scale, settings.fps)
    latents = family.latent_shape(settings.num_frames, settings.height, settings.width)
    conditions = family.blank_conditions()
    trained = dtype if config.train.rank else torch.float32
    options = predict_options(
        family, latents, config.grid, conditions, config.train, trained, choices, config.quantization
    )
    if known:
        return replace(known, options=options)
    batch = settings.batch_size * family.passes(settings.guidance_scale)
    forward = predict_forward(family, latents, conditions, dtype, batch)
    decode = predict_autoencoder(family, latents, dtype) if isinstance(family, PipelineFamily) else 0
    return Prediction(family, latents, conditions, dtype, options, forward, decode, config.quantization)


def _family(config: Config) -> tuple[Family, torch.dtype]:
    """The model without weights, and the precision in which it would be loaded."""
    name = config.pretrained_model_name_or_path
    folder, shell = Path(name), find_shell(name)
    if folder.is_dir() or registry.is_name("model", name):
        family = load(name, "cpu", config.train.network, config.precision, weights=())
        own = next(family.transformer.parameters()).dtype
        stored = stored_dtype(folder / family.network) if folder.is_dir() else own
    elif shell is not None and shell.pipeline:
        family, stored = load_shell(name, config.train.network), shell.stored
    else:
        known = ", ".join(other for other, of in PUBLISHED.items() if of.pipeline)
        raise UserError(
            f"pretrained_model_name_or_path: the configuration of {name!r} is not here; give a folder, which hf "
            f"download {name} --include '*.json' '*token*' --local-dir FOLDER fills without weights, or one of {known}"
        )
    if config.precision == "auto":  # float16 becomes bfloat16 on cards that compute in it
        return family, torch.bfloat16 if stored == torch.float16 else stored
    return family, {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    )


def _head(config: Config, found: Prediction, card: Device) -> str:
    settings, trained = config.generate, found.family.transformer
    rows = [("weights, predicted", "parameters", str(found.dtype).removeprefix("torch."))]
    rows += [(name, f"{count:,}", size_text(size)) for name, (count, size) in found.parts.items()]
    if found.quantization:
        rows[0] = (*rows[0][:2], f"{rows[0][2]}, {found.quantization}")
    return (
        f"{config.pretrained_model_name_or_path}: {type(trained).__name__}, clips of {settings.num_frames} x "
        f"{settings.height} x {settings.width}, latents {list(found.latents)}\n"
        f"device: {card.name}, {size_text(card.memory)}. All figures are predicted from configurations; nothing was "
        f"downloaded.\n\n{_table(rows)}"
    )


def _memory(found: Prediction, card: Device) -> str:
    """The table of training's memory for every schedule and checkpointing mode, what fits, and sampling's peak."""
    rows: list[tuple[str, ...]] = [
        ("training: schedule, checkpointing", "weights", "training", "activations", "peak", "work", "fits")
    ]
    least = min(option.step.flops for option in found.options if option.schedule == SUPERVISED)
    for option in found.options:
        step, schedule = option.step, "fine-tuning" if option.schedule == SUPERVISED else option.schedule
        sizes = [size_text(size) for size in (step.weights, step.training, step.activations, step.peak)]
        fit = fits(card, step.weights, step.training + step.activations)
        name = f"{schedule}, {option.checkpointing}{', offloaded' if option.offload else ''}"
        rows.append((name, *sizes, f"{step.flops / least:.2f}", "yes" if fit else "no"))
    sampling = found.sampling
    sampled = "fits" if fits(card, *sampling) else "does not fit"
    return (
        f"{_table(rows)}\n"
        "weights: of the trained network alone, since latents and texts are cached. training: gradients and moments.\n"
        "work: operations of a step, in those of supervised fine-tuning without checkpointing (one clip a pair, one\n"
        f"at a time). fits: activations and training in {USABLE:.0%} of what weights and the driver leave. Compiled\n"
        f"blocks need less.\n{_advice(found, card)}\n"
        f"sampling (generate, evaluate): weights of all parts {size_text(sampling[0])}, denoising "
        f"{size_text(found.forward[0])},\ndecoding {size_text(found.decode)}; peak {size_text(sum(sampling))}, "
        f"{sampled}"
    )


def _advice(found: Prediction, card: Device) -> str:
    best = cheapest(found.options, card)
    if best is not None:
        return f"least work that fits {card.name}: {best.settings}"
    smallest = min(
        (option for option in found.options if option.schedule != SUPERVISED), key=lambda option: option.step.peak
    )
    halves = "--precision bf16 halves the weights, " if found.dtype == torch.float32 else ""
    halves += "" if found.quantization else "--quantization bnb_nf4 more so, "
    return (
        f"nothing fits {card.name}: the least is {size_text(smallest.step.peak)}, {smallest.settings}; {halves}"
        "clips of fewer frames need less, a smaller model too"
    )


def _prompts(config: Config) -> int | None:
    """How many prompts there are; None where that is not known yet."""
    if _are_there(config.prompts):
        return len(read_prompts(config.prompts, config.generate.num_prompts, config.seed))
    return config.generate.num_prompts


def _evaluated(config: Config) -> int | None:
    name, count = config.evaluation_prompts, config.evaluate.num_prompts
    if _are_there(name):
        return len(read_prompts(name, count, config.seed, setting="evaluation_prompts"))
    return count


def _are_there(prompts: str) -> bool:
    """Whether a setting of prompts names something; a file may be written after the plan."""
    return bool(prompts) and (registry.is_name("prompts", prompts) or Path(prompts).exists())


def _work(config: Config, found: Prediction, card: Device) -> str:
    """The table of the video model's operations and time in each stage."""
    settings, train = config.generate, config.train
    passes = found.family.passes(settings.guidance_scale)
    one = found.forward[1] / (settings.batch_size * passes)
    clip = one * settings.num_inference_steps * passes
    candidates = sampling_steps(settings) * one * passes
    prompts, evaluated = _prompts(config), _evaluated(config)
    option = cheapest(found.options, card) or found.options[0]
    stages: list[tuple[str, float | None]] = [
        ("generate", None if prompts is None else prompts * candidates),
        ("train: reference errors", None if prompts is None else 2 * prompts * (train.reference_draws or 0) * one),
        ("train: steps", train.max_train_steps * train.gradient_accumulation_steps * option.step.flops),
        ("evaluate", None if evaluated is None else 2 * evaluated * clip),
    ]
    rounds = f", {config.rounds} rounds" if config.rounds > 1 else ""
    rows = [(f"work of the video model{rounds}, predicted", "operations", "time")]
    for name, flops in stages:
        work = None if flops is None else config.rounds * flops
        rows.append((name, "prompts unknown" if work is None else f"{work:.3g}", _time(work, card)))
    rate = f"{SHARE:.0%} of {card.tflops:g} TFLOP/s (dense bf16)" if card.tflops else "no rate is known of this device"
    return (
        f"{_table(rows)}\n"
        f"time: one device at {rate}; steps with the settings of least work.\n"
        f"A clip is {settings.num_inference_steps} steps of {passes} pass{'' if passes == 1 else 'es'}, {clip:.3g} "
        f"operations; a pass {one:.3g}. Each prompt is taken to\ngive one pair. Autoencoder, text encoder, teacher and "
        "reward model are not counted."
    )


def _time(flops: float | None, card: Device) -> str:
    if flops is None or not card.tflops:
        return "-"
    seconds = flops / (card.tflops * 1e12 * SHARE)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def _disk(config: Config, found: Prediction) -> str:
    """The table of the run directory's files: bytes of one, and of all where their number is known."""
    settings, train = config.generate, config.train
    prompts, evaluated = _prompts(config), _evaluated(config)
    pixels = settings.num_frames * settings.height * settings.width * 3
    latent = 4 * math.prod(found.latents)
    text = sum(value.numel() * value.element_size() for value in found.conditions.values())
    step = found.options[0].step
    trained = step.trained
    rows: list[tuple[str, str, str]] = [("disk space of the run directory, predicted", "of one", "of all")]

    def row(name: str, size: int, count: int | None) -> None:
        rows.append((name, size_text(size), "?" if count is None else size_text(size * count * config.rounds)))

    made = None if prompts is None else prompts * settings.num_videos_per_prompt
    row("clips, before compression", pixels, made)
    row("latents of the clips", latent, made)
    row("cache: texts, at most", text, prompts)
    row("reference errors of a pair", 8 * math.prod(config.grid) * (train.reference_draws or 0), prompts)
    limit = train.checkpoints_total_limit
    row("training: checkpoints", step.training, -(-train.max_train_steps // train.checkpointing_steps) if limit is None
        else limit)  # fmt: skip
    row("LoRA" if train.rank else "trained network", trained, 1)
    row("evaluate: clips, base and aligned", pixels, None if evaluated is None else 2 * evaluated)
    return f"{_table(rows)}\nThe model itself: {size_text(found.sampling[0])} in this precision."


@contextmanager
def _notes() -> Iterator[list[str]]:
    """What the package logs inside the block, instead of showing it."""
    found: list[str] = []

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger = logging.getLogger("halo_fast")
    before = logger.handlers
    logger.handlers = [Notes()]
    try:
        yield found
    finally:
        logger.handlers = before


def _teacher(config: Config) -> str:
    """What the teacher's questions will cost, by the teacher's own estimate."""
    from halo_fast.pipeline.stages.annotate import load_teacher
    from halo_fast.teachers import LabelStore
    from halo_fast.teachers.base import Paid

    if not config.annotate.teacher:
        return "teacher: no estimate, annotate.teacher is not set"
    if not _are_there(config.prompts):
        return f"teacher: no estimate, there are no prompts yet ({config.prompts or 'prompts is not set'})"
    prompts = read_prompts(config.prompts, config.generate.num_prompts, config.seed)
    with LabelStore(Path(":memory:")) as store, _notes() as notes:
        try:
            teacher: Any = load_teacher(config, store, prompts=prompts)
            check_budget(config, teacher, prompts, needs_key=False)
            if not isinstance(teacher, Paid):
                return f"teacher: {config.annotate.teacher} costs no money"
        except UserError as error:
            notes.append(str(error))
    rounds = f" in each of {config.rounds} rounds" if config.rounds > 1 else ""
    return "\n".join(f"teacher{rounds}: {note.removeprefix('annotate: ')}" for note in notes)


def write_recipe(file: str, device: str = "") -> str:
    """Write a config that fits a device, with the largest model and the least work that do.

    Args:
        file: the YAML file; it must not exist.
        device: name of a card, or a size such as "24 GiB"; this machine's by default.

    Returns:
        what was written, in a line or two.

    Raises:
        UserError: the file exists, the device is unknown, or not even the smallest model fits it.
    """
    path, card = Path(file), find_device(device) if device else this_device()
    if path.exists():
        raise UserError(f"doctor: {path} exists and is kept; give another name")
    model, frames, found, best = _fitting(card)
    weights, rest = found.sampling
    whole = fits(card, weights, rest)
    text = _RECIPE.format(
        device=f"{card.name} ({size_text(card.memory)})", model=model, frames=frames, peak=size_text(best.step.peak),
        sampling=size_text(weights + rest), warning="" if whole else ", does not fit: import clips made elsewhere",
        grid=min(7, found.latents[1]), schedule=best.schedule, checkpointing=best.checkpointing,
        offload=str(best.offload).lower(),
    )  # fmt: skip
    write_bytes(path, text.encode())
    slow = "" if device or torch.cuda.is_available() else (
        "\nNo GPU was found: this fits the CPU's memory and would take weeks; --device rtx4090 writes one for a card."
    )  # fmt: skip
    return f"{path}: {model}, {frames} frames, {best.settings}; next: halo plan {path}{slow}"


def _fitting(card: Device) -> tuple[str, int, Prediction, Option]:
    """The first model of the ladder that samples and trains on a card, or else the first that trains."""
    later = []
    for rung in _LADDER:
        if fits(card, _network_bytes(rung[0]), 0):
            sampled = predict(_rung_config(*rung), ())  # without the options of training, which take longer
            if not fits(card, *sampled.sampling):
                later.append((rung, sampled))
            elif (found := _trained(rung, sampled, card)) is not None:
                return found
    for rung, sampled in later:
        if (found := _trained(rung, sampled, card)) is not None:
            return found
    model, frames = _LADDER[-1]
    raise UserError(f"doctor: not even {model} with {frames} frames fits {card.name}, {size_text(card.memory)}")


def _rung_config(model: str, frames: int) -> Config:
    config = Config(pretrained_model_name_or_path=model, precision="bf16")
    config.generate.num_frames = frames
    return config


def _network_bytes(model: str) -> int:
    """Bytes of a published model's network in bf16."""
    shell = find_shell(model)
    return 0 if shell is None else 2 * sum(value.numel() for value in network_of(shell).parameters())


def _trained(rung: tuple[str, int], sampled: Prediction, card: Device) -> tuple[str, int, Prediction, Option] | None:
    """A rung of the ladder, its sampling known, with the settings that train it on a card; None if none do."""
    found = predict(_rung_config(*rung), None, sampled)
    best = cheapest(found.options, card)
    return None if best is None else (*rung, found, best)
