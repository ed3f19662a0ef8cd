"""The stage that asks a teacher: each question once, whatever happens in between."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halo_fast.data.clips import latent_factors, read_clip
from halo_fast.data.tables import ClipRow
from halo_fast.errors import UserError
from halo_fast.files import hash_file, hash_text, progress, read_table, write_parquet
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.teachers.base import PATCH_DIMENSIONS, RUBRIC_DIMENSIONS, VIDEO_DIMENSIONS, Label, Person, Teacher
from halo_fast.teachers.openai.teacher import Clip, OpenAITeacher
from halo_fast.teachers.store import LabelStore, label_key

__all__ = ["annotate", "load_teacher"]

_Pairs = dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]]  # two clips by their ids
_PENDING = {"unavailable", "unlabelled"}  # nobody has answered yet: not kept, so that the answer may still come


def load_teacher(
    config: Config, store: LabelStore, factors: tuple[int, int, bool] = (1, 1, False), prompts: Sequence[str] = ()
) -> Teacher:
    """The teacher that `config.annotate.teacher` names.

    Args:
        config: of the run.
        store: where a teacher that is paid keeps answers and spending.
        factors: spatial_factor, temporal_factor and causal of PatchGrid, by which the grid cuts the clips.
        prompts: of the clips.

    Raises:
        UserError: no such teacher, clips that it cannot read, or settings that cannot be.
    """
    if config.annotate.teacher == "openai":
        return OpenAITeacher(config.annotate.openai, config.grid, store, factors, config.seed)
    if config.annotate.teacher.startswith("human:"):
        return Person(config.annotate.teacher, config.grid)
    if config.annotate.teacher != "demo":
        raise UserError(f'annotate.teacher: expected "demo", "openai" or "human:NAME", got {config.annotate.teacher!r}')
    from halo_fast.demo import check
    from halo_fast.demo.meters import WEIGHTS, DefectMeter, FidelityMeter
    from halo_fast.demo.teacher import DemoTeacher

    check(config, prompts, "prompts")

    meter, noisy_share = DefectMeter.load(), config.annotate.noisy_share
    version = hash_text("".join(hash_file(WEIGHTS / f"{name}_meter.safetensors") for name in ("defect", "fidelity")))
    try:
        return DemoTeacher(meter, FidelityMeter.load(), meter.grid, noisy_share, config.seed, version[:12])
    except ValueError as error:
        raise UserError(f"annotate.{error}") from error


def annotate(config: Config, run: Run, teacher: Teacher | None = None) -> None:
    """Have a teacher score clips and their patches; a stage.

    Reads generate/clips.parquet, writes annotate/labels.parquet, and annotate/judgements.parquet if the candidates of a
    prompt are compared. Answers are kept in labels.sqlite of the run directory as they come: a killed stage goes on
    without asking again, and so does --force.

    Args:
        config: annotate holds the teacher's name and how many clips it sees; they are drawn by config.seed.
        run: the run directory.
        teacher: asked instead of the one that config.annotate.teacher names.

    Raises:
        UserError: unknown teacher, another grid than the teacher's, an unreadable clip, no usable label at all; of a
            teacher that is paid also that the budget is used up or its server refuses.
    """

    folder = run.require("generate/clips.parquet").parent
    clips = _chosen(read_table(folder / "clips.parquet").to_pylist(), config)
    with LabelStore(run.path / "labels.sqlite") as store:
        factors = latent_factors(folder, ClipRow(**clips[0])) or (1, 1, False)
        teacher = teacher or load_teacher(config, store, factors, [clip["prompt"] for clip in clips])
        settings = asdict(config.annotate) | {"judge": teacher.name, "grid": config.grid, "seed": config.seed}
        del settings["openai"]
        if isinstance(teacher, OpenAITeacher):
            # its name holds what the answers depend on; bounds on money and time may be raised to go on
            del settings["noisy_share"], settings["batch_size"]
            settings["pairwise"] = config.annotate.openai.pairwise
        with run.stage("annotate", settings, {"clips": folder}) as stage:
            if stage.done:
                return
            if tuple(teacher.grid) != tuple(config.grid):
                raise UserError(
                    f"grid: teacher {teacher.name!r} scores {teacher.grid}, got {config.grid}; set it to that"
                )
            for clip in clips:
                video = folder / clip["video"]
                if not video.exists():
                    raise UserError(f"{video}: the clip is gone; run `halo generate` to make it again")
                clip["hash"] = hash_file(video)
                clip["key"] = label_key(clip["hash"], clip["prompt"], config.grid, teacher.name)
            pairwise = isinstance(teacher, OpenAITeacher) and config.annotate.openai.pairwise
            pairs = _pairs(clips) if pairwise else {}
            labels = _labels(clips, pairs, folder, teacher, store, config.annotate.batch_size)
            counts = _write_labels(stage.folder / "labels.parquet", clips, labels, teacher)
            if isinstance(teacher, OpenAITeacher):
                if pairwise:
                    counts |= _judge(stage.folder / "judgements.parquet", pairs, folder, teacher, store)
                counts["dollars"] = store.spent()
            stage.finish(counts)


def _labels(
    clips: list[dict[str, Any]], pairs: _Pairs, folder: Path, teacher: Teacher, store: LabelStore, batch_size: int
) -> dict[str, Label]:
    """The label of each clip's key; what the store does not have is asked, and stored unless nobody answered."""
    known = store.find(clip["key"] for clip in clips)
    # equal clips of equal prompts are one question
    unknown = list({clip["key"]: clip for clip in clips if clip["key"] not in known}.values())
    if isinstance(teacher, OpenAITeacher):
        compared = [(_clip(a, folder), _clip(b, folder)) for a, b in _unjudged(pairs, store).values()]
        labelled = teacher.labels([_clip(clip, folder) for clip in unknown], compared)
        for index, label in progress(labelled, len(unknown), "annotate"):
            known[unknown[index]["key"]] = label
            if label.status not in _PENDING:
                store.add({unknown[index]["key"]: label}, teacher.name)
        return known
    batches = [unknown[start : start + batch_size] for start in range(0, len(unknown), batch_size)]
    for batch in progress(batches, len(batches), "annotate"):
        videos = torch.stack([read_clip(folder / clip["video"]) for clip in batch])
        labels = teacher.label(videos, [clip["prompt"] for clip in batch])
        found = {clip["key"]: label for clip, label in zip(batch, labels, strict=True)}
        store.add({key: label for key, label in found.items() if label.status not in _PENDING}, teacher.name)
        known |= found
    return known


