"""The stage that asks a teacher: each question once, whatever happens in between."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from halo_fast.config import Config
from halo_fast.data.clips import read_clip
from halo_fast.runs import Run, UserError, hash_file, hash_text, progress, write_parquet
from halo_fast.teachers.base import PATCH_DIMENSIONS, VIDEO_DIMENSIONS, Label, Teacher
from halo_fast.teachers.store import LabelStore, label_key

__all__ = ["annotate", "load_teacher"]


def load_teacher(config: Config) -> Teacher:
    """The teacher that `config.annotate.teacher` names.

    Raises:
        UserError: no such teacher, or one that does not score config.grid.
    """
    if config.annotate.teacher != "demo":
        raise UserError(f'annotate.teacher: expected "demo", got {config.annotate.teacher!r}')
    from halo_fast.demo.meters import WEIGHTS, DefectMeter, FidelityMeter
    from halo_fast.teachers.demo import DemoTeacher

    meter, noisy_share = DefectMeter.load(), config.annotate.noisy_share
    version = hash_text("".join(hash_file(WEIGHTS / f"{name}_meter.safetensors") for name in ("defect", "fidelity")))
    try:
        return DemoTeacher(meter, FidelityMeter.load(), meter.grid, noisy_share, config.seed, version[:12])
    except ValueError as error:
        raise UserError(f"annotate.{error}") from error


def annotate(config: Config, run: Run, teacher: Teacher | None = None) -> None:
    """Have a teacher score clips and their patches; a stage.

    Reads generate/clips.parquet, writes annotate/labels.parquet. Answers are kept in labels.sqlite of the run directory
    as they come, batch by batch: a killed stage goes on without asking again, and so does --force.

    Args:
        config: annotate holds the teacher's name and how many clips it sees; they are drawn by config.seed.
        run: the run directory.
        teacher: asked instead of the one that config.annotate.teacher names.

    Raises:
        UserError: unknown teacher, another grid than the teacher's, an unreadable clip, no usable label at all.
    """
    import pyarrow
    import pyarrow.parquet

    folder = run.require("generate/clips.parquet").parent
    teacher = teacher or load_teacher(config)
    settings = asdict(config.annotate) | {"teacher": teacher.name, "grid": config.grid, "seed": config.seed}
    with run.stage("annotate", settings, {"clips": folder}) as stage:
        if stage.done:
            return
        if tuple(teacher.grid) != tuple(config.grid):
            raise UserError(f"grid: teacher {teacher.name!r} scores {teacher.grid}, got {config.grid}; set it to that")
        clips = _chosen(pyarrow.parquet.read_table(folder / "clips.parquet").to_pylist(), config)
        for clip in clips:
            video = folder / clip["video"]
            if not video.exists():
                raise UserError(f"{video}: the clip is gone; run `halo generate` to make it again")
            clip["key"] = label_key(hash_file(video), clip["prompt"], config.grid, teacher.name)
        with LabelStore(run.path / "labels.sqlite") as store:
            known = store.find(clip["key"] for clip in clips)
            # equal clips of equal prompts are one question
            unknown = list({clip["key"]: clip for clip in clips if clip["key"] not in known}.values())
            size = config.annotate.batch_size
            batches = [unknown[start : start + size] for start in range(0, len(unknown), size)]
            for batch in progress(batches, len(batches), "annotate"):
                videos = torch.stack([read_clip(folder / clip["video"]) for clip in batch])
                labels = teacher.label(videos, [clip["prompt"] for clip in batch])
                store.add({clip["key"]: label for clip, label in zip(batch, labels, strict=True)}, teacher.name)
            answers = store.find(clip["key"] for clip in clips)
        rows = [_row(clip["clip_id"], answers[clip["key"]], teacher) for clip in clips]
        usable = sum(row["status"] == "ok" for row in rows)
        if not usable:
            raise UserError(
                f"annotate: teacher {teacher.name!r} gave no score on {len(rows)} clips ({rows[0]['status']})"
            )
        write_parquet(stage.folder / "labels.parquet", pyarrow.Table.from_pylist(rows, _schema()))
        stage.finish({"clips": len(rows), "labelled": usable})


def _chosen(clips: list[dict[str, Any]], config: Config) -> list[dict[str, Any]]:
    count = config.annotate.num_clips
    if count is None or count >= len(clips):
        return clips
    if count < 1:
        raise UserError(f"annotate.num_clips: expected at least 1 or null for all, got {count}")
    order = np.random.default_rng(config.seed).permutation(len(clips))
    return [clips[index] for index in sorted(order[:count])]


def _row(clip_id: str, label: Label, teacher: Teacher) -> dict[str, Any]:
    patches = math.prod(teacher.grid)
    row: dict[str, Any] = {"clip_id": clip_id, "teacher": teacher.name, "status": label.status}
    row["grid"] = list(teacher.grid)
    for name in VIDEO_DIMENSIONS:
        row[f"video_{name}"] = label.video.get(name, math.nan)
    for name in PATCH_DIMENSIONS:
        row[f"patch_{name}"] = list(label.patches.get(name, [math.nan] * patches))
        if len(row[f"patch_{name}"]) != patches:
            raise ValueError(f"patches: expected {patches} scores of {name}, got {len(row[f'patch_{name}'])}")
    return row


def _schema() -> Any:
    import pyarrow

    float32 = pyarrow.float32()
    return pyarrow.schema(
        [("clip_id", pyarrow.string()), ("teacher", pyarrow.string()), ("status", pyarrow.string())]
        + [("grid", pyarrow.list_(pyarrow.int32()))]
        + [(f"video_{name}", float32) for name in VIDEO_DIMENSIONS]
        + [(f"patch_{name}", pyarrow.list_(float32)) for name in PATCH_DIMENSIONS]
    )
