"""The tables of a run as typed rows: a frozen dataclass a table, stored as parquet.

A field of type `dict[str, ...]` holds one column for each of its keys, named by its prefix: the score
video["visual_quality"] is the column video_visual_quality. A column belongs to the longest prefix that it begins with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from halo_fast import processes
from halo_fast.errors import UserError
from halo_fast.files import read_table, write_parquet

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "PART",
    "CacheRow",
    "ClipRow",
    "EvaluatedRow",
    "LabelRow",
    "PairRow",
    "ScoreRow",
    "read_rows",
    "shared_rows",
    "write_rows",
]

Item = TypeVar("Item")
Row = TypeVar("Row")

PART = ".part"
"""Suffix of the files in which `shared_rows` keeps rows until their stage is finished."""

# arrow types of the annotations that rows use
_TYPES = {"str": "string", "int": "int64", "float": "float64", "bool": "bool"}


def _columns(prefix: str, kind: str) -> Any:
    """A field that holds the columns whose names begin with `prefix`, each of the arrow type `kind`."""
    return field(default_factory=dict, metadata={"prefix": prefix, "type": kind})


@dataclass(frozen=True)
class ClipRow:
    """A clip, in clips.parquet.

    Args:
        clip_id: its name in all tables.
        prompt_id: number of its prompt.
        prompt: the prompt.
        candidate: its number among the clips of the prompt.
        seed: of its noise; None for an imported clip of which it is not known.
        video: file of its frames, relative to the table's folder.
        latents: file of its latents, likewise; None where there is none.
        strategy: how it was made, as generate.strategy; empty for an imported clip.
        parent: clip_id of the clip that it was made from, or whose early steps it shares; None for noise alone.
    """

    clip_id: str
    prompt_id: int
    prompt: str
    candidate: int
    seed: int | None
    video: str
    latents: str | None
    strategy: str = field(default="", kw_only=True)
    parent: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class LabelRow:
    """A teacher's scores of a clip from 1 to 5, in labels.parquet; NaN is "not scored".

    Args:
        clip_id: the clip.
        teacher: who scored it.
        status: "ok", or why there are no scores.
        reason: the same in words.
        grid: patches along time, height and width.
        video: score of each video dimension.
        patches: scores of all patches for each patch dimension, frame by frame, row by row.
    """

    clip_id: str
    teacher: str
    status: str
    reason: str
    grid: list[int] = field(metadata={"type": "list<int32>"})
    video: dict[str, float] = _columns("video_", "float32")
    patches: dict[str, list[float]] = _columns("patch_", "list<float32>")


@dataclass(frozen=True)
class ScoreRow:
    """The reward model's scores of a clip, in scores.parquet; see `LabelRow` for `video` and `patches`.

    Args:
        clip_id: the clip.
        video: score of each video dimension.
        patches: scores of all patches for each patch dimension.
        motion: mean absolute change of a pixel from frame to frame, 0 to 255; NaN if unknown.
        content: hash of the pixels; empty if unknown.
    """

    clip_id: str
    video: dict[str, float] = _columns("video_", "float64")
    patches: dict[str, list[float]] = _columns("patch_", "list<float64>")
    motion: float = math.nan
    content: str = ""


@dataclass(frozen=True)
class PairRow:
    """Two clips of one prompt with their rewards, in pairs.parquet.

    Args:
        pair_id: name of the pair.
        prompt_id: number of the prompt.
        prompt: the prompt.
        clip_a: one clip.
        clip_b: the other.
        video_reward_a: reward of the first clip.
        video_reward_b: reward of the second.
        patch_rewards_a: rewards of the first clip's patches, frame by frame, row by row.
        patch_rewards_b: of the second's.
        grid: patches along time, height and width.
        video_margin: video_reward_a - video_reward_b.
        patch_tie_share: share of the patches whose rewards tie.
        weight: how often training takes it in an epoch; 0.5 is every second pair of that weight.
    """

    pair_id: str
    prompt_id: int
    prompt: str
    clip_a: str
    clip_b: str
    video_reward_a: float
    video_reward_b: float
    patch_rewards_a: list[float] = field(metadata={"type": "list<float64>"})
    patch_rewards_b: list[float] = field(metadata={"type": "list<float64>"})
    grid: list[int] = field(metadata={"type": "list<int64>"})
    video_margin: float
    patch_tie_share: float
    weight: float = 1.0


@dataclass(frozen=True)
class EvaluatedRow:
    """A clip of one arm and everything that was measured of it, in the clips.parquet of evaluate.

    Args:
        clip_id: the clip.
        arm: "base" or "aligned".
        prompt_id: number of its prompt.
        prompt: the prompt.
        seed: of its noise; both arms have a clip of every prompt and seed.
        video: file of its frames, relative to the table's folder.
        severity: how defective each patch is, 0 to 1, frame by frame, row by row.
        kinds: its split by kind of defect, where the meter knows kinds.
        readings: whatever else the meter reads, a number of the clip each.
        video_scores: the reward model's score of each video dimension.
        patch_scores: its scores of all patches for each patch dimension.
        change: mean absolute difference of successive frames, 0 to 1; 0 of a single frame.
        look: mean colours of the boxes of a coarse grid, for how much clips differ.
    """

    clip_id: str
    arm: str
    prompt_id: int
    prompt: str
    seed: int
    video: str
    severity: list[float] = field(default_factory=list, metadata={"type": "list<float64>"})
    kinds: dict[str, list[float]] = _columns("severity_", "list<float64>")
    readings: dict[str, float] = _columns("", "float64")
    video_scores: dict[str, float] = _columns("video_", "float64")
    patch_scores: dict[str, list[float]] = _columns("patch_", "list<float64>")
    change: float = math.nan
    look: list[float] = field(default_factory=list, metadata={"type": "list<float32>"})


@dataclass(frozen=True)
class CacheRow:
    """A cached file, in index.parquet.

    Args:
        kind: "latents", "text" or "image".
        id: the clip, the prompt itself, or the pair that goes on from the image.
        file: relative to the table's folder.
        content_hash: of what it was made from.
    """

    kind: str
    id: str
    file: str
    content_hash: str


def write_rows(path: Path, rows: Sequence[Any], kind: type[Any] | None = None) -> None:
    """Write rows of one dataclass to a parquet file, atomically.

    Args:
        path: the file.
        rows: of one class; all of them have the same keys in their dict fields.
        kind: the class, needed where there may be no rows.
    """
    import pyarrow

    kind = kind or type(rows[0])
    columns: dict[str, Any] = {}
    types = []
    for one in fields(kind):
        arrow = _arrow_type(one)
        prefix = one.metadata.get("prefix")
        for key in [None] if prefix is None else list(rows[0].__dict__[one.name]) if rows else []:
            name = one.name if key is None else f"{prefix}{key}"
            values = [getattr(row, one.name) for row in rows]
            columns[name] = values if key is None else [value[key] for value in values]
            types.append((name, arrow))
    write_parquet(path, pyarrow.table(columns, schema=pyarrow.schema(types)))


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a parquet file; columns that the class does not have are left out.

    A field with a default may have no column, as in tables that were written before there was one.

    Raises:
        UserError: the file is missing, damaged, or lacks a column whose field has no default.
    """
    table = read_table(path)
    columns = fields(kind)  # type: ignore[arg-type]
    own = [one for one in columns if "prefix" not in one.metadata]
    prefixed = [one for one in columns if "prefix" in one.metadata]
    required = [one.name for one in own if one.default is MISSING and one.default_factory is MISSING]
    missing = [name for name in required if name not in table.column_names]
    if missing:
        raise UserError(
            f"{path}: expected a column {missing[0]!r}, got {', '.join(table.column_names)}; make the table again"
        )
    left = {name: table.column(name).to_pylist() for name in table.column_names}
    values: dict[str, Any] = {one.name: left.pop(one.name) for one in own if one.name in left}
    # the longest prefix comes first and takes its columns away from shorter ones
    for one in sorted(prefixed, key=lambda one: -len(one.metadata["prefix"])):
        prefix = one.metadata["prefix"]
        parts = {name.removeprefix(prefix): left.pop(name) for name in list(left) if name.startswith(prefix)}
        rows = zip(*parts.values(), strict=True) if parts else ((),) * len(table)
        values[one.name] = [dict(zip(parts, row, strict=True)) for row in rows]
    names = list(values)
    return [kind(**dict(zip(names, row, strict=True))) for row in zip(*values.values(), strict=True)]