def _write_labels(
    path: Path, clips: list[dict[str, Any]], labels: dict[str, Label], teacher: Teacher
) -> dict[str, int | float]:
    """Write the labels; counts of all, of usable ones, and of each reason why there is none."""
    import pyarrow

    scored = {name for label in labels.values() for name in label.video}
    dimensions = [name for name in RUBRIC_DIMENSIONS if name in VIDEO_DIMENSIONS or name in scored]
    rows = [_row(clip["clip_id"], labels[clip["key"]], teacher, dimensions) for clip in clips]
    statuses = Counter(row["status"] for row in rows)
    if not statuses["ok"]:
        reason = f"{rows[0]['status']} {rows[0]['reason']}".strip()
        raise UserError(f"annotate: teacher {teacher.name!r} gave no score on {len(rows)} clips ({reason})")
    write_parquet(path, pyarrow.Table.from_pylist(rows, _schema(dimensions)))
    counts: dict[str, int | float] = {"clips": len(rows), "labelled": statuses["ok"]}
    return counts | {status: count for status, count in sorted(statuses.items()) if status != "ok"}


def _pairs(clips: list[dict[str, Any]]) -> _Pairs:
    """The candidates of each prompt by twos, by their ids; equal clips are not compared."""
    candidates = defaultdict(list)
    for clip in clips:
        candidates[clip["prompt_id"]].append(clip)
    return {
        (a["clip_id"], b["clip_id"]): (a, b)
        for group in candidates.values()
        for a, b in combinations(group, 2)
        if a["hash"] != b["hash"]
    }


