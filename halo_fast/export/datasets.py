"""The clips and pairs of a run as data sets of other programs.

Every layout is a folder that needs nothing outside of it: the videos are linked or copied. Prompts of one clip are one
line. docs/data.md shows each layout.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halo_fast.data.tables import ClipRow, LabelRow, PairRow, write_rows
from halo_fast.errors import UserError
from halo_fast.files import progress, replacing, write_bytes, write_csv, write_json
from halo_fast.patches import PIXELS, LatentFactors, PatchGrid

__all__ = ["DATASET_FORMATS", "DatasetClip", "DatasetPair", "RunData", "write_dataset"]


@dataclass(frozen=True)
class DatasetClip:
    """A clip in the schema of docs/data.md; NaN is "not scored".

    Args:
        file_name: relative to the table's folder.
        clip_id: its name in all tables.
        prompt: the prompt.
        prompt_id: number of the prompt.
        num_frames: of the clip.
        height: pixels.
        width: pixels.
        fps: frames a second.
        generator: the model that made it; empty if unknown.
        seed: of its noise, if known.
        settings: of the generator, as JSON; empty if unknown.
        changes: what an import did to it.
        strategy: how it was made, as generate.strategy; empty for an imported clip.
        parent: clip_id of the clip that it was made from; null for noise alone.
        grid: patches along time, height and width; empty without labels.
        frame_edges: frames at which patches begin and end along time, grid[0] + 1 numbers; empty without labels.
        row_edges: rows of pixels, likewise.
        column_edges: columns of pixels, likewise.
        labeller: who scored it; empty for nobody.
        video: score of each video dimension, from 1 to 5.
        patches: scores of all patches for each patch dimension, frame by frame, row by row.
    """

    file_name: str
    clip_id: str
    prompt: str
    prompt_id: int
    num_frames: int
    height: int
    width: int
    fps: float
    generator: str
    seed: int | None
    settings: str
    changes: str
    strategy: str
    parent: str | None
    labeller: str
    grid: list[int] = field(metadata={"type": "list<int32>"})
    frame_edges: list[int] = field(metadata={"type": "list<int32>"})
    row_edges: list[int] = field(metadata={"type": "list<int32>"})
    column_edges: list[int] = field(metadata={"type": "list<int32>"})
    video: Mapping[str, float] = field(default_factory=dict, metadata={"prefix": "video_", "type": "float64"})
    patches: Mapping[str, list[float]] = field(
        default_factory=dict, metadata={"prefix": "patch_", "type": "list<float64>"}
    )


@dataclass(frozen=True)
class DatasetPair:
    """A pair in the schema of docs/data.md.

    Args:
        pair_id: name of the pair.
        prompt: of both clips.
        chosen: file of the better clip, or of the first of a tie.
        rejected: file of the other.
        tie: whether the videos tie.
        margin: reward of the chosen video less that of the other.
        chosen_id: clip_id of the one.
        rejected_id: clip_id of the other.
        chosen_reward: of the video.
        rejected_reward: likewise.
        grid: patches along time, height and width.
        chosen_patches: rewards of the patches, frame by frame, row by row; NaN is unlabelled.
        rejected_patches: likewise.
        weight: how often training takes it in an epoch.
    """

    pair_id: str
    prompt: str
    chosen: str
    rejected: str
    tie: bool
    margin: float
    chosen_id: str
    rejected_id: str
    chosen_reward: float
    rejected_reward: float
    grid: list[int] = field(metadata={"type": "list<int32>"})
    chosen_patches: list[float] = field(metadata={"type": "list<float64>"})
    rejected_patches: list[float] = field(metadata={"type": "list<float64>"})
    weight: float


@dataclass(frozen=True)
class RunData:
    """What a data set is made of.

    Args:
        clips: the clips.
        folder: to which the clips' files are relative.
        pairs: of the clips; there may be none.
        labels: of the clips; there may be none.
        format: num_frames, height, width and fps of every clip that has none of its own.
        generators: model of each clip_id, where known.
        changes: what an import did to each clip_id.
        settings: of the generator by clip_id, as JSON.
        tie: margins of the video reward up to this are ties.
        factors: how the model's latents lie on the clips: patches divide the latents.
        formats: of clips that have one of their own, by clip_id.
    """

    clips: Sequence[ClipRow]
    folder: Path
    pairs: Sequence[PairRow]
    labels: Sequence[LabelRow]
    format: tuple[int, int, int, float]
    generators: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    tie: float = 0.0
    factors: LatentFactors = PIXELS
    formats: Mapping[str, tuple[int, int, int, float]] = field(default_factory=dict)

    def format_of(self, clip_id: str) -> tuple[int, int, int, float]:
        """num_frames, height, width and fps of a clip."""
        return self.formats.get(clip_id, self.format)


def write_dataset(data: RunData, format: str, folder: Path) -> Path:
    """Write a data set.

    Args:
        data: clips, pairs and labels.
        format: "huggingface" (clips and pairs with all labels), "trl" (prompt, chosen, rejected), "diffsynth"
            (metadata.csv of the better clips) or "videodpo" (metadata.json and pair.json).
        folder: of the data set; files that are there are replaced.

    Returns:
        the folder.

    Raises:
        UserError: an unknown format, a clip that is gone, or no pairs where the format is one of pairs.
    """
    if format not in DATASET_FORMATS:
        raise UserError(f"format: expected one of {', '.join(DATASET_FORMATS)}, got {format!r}")
    names = {clip.clip_id: _file(clip) for clip in data.clips}
    pairs = [_pair(row, names, data.tie) for row in data.pairs]
    if format != "huggingface" and not pairs:
        raise UserError(f"format: {format} holds pairs, of which this run has none; run `halo pairs` first")
    DATASET_FORMATS[format](data, pairs, folder)
    return folder


def _pair(row: PairRow, files: Mapping[str, str], tie: float) -> DatasetPair:
    """A pair with the better clip first; margins up to `tie` are ties."""
    sides = [
        (row.clip_a, row.video_reward_a, row.patch_rewards_a),
        (row.clip_b, row.video_reward_b, row.patch_rewards_b),
    ]
    if row.video_margin < 0:
        sides.reverse()
    (a, first, patches_a), (b, second, patches_b) = sides
    tied = not abs(row.video_margin) > tie
    return DatasetPair(
        row.pair_id, row.prompt, files[a], files[b], tied, first - second, a, b, first, second, row.grid, patches_a,
        patches_b, row.weight,
    )  # fmt: skip


def _file(clip: ClipRow) -> str:
    return f"videos/{clip.clip_id}{Path(clip.video).suffix}"


def _copy_clips(data: RunData, folder: Path, wanted: set[str]) -> None:
    """Link or copy the clips into a folder."""
    clips = [clip for clip in data.clips if clip.clip_id in wanted]
    for clip in progress(clips, len(clips), "export"):
        source = data.folder / clip.video
        if not source.exists():
            raise UserError(f"{source}: the clip is gone; make it again by the stage that made it")
        with replacing(folder / _file(clip)) as temporary:
            try:
                os.link(source, temporary)
            except OSError:
                # not every file system has hard links
                shutil.copyfile(source, temporary)


def _paired(pairs: Sequence[DatasetPair]) -> set[str]:
    return {clip for pair in pairs for clip in (pair.chosen_id, pair.rejected_id)}


def _huggingface(data: RunData, pairs: Sequence[DatasetPair], folder: Path) -> None:
    """metadata.parquet of all clips beside videos/, which `load_dataset("videofolder")` reads, and pairs.parquet."""
    _copy_clips(data, folder, {clip.clip_id for clip in data.clips})
    labels = {row.clip_id: row for row in data.labels}
    video = list(dict.fromkeys(name for row in data.labels for name in row.video))
    patches = list(dict.fromkeys(name for row in data.labels for name in row.patches))
    rows = [_clip(clip, labels.get(clip.clip_id), video, patches, data) for clip in data.clips]
    write_rows(folder / "metadata.parquet", rows, DatasetClip)
    if pairs:
        write_rows(folder / "pairs.parquet", list(pairs), DatasetPair)
    write_bytes(folder / "README.md", _CARD.encode())


def _clip(
    clip: ClipRow, label: LabelRow | None, video: Sequence[str], patches: Sequence[str], data: RunData
) -> DatasetClip:
    """A clip with its labels."""
    name = clip.clip_id
    missing = [math.nan] * math.prod(label.grid) if label else []
    return DatasetClip(
        _file(clip), name, clip.prompt, clip.prompt_id, *data.format_of(name), data.generators.get(name, ""), clip.seed,
        data.settings.get(name, ""), data.changes.get(name, ""), clip.strategy, clip.parent,
        label.teacher if label else "",
        list(label.grid) if label else [], *_edges(label, data),
        {one: label.video.get(one, math.nan) if label else math.nan for one in video},
        {one: list(label.patches.get(one, missing)) if label else [] for one in patches},
    )  # fmt: skip


def _edges(label: LabelRow | None, data: RunData) -> tuple[list[int], list[int], list[int]]:
    """Frames, rows and columns at which the patches of a label begin and end."""
    if label is None:
        return [], [], []
    size, grid = data.format_of(label.clip_id)[:3], (label.grid[0], label.grid[1], label.grid[2])
    patches = PatchGrid(grid, *size, **data.factors._asdict())
    return patches.pixel_edges(0), patches.pixel_edges(1), patches.pixel_edges(2)


_CARD = """---
configs:
- config_name: clips
  data_files: metadata.parquet
  default: true
