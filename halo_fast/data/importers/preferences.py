"""Preferences between two clips, in the layouts they are published in."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halo_fast.data.importers.base import Preference
from halo_fast.data.records import Row, exists, is_empty, read_records, required_text
from halo_fast.errors import UserError

__all__ = ["FOLDERS", "TABLES", "check_preference"]


def check_preference(path: Path, preference: Preference) -> Preference:
    """The preference, if its clips exist.

    Raises:
        UserError: a missing file, with the row.
    """
    place = f"{path}: row {preference.row}"
    for clip in (preference.first, preference.second):
        if isinstance(clip, Path) and not exists(clip):
            raise UserError(f"{place}: {clip} does not exist; put the clip there or leave the row out")
    if preference.mask is not None and not exists(preference.mask):
        raise UserError(f"{place}: the mask {preference.mask} does not exist; put it there or leave it out of the row")
    return preference


def _video_align(path: Path, number: int, row: Row) -> Preference:
    """CSV path_A, path_B, prompt, VQ, MQ, TA in {A, B, same} (VideoAlign, VideoGen-RewardBench)."""
    place = f"{path}: row {number}"
    names = {"VQ": "visual_quality", "MQ": "motion_quality", "TA": "text_alignment", "Overall": "overall"}
    preferred = {names[name]: _choice(row[name], name, place) for name in names if not is_empty(row.get(name))}
    first, second = (path.parent / required_text(row, f"path_{side}", place) for side in "AB")
    return Preference(number, required_text(row, "prompt", place), first, second, preferred)


def _choice(value: Any, column: str, place: str) -> float:
    known = {"A": 1.0, "B": 0.0, "same": 0.5}
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{place}: expected A, B or same in {column!r}, got {value!r}")
    return known[value]


def _local_dpo(path: Path, number: int, row: Row) -> Preference:
    """JSONL pos_video_path, neg_video_path, gen_caption and optionally mask (Local-DPO)."""
    place = f"{path}: row {number}"
    first, second = (path.parent / required_text(row, f"{side}_video_path", place) for side in ("pos", "neg"))
    mask = None if is_empty(row.get("mask")) else path.parent / required_text(row, "mask", place)
    return Preference(number, required_text(row, "gen_caption", place), first, second, {"overall": 1.0}, mask)


def _chosen_rejected(prompt: str) -> Callable[[Path, int, Row], Preference]:
    """Columns chosen, rejected and a prompt (TRL), or a caption (UnifiedReward's dpo_data.json).

    Perhaps also tie, weight, and scores of patches in chosen_patches and rejected_patches with their grid.
    """

    def read(path: Path, number: int, row: Row) -> Preference:
        place = f"{path}: row {number}"
        first, second = (path.parent / required_text(row, side, place) for side in ("chosen", "rejected"))
        preferred = 0.5 if str(row.get("tie")).casefold() in ("true", "1") else 1.0
        return Preference(
            number, required_text(row, prompt, place), first, second, {"overall": preferred},
            weight=_weight(row.get("weight"), place), patches=_patches(row, place),
        )  # fmt: skip

    return read


def _weight(value: Any, place: str) -> float:
    if is_empty(value):
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(f"{place}: expected a number of at least 0 in 'weight', got {value!r}")
    return weight


def _patches(row: Row, place: str) -> tuple[list[float], list[float], tuple[int, ...]] | None:
    """Scores of the patches of both clips and their grid, as `halo export` writes them; None if there are none."""
    names = ("chosen_patches", "rejected_patches", "grid")
    columns = [row.get(name) for name in names]
    if all(column is None for column in columns):
        return None
    try:
        first, second, grid = ([float(one) for one in column or ()] for column in columns)
        if len(grid) != 3 or not len(first) == len(second) == math.prod(grid):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(
            f"{place}: expected lists of numbers in {', '.join(names)}, as many scores as the grid has patches"
        ) from None
    return first, second, (int(grid[0]), int(grid[1]), int(grid[2]))


def _pickapic(path: Path, number: int, row: Row) -> Preference:
    """Encoded pictures jpg_0, jpg_1, label_0 in {0, 0.5, 1} and caption (Pick-a-Pic)."""
    place = f"{path}: row {number}"
    first, second = row["jpg_0"], row["jpg_1"]
    for clip in (first, second):
        if not isinstance(clip, bytes):
            raise UserError(f"{place}: expected encoded pictures in 'jpg_0' and 'jpg_1', got {type(clip).__name__}")
    if row["label_0"] not in (0, 0.5, 1):
        raise UserError(f"{place}: expected 0, 0.5 or 1 in 'label_0', got {row['label_0']!r}")
    preferred = {"overall": float(row["label_0"])}
    return Preference(number, required_text(row, "caption", place), first, second, preferred)


def _video_dpo(folder: Path) -> list[Preference]:
    """Folder with metadata.json of clips and pair.json of their indices, video1 the winner (VideoDPO)."""
    path = folder / "pair.json"
    clips = read_records(folder / "metadata.json")
    preferences = []
    for number, pair in enumerate(read_records(path), 1):
        place, files = f"{path}: row {number}", []
        for name in ("video1", "video2"):
            index = pair.get(name)
            if not isinstance(index, int) or not 0 <= index < len(clips):
                raise UserError(f"{place}: expected 0 to {len(clips) - 1} in {name!r}, got {index!r}")
            try:
                files.append(folder / clips[index]["basic"]["clip_path"])
            except (KeyError, TypeError):
                raise UserError(f"{folder / 'metadata.json'}: row {index + 1}: expected basic.clip_path") from None
        prompt = required_text(pair, "frame_caption", place)
        found = Preference(number, prompt, first=files[0], second=files[1], preferred={"overall": 1.0})
        preferences.append(check_preference(path, found))
    return preferences


# files of a folder, or columns of a table -> the reader of such a folder, or of one row
FOLDERS: dict[tuple[str, ...], Callable[[Path], list[Preference]]] = {("pair.json", "metadata.json"): _video_dpo}
TABLES: dict[tuple[str, ...], Callable[[Path, int, Row], Preference]] = {
    ("path_A", "path_B", "prompt"): _video_align,
    ("pos_video_path", "neg_video_path", "gen_caption"): _local_dpo,
    ("jpg_0", "jpg_1", "label_0", "caption"): _pickapic,
    ("prompt", "chosen", "rejected"): _chosen_rejected("prompt"),
    ("caption", "chosen", "rejected"): _chosen_rejected("caption"),
}