def _pair_key(a: dict[str, Any], b: dict[str, Any]) -> str:
    return hash_text(f"{a['key']} {b['key']}")


def _unjudged(pairs: _Pairs, store: LabelStore) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The pairs that the store has no judgement of, by their keys."""
    keyed = {_pair_key(*pair): pair for pair in pairs.values()}
    known = store.find_judgements(keyed)
    return {key: pair for key, pair in keyed.items() if key not in known}


def _judge(
    path: Path, pairs: _Pairs, folder: Path, teacher: OpenAITeacher, store: LabelStore
) -> dict[str, int | float]:
    """Have pairs compared and write the judgements; counts of all and of usable ones."""
    import pyarrow

    keys = {ids: _pair_key(*pair) for ids, pair in pairs.items()}
    known = store.find_judgements(keys.values())
    unknown = list(_unjudged(pairs, store).items())
    asked = [(_clip(a, folder), _clip(b, folder)) for _, (a, b) in unknown]
    for index, judgement in progress(teacher.judge(asked), len(asked), "compare"):
        key, _ = unknown[index]
        known[key] = judgement
        if judgement["status"] not in _PENDING:
            store.add_judgements({key: judgement}, teacher.name)
    names = ["prompt_id", "clip_a", "clip_b", "teacher", "status", "reason", *RUBRIC_DIMENSIONS]
    schema = pyarrow.schema([(name, pyarrow.int64() if name == "prompt_id" else pyarrow.string()) for name in names])
    rows = [
        {"prompt_id": a["prompt_id"], "clip_a": a["clip_id"], "clip_b": b["clip_id"], "teacher": teacher.name}
        | known[keys[ids]]
        for ids, (a, b) in pairs.items()
    ]
    write_parquet(path, pyarrow.Table.from_pylist(rows, schema))
    return {"pairs": len(rows), "judged": sum(row["status"] == "ok" for row in rows)}


def _clip(clip: dict[str, Any], folder: Path) -> Clip:
    return Clip(clip["hash"], clip["prompt"], lambda: read_clip(folder / clip["video"]))


def _chosen(clips: list[dict[str, Any]], config: Config) -> list[dict[str, Any]]:
    count = config.annotate.num_clips
    if count is None or count >= len(clips):
        return clips
    if count < 1:
        raise UserError(f"annotate.num_clips: expected at least 1 or null for all, got {count}")
    order = np.random.default_rng(config.seed).permutation(len(clips))
    return [clips[index] for index in sorted(order[:count])]


def _row(clip_id: str, label: Label, teacher: Teacher, dimensions: Sequence[str]) -> dict[str, Any]:
    patches = math.prod(teacher.grid)
    row: dict[str, Any] = {"clip_id": clip_id, "teacher": teacher.name, "status": label.status, "reason": label.reason}
    row["grid"] = list(teacher.grid)
    for name in dimensions:
        row[f"video_{name}"] = label.video.get(name, math.nan)
    for name in PATCH_DIMENSIONS:
        row[f"patch_{name}"] = list(label.patches.get(name, [math.nan] * patches))
        if len(row[f"patch_{name}"]) != patches:
            raise ValueError(f"patches: expected {patches} scores of {name}, got {len(row[f'patch_{name}'])}")
    return row


def _schema(dimensions: Sequence[str]) -> Any:
    import pyarrow

    float32 = pyarrow.float32()
    return pyarrow.schema(
        [(name, pyarrow.string()) for name in ("clip_id", "teacher", "status", "reason")]
        + [("grid", pyarrow.list_(pyarrow.int32()))]
        + [(f"video_{name}", float32) for name in dimensions]
        + [(f"patch_{name}", pyarrow.list_(float32)) for name in PATCH_DIMENSIONS]
    )
