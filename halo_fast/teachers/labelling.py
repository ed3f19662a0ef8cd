"""Labels of clips by a teacher and a store: every question is asked once, whatever happens in between."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from halo_fast.data.clips import read_clip
from halo_fast.data.tables import ClipRow, LabelRow
from halo_fast.errors import UserError
from halo_fast.files import hash_file, hash_text, progress
from halo_fast.teachers.base import Clip, Judge, Teacher
from halo_fast.teachers.rubric import PATCH_DIMENSIONS, PENDING, RUBRIC_DIMENSIONS, VIDEO_DIMENSIONS, Label
from halo_fast.teachers.store import LabelStore, label_key

__all__ = [
    "JudgementRow",
    "candidate_pairs",
    "draw_clips",
    "judge_pairs",
    "judgement_rows",
    "label_clips",
    "label_rows",
    "open_clip",
]

Pair = tuple[Clip, Clip]


@dataclass(frozen=True)
class JudgementRow:
    """Two candidates of a prompt compared, in judgements.parquet: "a", "b", "tie" or "inconsistent" a dimension."""

    prompt_id: int
    clip_a: str
    clip_b: str
    teacher: str
    status: str
    reason: str
    visual_quality: str | None = None
    text_alignment: str | None = None
    dynamic_degree: str | None = None
    temporal_consistency: str | None = None
    factual_consistency: str | None = None


def draw_clips(total: int, count: int | None, seed: int) -> list[int]:
    """Which of `total` clips are annotated, in the order of the draw.

    Args:
        total: clips that there are.
        count: clips to draw; None, or more than there are, for all.
        seed: of the draw.
    """
    return np.random.default_rng(seed).permutation(total)[:count].tolist()


def open_clip(path: Path, prompt: str) -> Clip:
    """A clip in a video file, whose frames are read when they are needed.

    Raises:
        UserError: the file does not exist.
    """
    if not path.exists():
        raise UserError(f"{path}: the clip is gone; run `halo generate` to make it again")
    return Clip(hash_file(path), prompt, partial(read_clip, path))


def candidate_pairs(clips: Sequence[Clip], groups: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs of clips in the same group, by their indices; equal clips are not compared.

    Args:
        clips: the clips.
        groups: of each clip, the number of its prompt.
    """
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return [(a, b) for group in members.values() for a, b in combinations(group, 2) if clips[a].hash != clips[b].hash]


def label_clips(
    clips: Sequence[Clip], teacher: Teacher, store: LabelStore, compared: Sequence[Pair] = ()
) -> list[Label]:
    """The label of each clip, from the store or else from the teacher.

    Labels are stored as they come, so a killed process goes on without asking again. Only final labels are kept: a clip
    without scores, or with patches that have none, is asked about again.

    Args:
        clips: to be labelled; equal clips of equal prompts are one question.
        teacher: asked for what the store does not have.
        store: of labels.
        compared: pairs that are compared afterwards; a teacher that is paid includes them in its estimate.

    Raises:
        UserError: whatever ends the teacher's work; the labels that came before are stored.
    """
    keys = [_clip_key(clip, teacher) for clip in clips]
    found = {key: label for key, label in store.find(keys).items() if label.final}
    missing = {key: clip for key, clip in zip(keys, clips, strict=True) if key not in found}
    unjudged = list(_unjudged(compared, teacher, store).values())
    labels = teacher.labels(list(missing.values()), unjudged)
    asked = list(missing)
    for index, label in progress(labels, len(asked), "annotate"):
        found[asked[index]] = label
        if label.status not in PENDING:
            store.add({asked[index]: label}, teacher.name)
    return [found[key] for key in keys]


def judge_pairs(pairs: Sequence[Pair], teacher: Judge, store: LabelStore) -> list[Mapping[str, str]]:
    """The judgement of each pair, from the store or else from the teacher; see `label_clips`."""
    keys = [_pair_key(pair, teacher) for pair in pairs]
    found: dict[str, Mapping[str, str]] = _judged(keys, store)
    missing = _unjudged(pairs, teacher, store)
    asked = list(missing)
    for index, judgement in progress(teacher.judge(list(missing.values())), len(asked), "annotate: comparisons"):
        found[asked[index]] = judgement
        if judgement["status"] not in PENDING:
            store.add_judgements({asked[index]: judgement}, teacher.name)
    return [found[key] for key in keys]


def label_rows(clip_ids: Sequence[str], labels: Sequence[Label], teacher: Teacher) -> list[LabelRow]:
    """Labels as rows of labels.parquet; a dimension that nobody scored is a column only if all teachers score it.

    Args:
        clip_ids: of the clips.
        labels: of the clips.
        teacher: who gave them.

    Raises:
        ValueError: a label of another grid than the teacher's.
    """
    scored = {name for label in labels for name in label.video}
    dimensions = [name for name in RUBRIC_DIMENSIONS if name in VIDEO_DIMENSIONS or name in scored]
    return [
        LabelRow(
            clip_id, teacher.name, label.status, label.reason, list(teacher.grid),
            {name: label.video.get(name, math.nan) for name in dimensions},
            {name: _patches(label, name, math.prod(teacher.grid)) for name in PATCH_DIMENSIONS},
        )
        for clip_id, label in zip(clip_ids, labels, strict=True)
    ]  # fmt: skip


def judgement_rows(
    pairs: Sequence[tuple[ClipRow, ClipRow]], judgements: Sequence[Mapping[str, str]], teacher: Teacher
) -> list[JudgementRow]:
    """Judgements as rows of judgements.parquet."""
    return [
        JudgementRow(a.prompt_id, a.clip_id, b.clip_id, teacher.name, **judgement)
        for (a, b), judgement in zip(pairs, judgements, strict=True)
    ]


def _patches(label: Label, name: str, count: int) -> list[float]:
    scores = list(label.patches.get(name, [math.nan] * count))
    if len(scores) != count:
        raise ValueError(f"patches: expected {count} scores of {name}, got {len(scores)}")
    return scores


def _clip_key(clip: Clip, teacher: Teacher) -> str:
    return label_key(clip.hash, clip.prompt, teacher.grid, teacher.name)


def _pair_key(pair: Pair, teacher: Teacher) -> str:
    return hash_text(" ".join(_clip_key(clip, teacher) for clip in pair))


def _unjudged(pairs: Sequence[Pair], teacher: Teacher, store: LabelStore) -> dict[str, Pair]:
    """The pairs that the store has no judgement of, by their keys."""
    keyed = {_pair_key(pair, teacher): pair for pair in pairs}
    known = _judged(keyed, store)
    return {key: pair for key, pair in keyed.items() if key not in known}


def _judged(keys: Iterable[str], store: LabelStore) -> dict[str, Mapping[str, str]]:
    """The stored judgements that are usable."""
    return {key: found for key, found in store.find_judgements(keys).items() if found["status"] == "ok"}
