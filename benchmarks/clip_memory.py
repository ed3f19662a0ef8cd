"""Memory of the stages that read clips, on few clips and on many: it should not grow with their number.

    python -m benchmarks.clip_memory               # all of them on 50 and 400 clips: the table of docs/memory.md
    python -m benchmarks.clip_memory --only score  # one of them

Clips are mp4 files of 49 x 240 x 416 with labels; a few different ones stand for all. Each stage runs in a process of
its own. Measured is its private memory, RssAnon of /proc/PID/status, every 20 ms. Pages of memory-mapped files are not
counted: the system takes them back whenever it needs them. They are given beside it, as the most of VmRSS.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases.step import text_parts
from halo_fast import registry
from halo_fast.data.clips import write_clip
from halo_fast.data.tables import ClipRow, LabelRow, write_rows
from halo_fast.demo import planted
from halo_fast.files import write_bytes, write_csv
from halo_fast.pipeline import arms
from halo_fast.pipeline.agreement import reward_eval
from halo_fast.pipeline.config import (
    AnnotateConfig,
    Config,
    EvaluateConfig,
    GenerateConfig,
    PairsConfig,
    RewardConfig,
    TrainConfig,
)
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import STAGES
from halo_fast.rewards import RewardModel, RewardModelConfig

SIZE = (49, 240, 416)
GRID = (4, 3, 4)
DIFFERENT = 8
DIMENSIONS = ("visual_quality", "text_alignment", "dynamic_degree")
WORDS = ("red", "green", "blue", "small", "large", "ball", "cube", "disc", "jumps", "rolls", "left", "right")
MODEL = "benchmarks.clip_memory:pipeline"
# Settings of reward training by backbone. A step on one clip of this size takes the default one a minute of this CPU.
TRAINING: dict[str, dict[str, Any]] = {
    "benchmarks.clip_memory:Means": {"video_steps": 2, "patch_steps": 2, "batch_size": 2},
    "compact": {"video_steps": 0, "patch_steps": 1, "batch_size": 1, "held_out_share": 0.01},
    "frames": {"video_steps": 2, "patch_steps": 2, "batch_size": 2},
}
CHAIN = ("score", "pairs", "cache", "train", "evaluate")  # each reads what those before it wrote
MEASURED = (*(f"reward, {backbone}" for backbone in TRAINING), *CHAIN, "reward eval, ratings", "reward eval, patches")
COUNTS = (50, 400)


def config(folder: Path, backbone: str = "") -> Config:
    """Settings of a run on the clips: of a training of the reward model, or of all stages after it."""
    frames, height, width = SIZE
    return Config(
        output_dir=str(folder / (f"run_{backbone.rpartition(':')[2]}" if backbone else "run")),
        pretrained_model_name_or_path=MODEL,
        evaluation_prompts=str(folder / "prompts.txt"),
        reward_model="" if backbone else str(folder / "model"),
        grid=GRID,
        generate=GenerateConfig(
            num_inference_steps=1, guidance_scale=1.0, num_frames=frames, height=height, width=width, fps=8,
            batch_size=1,
        ),
        annotate=AnnotateConfig(teacher="human:nobody"),
        reward=RewardConfig(**(TRAINING.get(backbone) or {}), backbone=backbone or "compact"),
        pairs=PairsConfig(patch_delta=0.0),
        train=TrainConfig(
            max_train_steps=2, gradient_accumulation_steps=1, rank=4, reference_draws=0, off_policy_pairs=0,
            mixed_precision="no", heldout_share=0.0, diagnostics_steps=0,
        ),
        evaluate=EvaluateConfig(num_prompts=None),
    )  # fmt: skip


def pipeline() -> Any:
    """A Wan pipeline of one small block with a linear autoencoder: what is measured are clips, not the model."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    from halo_fast.demo.autoencoder import BlockAutoencoder

    torch.manual_seed(0)
    tokenizer, text_encoder = text_parts()
    autoencoder = BlockAutoencoder(16, [0.0] * 16, [1.0] * 16)
    for basis in (autoencoder.first_basis, autoencoder.group_basis):
        torch.nn.init.orthogonal_(basis, 0.05)  # quiet clips, which are soon encoded
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder.eval(), scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder.eval(),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=16, in_channels=16, out_channels=16,
            text_dim=256, freq_dim=16, ffn_dim=16, num_layers=1,
        ).eval(),
    )  # fmt: skip