def shared_rows(
    folder: Path,
    name: str,
    batches: Sequence[Sequence[Item]],
    rows_of: Callable[[Sequence[Item]], Sequence[Row]],
    kind: type[Row],
) -> list[Row]:
    """The rows of all batches in order, made by all processes together; on others than the first none.

    The rows of each batch are kept in a file until the stage is finished. So a killed stage makes the missing ones, and
    processes exchange them.

    Args:
        folder: of an unfinished stage, whose settings and inputs stay the same.
        name: of the work, for the files and the progress.
        batches: of the same items in the same order, on all processes and whenever the stage goes on.
        rows_of: gives the rows of a batch.
        kind: the rows' class.
    """
    sizes = [len(batch) for batch in batches]
    # named by the items, for batches may have another size when the stage goes on
    files = [
        folder / f".{name}.{end - size:06d}-{end:06d}{PART}" for end, size in zip(accumulate(sizes), sizes, strict=True)
    ]
    for number in processes.share(range(len(batches)), f"{folder.name}: {name}"):
        if not files[number].exists():
            write_rows(files[number], rows_of(batches[number]), kind)
    if not processes.is_first():
        return []
    return [row for file in files for row in read_rows(processes.seen(file), kind)]


def _arrow_type(one: Field[Any]) -> pyarrow.DataType:
    import pyarrow

    # an annotation is a class, or a text where annotations are postponed: "str", "str | None", "int", ...
    kind = one.type.__name__ if isinstance(one.type, type) else str(one.type)
    name = one.metadata.get("type") or _TYPES[kind.removesuffix(" | None")]
    if name.startswith("list<"):
        return pyarrow.list_(pyarrow.type_for_alias(name[5:-1]))
    return pyarrow.type_for_alias(name)
