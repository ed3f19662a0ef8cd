"""The tables of docs/memory.md and of the quick start: memory of a training step, predicted and measured.

python -m benchmarks.memory            # writes all of them, in about ten minutes
python -m benchmarks.memory measured   # predicted against measured, on this CPU
python -m benchmarks.memory models     # twelve published models on four sizes of device
python -m benchmarks.memory NAME       # one of these models; kept in benchmarks/results/memory
python -m benchmarks.memory cards      # what halo plan and halo doctor --write print for three cards
"""

import contextlib
import gc
import io
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from halo_fast.data import Pair
from halo_fast.families import Denoiser, family_of
from halo_fast.families.shells import PUBLISHED, Shell, load_shell, network_of
from halo_fast.files import write_bytes, write_json
from halo_fast.train.config import TrainConfig
from halo_fast.train.devices import Device, find_device
from halo_fast.train.job import prepared_job
from halo_fast.train.predicted import SUPERVISED, Option, Step, cheapest, predict_options, predict_step
from halo_fast.train.steps import take_step

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory"
PAGE, QUICK_START = ROOT / "docs" / "memory.md", ROOT / "docs" / "quickstart.md"
GRID = (4, 2, 2)
SIZES = ("16 GiB", "24 GiB", "48 GiB", "80 GiB")
# Parameters as others counted them in the published files, or as the model's card rounds them.
COUNTS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("Wan 2.1 1.3B", "1,418,996,800"),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("Wan 2.1 14B", "14,288,491,584"),
    "zai-org/CogVideoX-2b": ("CogVideoX 2B", "1,693,783,872"),
    "zai-org/CogVideoX-5b": ("CogVideoX 5B", "5,570,283,072"),
    "Lightricks/LTX-Video": ("LTX-Video 2B", "1,923,385,472"),
    "Lightricks/LTX-Video-0.9.7-dev": ("LTX-Video 13B", "13,042,569,344"),
    "Lightricks/LTX-2": ("LTX-2", "18,876,174,592"),
    "hunyuanvideo-community/HunyuanVideo": ("HunyuanVideo", "12,821,012,544"),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": ("HunyuanVideo 1.5", "8,326,608,160"),
    "genmo/mochi-1-preview": ("Mochi 1", "10,027,677,744"),
    "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers": ("Kandinsky 5.0 Lite", "2B"),
    "nvidia/Cosmos-Predict2.5-2B": ("Cosmos-Predict 2.5 2B", "2B"),
}


class Row(NamedTuple):
    """A training whose memory is predicted and measured: a model and its settings."""

    model: str
    schedule: str
    checkpointing: str
    weights: torch.dtype
    mixed: str
    settings: dict[str, Any]


def _row(model: str, schedule: str, mode: str, dtype: torch.dtype, mixed: str = "no", **settings: Any) -> Row:
    return Row(model, schedule, mode, dtype, mixed, settings)


ROWS = [
    _row("Wan 2.1", "batched", "full", torch.bfloat16, "bf16"),
    _row("Wan 2.1", "margin_first", "none", torch.float32),
    _row("Wan 2.1", "batched", "full", torch.float32, rank=0, gradient_accumulation_steps=1),
    _row("CogVideoX 5B", "batched", "none", torch.float32, train_batch_size=2),
    _row("CogVideoX 2B", "margin_first", "selective", torch.bfloat16, "bf16", train_batch_size=2),
    _row("LTX-Video", "batched", "selective", torch.bfloat16, "bf16"),
    _row("LTX-Video", "margin_first", "full", torch.float32, reference_draws=None),
    _row("HunyuanVideo", "margin_first", "full", torch.bfloat16, "bf16"),
    _row("HunyuanVideo 1.5", "batched", "none", torch.float32),
    _row("Mochi", "batched", "full", torch.bfloat16, "bf16"),
]
CLIP = {"Mochi": (19, 128, 128)}  # all others: 17 x 128 x 128