- config_name: pairs
  data_files: pairs.parquet
---

Clips with prompts, scores from 1 to 5 of the video and of its patches, and preference pairs, written by halo_fast.
NaN is "not scored". Patches are listed frame by frame, row by row, on the grid of the column `grid`.
"""


def _trl(data: RunData, pairs: Sequence[DatasetPair], folder: Path) -> None:
    """pairs.jsonl of prompt, chosen and rejected, ties left out and counted in README.md."""
    decided = [pair for pair in pairs if not pair.tie]
    _copy_clips(data, folder, _paired(decided))
    rows: list[dict[str, Any]] = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "margin": pair.margin}
        for pair in decided
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_bytes(folder / "pairs.jsonl", ("\n".join(lines) + "\n").encode())
    write_bytes(folder / "README.md", f"{len(decided)} pairs; {len(pairs) - len(decided)} ties left out.\n".encode())


def _diffsynth(data: RunData, pairs: Sequence[DatasetPair], folder: Path) -> None:
    """metadata.csv of video and prompt: the better clip of each decided pair, once."""
    chosen = {pair.chosen_id: pair for pair in pairs if not pair.tie}
    _copy_clips(data, folder, set(chosen))
    if not chosen:
        raise UserError("format: diffsynth holds the better clips, and all pairs of this run tie")
    write_csv(folder / "metadata.csv", [{"video": pair.chosen, "prompt": pair.prompt} for pair in chosen.values()])


def _videodpo(data: RunData, pairs: Sequence[DatasetPair], folder: Path) -> None:
    """metadata.json of clips and pair.json of their indices, video1 the winner; ties left out, as VideoDPO has none."""
    decided = [pair for pair in pairs if not pair.tie]
    _copy_clips(data, folder, _paired(decided))
    clips = [clip for clip in data.clips if clip.clip_id in _paired(decided)]
    number = {clip.clip_id: index for index, clip in enumerate(clips)}
    formats = {clip.clip_id: data.format_of(clip.clip_id) for clip in clips}
    write_json(
        folder / "metadata.json",
        [
            {
                "basic": {
                    "clip_path": _file(clip), "clip_duration": frames / fps, "clip_fps": fps,
                    "clip_resolution": [width, height], "clip_id": clip.clip_id,
                },
                "misc": {"frame_caption": [clip.prompt]},
            }
            for clip in clips
            for frames, height, width, fps in [formats[clip.clip_id]]
        ],
    )  # fmt: skip
    write_json(
        folder / "pair.json",
        [
            {
                "video1": number[pair.chosen_id], "video2": number[pair.rejected_id], "frame_caption": [pair.prompt],
                "score1": pair.chosen_reward, "score2": pair.rejected_reward,
            }
            for pair in decided
        ],
    )  # fmt: skip


DATASET_FORMATS = {"huggingface": _huggingface, "trl": _trl, "diffsynth": _diffsynth, "videodpo": _videodpo}
"""Writers of the layouts, by name."""