class Means(nn.Module):
    """A reward backbone that reads mean colours: what is measured are clips, not the model."""

    negatives = 1

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.video_head = nn.Linear(3, len(config.video_dimensions))
        self.patch_head = nn.Linear(3, len(config.patch_dimensions))

    def frozen_features(self, videos: Tensor) -> None:
        return None

    def fit_closed_form(self, frozen: None, prompts: Sequence[str], weight: Tensor) -> None:
        return None

    def encode(self, videos: Tensor, frozen: None, word_evidence: None = None) -> Tensor:
        return videos.movedim(-1, 1).float() / 255

    def logits(self, features: Tensor, prompts: Sequence[str], grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        means = nn.functional.adaptive_avg_pool3d(features, tuple(grid)).movedim(1, -1)
        return self.video_head(means.mean(dim=(1, 2, 3))), self.patch_head(means).movedim(-1, 1)

    def video_logits_for(self, features: Tensor, prompts: Sequence[str], others: Tensor) -> Tensor:
        return self.logits(features, prompts, (1, 1, 1))[0][:, None].expand(-1, others.shape[1], -1)


def pictures(folder: Path) -> list[Path]:
    """A few different clips: coloured noise of coarse cells that moves."""
    generator, files = torch.Generator().manual_seed(0), []
    for number in range(DIFFERENT):
        cells = torch.randint(0, 256, (SIZE[1] // 16, SIZE[2] // 16, 3), generator=generator, dtype=torch.uint8)
        picture = cells.repeat_interleave(16, 0).repeat_interleave(16, 1)
        video = torch.stack([picture.roll((number + 1) * frame, 1) for frame in range(SIZE[0])])
        files.append(folder / f"clip{number}.mp4")
        if not files[-1].exists():
            write_clip(files[-1], video, 8, 18)
    return files


def prepare(folder: Path, count: int) -> None:
    """Clips with labels as generate and annotate leave them, a reward model, and tables for `halo reward eval`."""
    distinct, rng = pictures(folder.parent), np.random.default_rng(0)
    prompts = [f"a {' '.join(rng.choice(WORDS, 3, replace=False))} number{number}" for number in range(count // 2)]
    write_bytes(folder / "prompts.txt", "\n".join(prompts).encode())
    RewardModel(RewardModelConfig(DIMENSIONS, backbone="benchmarks.clip_memory:Means")).save(folder / "model")
    rows = [
        ClipRow(
            f"c{number:04d}", number // 2, prompts[number // 2], number % 2, number, f"videos/{number:03d}_.mp4", None
        )
        for number in range(count)
    ]
    labels = [
        LabelRow(
            row.clip_id, "human:nobody", "ok", "", list(GRID),
            dict(zip(DIMENSIONS, rng.uniform(1, 5, 3).tolist(), strict=True)),
            {"quality": rng.uniform(1, 5, math.prod(GRID)).tolist()},
        )
        for row in rows
    ]  # fmt: skip
    for backbone in ("", *TRAINING):
        run = Run(config(folder, backbone))
        with run.stage("generate", {"generate": asdict(run.config.generate)}, {}) as stage:
            copy_to(stage.folder, [row.video for row in rows], distinct)
            write_rows(stage.folder / "clips.parquet", rows, ClipRow)
            stage.finish({"clips": count})
        with run.stage("annotate", {}, {}) as stage:
            write_rows(stage.folder / "labels.parquet", labels, LabelRow)
            stage.finish({"clips": count})
    run_stage(folder, "reward")  # takes the model
    copy_to(folder / "rated", [row.video for row in rows], distinct)
    scored = [
        {"video": row.video, "prompt": row.prompt} | dict(zip(DIMENSIONS, rng.uniform(1, 5, 3), strict=True))
        for row in rows
    ]
    write_csv(folder / "rated" / "ratings.csv", scored)
    prepare_patches(folder / "patches", rows, distinct)


def prepare_patches(folder: Path, rows: list[ClipRow], distinct: list[Path]) -> None:
    """A folder as FETV's whose clips' patches were scored; its small copies of the clips are of one pixel block."""
    rng = np.random.default_rng(1)
    copy_to(folder, [row.video for row in rows], distinct)
    np.savez(folder / "clips.npz", video=rng.integers(0, 256, (len(rows), 2, 8, 8, 3), dtype=np.uint8))
    columns = [f"{name}_h0" for name in ("static", "temporal", "align")]
    rated = [{"prompt": row.prompt, "model": f"m{row.candidate}"} | dict.fromkeys(columns, "") for row in rows]
    write_csv(folder / "clips.csv", rated)
    keys = [(row, *place) for row in range(len(rows)) for place in np.ndindex(*GRID)]
    names = ("row", "pass", "half", "patch_row", "patch_column", "score")
    write_csv(
        folder / "patch_labels.csv",
        [
            dict(zip(names, (row, 0, *place, int(rng.integers(1, 6))), strict=True))
            for row, *place in keys
        ],
    )  # fmt: skip


def copy_to(folder: Path, names: list[str], distinct: list[Path]) -> None:
    """Put one of the different clips under each name, with a box that says nothing: no two files are equal."""
    for number, name in enumerate(names):
        clip = distinct[number % len(distinct)].read_bytes() + struct.pack(">I4sQ", 16, b"free", number)
        write_bytes(folder / name, clip)


def cache_once(sample: Callable[..., Any]) -> Callable[..., Any]:
    """A sampler that gives its first clips again and again: to sample hundreds takes hours of this CPU."""
    found: list[Any] = []

    def again(*arguments: Any) -> Any:
        if not found:
            found.append(sample(*arguments))
        return found[0]

    return again


def run_stage(folder: Path, name: str) -> None:
    """Run one of the measured stages."""
    stage, _, kind = name.partition(", ")
    if stage == "reward eval":
        # few steps of the models that are trained on planted damage, which are as large with many
        planted.planted_in_clips = partial(planted.planted_in_clips, training=32, steps=2)
        data = folder / "rated" / "ratings.csv" if kind == "ratings" else folder / "patches"
        reward_eval(str(data), str(folder / "model"))
        return
    if stage == "evaluate":
        arms.sample_clips = cache_once(arms.sample_clips)
    settings = config(folder, kind)
    registry.load(STAGES[stage].target)(settings, Run(settings))


def measure(folder: Path, name: str) -> dict[str, float]:
    """Run a stage in this process: its most private memory and its most memory in all, MiB, and its seconds."""
    most, done = [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            for index, field in enumerate(("RssAnon", "VmRSS")):
                found = re.search(rf"{field}:\s+(\d+) kB", status)
                most[index] = max(most[index], int(found[1]) if found else 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begin = time.process_time()
    run_stage(folder, name)
    done.set()
    watcher.join()
    return {"private": most[0] / 1024, "all": most[1] / 1024, "seconds": time.process_time() - begin}


def main() -> None:
    """Measure the stages, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MEASURED)
    parser.add_argument("--folder", type=Path, help="where clips and runs go, on a disk; default: a temporary one")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(Path(given.measure[0]), given.measure[1])))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        table(Path(place), given.only)


def table(place: Path, only: str | None) -> None:
    """Print a row for each stage."""
    folders = {count: place / str(count) for count in COUNTS}
    place.mkdir(exist_ok=True)
    for count, folder in folders.items():
        prepare(folder, count)
    rows = [
        f"| stage | {' | '.join(f'{count} clips' for count in COUNTS)} | apart | with pages of files |",
        "|---|---|---|---|---|",
    ]
    needed = CHAIN[: CHAIN.index(only)] if only in CHAIN else ()
    for name in MEASURED if only is None else (*needed, only):
        found = {}
        for count, folder in folders.items():
            command = [sys.executable, "-m", "benchmarks.clip_memory", "--measure", str(folder), name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[count] = json.loads(output.splitlines()[-1])
            print(f"{name}, {count} clips: {found[count]}", flush=True)
        few, many = (found[count] for count in COUNTS)
        apart = many["private"] - few["private"]
        rows.append(f"| {name} | {few['private']:,.0f} | {many['private']:,.0f} | {apart:,.0f} | {many['all']:,.0f} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