def larger(name: str) -> nn.Module:
    """A network of the model's class: blocks of a few million weights, more of them than the prediction tries."""
    wide = {"num_attention_heads": 4, "num_layers": 6}
    if name == "Wan 2.1":
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), attention_head_dim=64, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
            ffn_dim=1024, rope_max_seq_len=64, **wide,
        )  # fmt: skip
    if name.startswith("CogVideoX"):
        return diffusers.CogVideoXTransformer3DModel(
            attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=64, text_embed_dim=16, sample_width=16,
            sample_height=16, sample_frames=17, max_text_seq_length=12,
            use_rotary_positional_embeddings=name == "CogVideoX 5B", **wide,
        )  # fmt: skip
    if name == "LTX-Video":
        return diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, attention_head_dim=64, cross_attention_dim=256, caption_channels=16, **wide
        )
    if name == "HunyuanVideo":
        return diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=64, num_layers=4,
            num_single_layers=5, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=16,
            rope_axes_dim=(16, 24, 24),
        )  # fmt: skip
    if name == "HunyuanVideo 1.5":
        return diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=4, attention_head_dim=64, num_layers=5,
            num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=16, image_embed_dim=8, rope_axes_dim=(16, 24, 24),
            task_type="t2v",
        )  # fmt: skip
    return diffusers.MochiTransformer3DModel(
        attention_head_dim=64, in_channels=12, text_embed_dim=16, time_embed_dim=64, pooled_projection_dim=64,
        max_sequence_length=12, **wide,
    )  # fmt: skip


def as_loaded(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in a precision, but for the parts that diffusers keeps in float32 when it loads one."""
    kept = getattr(network, "_keep_in_fp32_modules", None) or ()
    for name, value in network.named_parameters():
        if not any(word in name.split(".") for word in kept):
            value.data = value.data.to(dtype)
    return network


def allocated(profile: torch.profiler.profile) -> tuple[int, int]:
    """Bytes that torch's allocator gave and did not get back while a profile ran, and the most of them at once."""
    level = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return level, peak


def measure(row: Row) -> tuple[int, int]:
    """Predicted and measured bytes at the peak of a real step: weights, training state and all else.

    Measured by torch's CPU allocator, which reports each allocation and release to the profiler, from before the
    network is made until the second step has ended. The prediction counts storages of tensors without values.
    """
    from tiny import TINY

    torch.manual_seed(0)
    family = family_of(TINY[row.model].build())
    size = CLIP.get(row.model, (17, 128, 128))
    config = TrainConfig(
        **{
            "gradient_checkpointing": row.checkpointing, "mixed_precision": row.mixed, "schedule": row.schedule,
            "rank": 16, "reference_draws": 1, "gradient_accumulation_steps": 2, "lr_warmup_steps": 0,
        } | row.settings
    )  # fmt: skip
    conditions = family.encode_prompts(["a red ball rolls left over the grass"])[0]
    with torch.profiler.profile(profile_memory=True) as setup:
        family.pipeline.transformer = as_loaded(larger(row.model), row.weights)
        shape = family.latent_shape(*size)
        count = config.train_batch_size * config.gradient_accumulation_steps
        pairs = [Pair(torch.randn(2, *shape), conditions, torch.rand(2, *GRID), torch.rand(2)) for _ in range(count)]
        stack = contextlib.ExitStack()
        job = stack.enter_context(prepared_job(family, pairs, config, progress=lambda items, *_: items))
        take_step(job, 0)
        gc.collect()
    with stack:
        with torch.profiler.profile(profile_memory=True) as step:
            take_step(job, 1)
        measured = allocated(setup)[0] + allocated(step)[1]
        if not config.rank:  # the reference's copy waits in the CPU's memory, which is no other device's here
            measured -= sum(value.numel() * value.element_size() for value in job.parameters.values())
    batch = {name: value[0].to("meta") for name, value in family.stack([conditions]).items()}
    predicted = predict_step(family, shape, GRID, batch, config, row.weights, row.schedule)
    return predicted.peak, measured


def measured_table() -> str:
    """Predicted against measured."""
    lines = [
        "| class of | schedule | checkpointing | weights, computed in | other settings | predicted | measured | off |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        started = time.perf_counter()
        predicted, measured = measure(row)
        others = ", ".join(f"{name} {value}" for name, value in row.settings.items()) or "-"
        dtype = str(row.weights).removeprefix("torch.")
        computed = "bfloat16" if row.mixed == "bf16" else dtype
        lines.append(
            f"| {row.model} | {row.schedule} | {row.checkpointing} | {dtype}, {computed} | {others} | "
            f"{predicted / 2**20:.0f} MiB | {measured / 2**20:.0f} MiB | {predicted / measured - 1:+.1%} |"
        )
        print(lines[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
    return "\n".join(lines) + "\n"


class Alone(Denoiser):
    """A network that is predicted without its pipeline, which calls it in the same way."""

    compression: ClassVar[tuple[int, int]] = (4, 8)
    channels: ClassVar[int] = 16

    def __init__(self, shell: Shell) -> None:
        super().__init__(SimpleNamespace(transformer=network_of(shell)))
        frames, height, width = shell.clip
        time, space = self.compression
        self.latents = (self.channels, (frames - 1) // time + 1, height // space, width // space)

    def stack(self, conditions: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def blank_conditions(self) -> dict[str, Tensor]:
        """Conditions of the longest prompt."""
        return {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in self.texts.items()}

    texts: ClassVar[dict[str, tuple[int, ...]]] = {}


class Cosmos(Alone):
    """Cosmos-Predict 2.5: which frames are given, and what is padding, are appended."""

    texts: ClassVar[dict[str, tuple[int, ...]]] = {"text": (512, 100352)}

    def predict(self, model: nn.Module, noisy: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype = conditions["text"].dtype
        given = noisy.new_zeros(len(noisy), 2, *noisy.shape[2:])
        return model(
            hidden_states=torch.cat([noisy, given], dim=1).to(dtype), timestep=t.to(dtype),
            encoder_hidden_states=conditions["text"], fps=16, return_dict=False,
        )[0]  # fmt: skip


ALONE = {
    "nvidia/Cosmos-Predict2.5-2B": Cosmos,
}
SETTINGS = TrainConfig()  # a LoRA of rank 32, one pair in a batch, cached errors of the reference


class Found(NamedTuple):
    """What was predicted of a published model."""

    name: str
    shell: Shell
    parameters: int
    tokens: int
    options: list[Option]


def predict_model(name: str) -> None:
    """Predict a model with bf16 weights on its usual clip, and keep what comes out."""
    shell = PUBLISHED[name]
    family: Any = ALONE[name](shell) if name in ALONE else load_shell(name)
    latents = family.latents if name in ALONE else family.latent_shape(*shell.clip)
    options = predict_options(family, latents, GRID, family.blank_conditions(), SETTINGS, torch.bfloat16)
    config = family.transformer.config
    patch = config.get("patch_size", 1)
    sides = patch if isinstance(patch, list | tuple) else (config.get("patch_size_t") or 1, patch, patch)
    tokens = math.prod(length // side for length, side in zip(family.latent_size(latents), sides, strict=True))
    parameters = sum(value.numel() for value in family.transformer.parameters())
    used = resource.getrusage(resource.RUSAGE_SELF)
    kept = {
        "parameters": parameters, "tokens": tokens, "options": [asdict(option) for option in options],
        "torch": torch.__version__, "diffusers": diffusers.__version__, "CPU seconds": round(used.ru_utime),
        "GiB": round(used.ru_maxrss / 2**20, 1),
    }  # fmt: skip
    write_json(RESULTS / f"{name.replace('/', '--')}.json", kept)
    print(f"{name}: {used.ru_utime:.0f} s of CPU", flush=True)


def predicted_models() -> tuple[list[Found], str]:
    """The twelve models, each predicted in a process of its own, and how that went; kept ones are read."""
    found, notes = [], []
    for name, shell in PUBLISHED.items():
        file = RESULTS / f"{name.replace('/', '--')}.json"
        if not file.exists():
            subprocess.run([sys.executable, "-m", "benchmarks.memory", name], check=True, cwd=ROOT)
        kept = json.loads(file.read_text())
        options = [Option(**option | {"step": Step(**option["step"])}) for option in kept["options"]]
        found.append(Found(name, shell, kept["parameters"], kept["tokens"], options))
        notes.append(kept)
    seconds, memory = sum(one["CPU seconds"] for one in notes), max(one["GiB"] for one in notes)
    versions = f"torch {notes[0]['torch']} and diffusers {notes[0]['diffusers']}"
    return found, f"Predicted with {versions} in {seconds} s of CPU and {memory} GiB of memory.\n"


def gib(count: float) -> str:
    """Bytes as a number of GiB."""
    return f"{count / 2**30:.1f}"


def peaks_table(models: list[Found]) -> str:
    """Peaks of every schedule and checkpointing mode."""
    columns = [(schedule, mode) for schedule in (SUPERVISED, "margin_first", "batched")
               for mode in ("none", "selective", "full")]  # fmt: skip
    head = ["model", "parameters (published)", "clip, tokens", "bf16 weights, LoRA"]
    head += [f"{'fine-tuning' if schedule == SUPERVISED else schedule}, {mode}" for schedule, mode in columns]
    lines = ["| " + " | ".join([*head, "margin_first, full, offloaded"]) + " |", "|---" * (len(head) + 1) + "|"]
    for model in models:
        title, published = COUNTS[model.name]
        clip = " x ".join(map(str, model.shell.clip))
        by = {(option.schedule, option.checkpointing): option for option in model.options if not option.offload}
        away = next(option for option in model.options if option.offload)
        first = by["batched", "none"].step
        cells = [title, f"{model.parameters:,} ({published})", f"{clip}, {model.tokens:,}", gib(first.weights)]
        cells += [gib(by[column].step.peak) for column in columns]
        lines.append("| " + " | ".join([*cells, gib(away.step.peak)]) + " |")
    return "\n".join(lines) + "\n"


def settings_of(options: list[Option], card: Device) -> str:
    """The settings of least work that fit, their peak and that of fine-tuning with the same checkpointing."""
    best = cheapest(options, card)
    if best is None:
        least = min(option.step.peak for option in options if option.schedule != SUPERVISED)
        return f"no: at least {gib(least)}"
    same = next(one for one in options if one.schedule == SUPERVISED and one.checkpointing == best.checkpointing)
    away = ", offloaded" if best.offload else ""
    return f"{best.schedule}, {best.checkpointing}{away}: {gib(best.step.peak)} ({gib(same.step.peak)})"


def fits_table(models: list[Found], sizes: tuple[str, ...]) -> str:
    """What fits on which size of device, with which settings."""
    lines = ["| model | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for model in models:
        title = COUNTS[model.name][0] + ("" if model.shell.pipeline else " (network alone)")
        cells = [settings_of(model.options, find_device(size)) for size in sizes]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines) + "\n"


def cards_text() -> str:
    """What a new user sees: halo doctor --write for three cards, and halo plan of the file for the first."""
    from halo_fast.pipeline import cli, plan

    parts, found, predict = [], {}, plan.predict

    def predicted_once(config: Any, choices: Any = None, begun: Any = None) -> Any:
        """What is predicted depends on these alone; the plan of a file asks again what its writer asked."""
        key = config.pretrained_model_name_or_path, str(config.generate), choices
        if key not in found:
            found[key] = predict(config, choices, begun)
        return found[key]

    plan.predict = predicted_once
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("prompts.txt").write_text("".join(f"a cat jumps over box number {index}\n" for index in range(500)))
        Path("heldout.txt").write_text("".join(f"a dog runs around tree number {index}\n" for index in range(64)))
        for card in ("rtx4090", "l40s", "h100"):
            commands = [["doctor", "--write", f"{card}.yaml", "--device", card]]
            commands += [["plan", f"{card}.yaml", "--device", card]]
            for words in commands:
                shown = io.StringIO()
                with contextlib.redirect_stdout(shown):
                    assert cli.main(words) == 0
                parts.append(f"$ halo {' '.join(words)}\n{shown.getvalue()}")
                print(parts[-1], flush=True)
    return "```text\n" + "\n".join(parts) + "```\n"


def replace_part(page: Path, name: str, text: str) -> None:
    """Put a text between its marks in a page."""
    marks = f"<!-- python -m benchmarks.memory: {name} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.read_text().partition(marks[0])
    _, closed, after = rest.partition(marks[1])
    assert found and closed, f"{page}: no marks of {name}"
    write_bytes(page, (before + marks[0] + text + marks[1] + after).encode())


def write_measured() -> None:
    """The table of predicted against measured peaks."""
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, CPU"
    replace_part(PAGE, "measured", f"{measured_table()}\n{versions}.\n")


def write_models() -> None:
    """The tables of the twelve models, and those of the quick start."""
    models, note = predicted_models()
    replace_part(PAGE, "fits", fits_table(models, SIZES))
    replace_part(PAGE, "peaks", f"{peaks_table(models)}\n{note}")
    replace_part(QUICK_START, "fits", fits_table([one for one in models if one.shell.pipeline], ("24 GiB", "80 GiB")))


def write_cards() -> None:
    """What the commands print for three cards."""
    replace_part(PAGE, "cards", cards_text())


def main() -> None:
    """Write the parts that are named, or all."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], None]] = {"measured": write_measured, "models": write_models, "cards": write_cards}
    if not sys.argv[1:]:
        shutil.rmtree(RESULTS, ignore_errors=True)
    for name in sys.argv[1:] or parts:
        parts[name]() if name in parts else predict_model(name)


if __name__ == "__main__":
    main()
