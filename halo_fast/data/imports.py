"""Clips, pairs and labels of one's own, brought into the tables that the stages of a run read."""

import io
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from halo_fast.data.clips import Frame, plays_everywhere, read_picture, stream_clip, stream_frames, write_clip
from halo_fast.data.fitting import Closest, Fit, FitPolicy, VideoFormat, fit_clip, pool_damage
from halo_fast.data.importers import Preference
from halo_fast.data.records import SUFFIXES
from halo_fast.data.sources import (
    CaptionedClip,
    ClipDamage,
    LeftOutRow,
    Source,
    damage_of_file,
    preference_refs,
    read_source,
)
from halo_fast.data.tables import ClipRow, LabelRow, PairRow
from halo_fast.errors import UserError
from halo_fast.files import hash_bytes, hash_file, hash_text, progress, read_json, replacing, write_json
from halo_fast.patches import PatchGrid

__all__ = [
    "ImportConfig",
    "Imported",
    "ImportedRow",
    "clip_format",
    "forget_facts",
    "import_sources",
    "keeps_formats",
    "source_key",
]

_FACTS = ".facts"  # what is known of finished clips, until all are finished


@dataclass
class ImportConfig(FitPolicy):
    """Clips, pairs and labels of one's own. The format of the clips is that of generate, unless they keep their own.

    Args:
        sources: folders and tables of clips, scores, preferences, masks; docs/data.md lists the layouts.
        scores: columns of your tables that hold scores from 1 to 5; null for all numbers that do not describe the clip.
        generate: also generate candidates, of the prompts of the imported clips if `prompts` is not set.
        size: "crop" scales a clip until it covers the size and cuts what is over; "resize" scales height and width by
            themselves; "keep" leaves each clip its own size, cut to the next that the model makes; "refuse" leaves
            clips of another size out.
        frames: "trim" takes the first frames; "spread" evenly spread ones of the whole clip; "refuse" leaves longer
            clips out. Shorter ones are always left out. "keep" takes all frames, cut to the next number that the model
            makes.
        fps: "sample" takes what is shown at the times of the run's rate; "keep" takes frame after frame; "refuse"
            leaves clips of another rate out.
    """

    sources: list[str] = field(default_factory=list)
    scores: list[str] | None = None
    generate: bool = False


@dataclass(frozen=True)
class ImportedRow(ClipRow):
    """An imported clip, in import/clips.parquet.

    Args:
        source: the file or the row that it comes from.
        generator: the model that made it; empty if unknown.
        source_frames: frames of the source.
        source_height: pixels.
        source_width: pixels.
        source_fps: frames a second.
        frames: number of the source's frame behind each frame, 0 the first.
        box: top, left, height and width of what is shown, in pixels of the source.
        changes: what was done to the clip, in words; empty for nothing.
    """

    source: str
    generator: str
    source_frames: int
    source_height: int
    source_width: int
    source_fps: float
    frames: list[int] = field(metadata={"type": "list<int64>"})
    box: list[float] = field(metadata={"type": "list<float64>"})
    changes: str


@dataclass(frozen=True)
class Imported:
    """The rows of an import's tables; labels and pairs may be none."""

    clips: list[ImportedRow]
    labels: list[LabelRow]
    pairs: list[PairRow]
    left_out: list[LeftOutRow]


def source_key(path: Path) -> str:
    """What tells whether a source has changed: names and sizes of all its files, and the content of its tables.

    Raises:
        UserError: it does not exist.
    """
    if not path.exists():
        raise UserError(f"imports.sources: {path} does not exist; expected a folder, a table or a video")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    lines = [
        f"{file.relative_to(path)} {file.stat().st_size} "
        + (hash_file(file) if file.suffix.lower() in (*SUFFIXES, ".txt") else "")
        for file in files
    ]
    return hash_text("\n".join(lines))


def keeps_formats(settings: ImportConfig) -> bool:
    """Whether imported clips may differ in size or length."""
    return "keep" in (settings.size, settings.frames)


def clip_format(row: ImportedRow, settings: FitPolicy, wanted: VideoFormat) -> VideoFormat:
    """The format of an imported clip's file.

    Args:
        row: the clip.
        settings: of its import.
        wanted: the format of clips that do not keep their own.
    """
    own = [round(side) for side in row.box[2:]] if settings.size == "keep" else wanted[1:3]
    return VideoFormat(len(row.frames), own[0], own[1], wanted.fps)


def import_sources(
    settings: ImportConfig,
    wanted: VideoFormat,
    patches: PatchGrid,
    folder: Path,
    crf: int | None = None,
    closest: Closest = lambda *given: given,
) -> Imported:
    """Read sources, bring every clip to its format and write it, and make the rows of clips, labels and pairs.

    Clips are read one at a time. A clip that is there already is not made again.

    Args:
        settings: sources and policy.
        wanted: the format of all clips, but for what they keep.
        patches: of a clip of this format, for labels of patches; clips of others have as many.
        folder: where videos/CLIP.mp4 are written.
        crf: of the files, as for `write_clip`.
        closest: what clips are cut to that keep their size or length.

    Raises:
        UserError: a source that cannot be read, or no clip at all.
    """
    read = {name: read_source(Path(name), settings.scores) for name in settings.sources}
    listings = [(name, one.listed) for name, one in read.items() if one.listed]
    source = Source()
    for name, one in read.items():
        places = [row.place for rows in (one.scores, one.damage) for row in rows if isinstance(row.ref, int)]
        if places and len(listings) > 1:
            raise UserError(
                f"{places[0]}: a number in 'row' may mean a clip of {' or '.join(name for name, _ in listings)}; "
                "name the clips in a column 'video', or put the table into their folder"
            )
        one.name_clips(listings[0][1] if listings else [])
        source.extend(one)
    if not source.clips:
        reasons = f"; {source.left_out[0].what}: {source.left_out[0].reason}" if source.left_out else ""
        raise UserError(f"imports.sources: no clips in {', '.join(settings.sources)}{reasons}")
    refs = {clip.ref for clip in source.clips}
    left_out = [row for row in source.left_out if str(Path(row.what).resolve()) not in refs]

    def fitting(*size: int) -> tuple[int, int, int]:
        cut = closest(*size)
        _patches_of(patches, cut)  # a clip too small for the grid is left out
        return cut

    rows, found = _write_clips(source.clips, settings, wanted, folder, crf, left_out, fitting)
    if not rows:
        raise UserError(
            f"imports.sources: all {len(source.clips)} clips are left out; the first is {left_out[0].what}: "
            f"{left_out[0].reason}"
        )
    by_ref = _ByRef(source.listed, found, left_out)
    formats = {name: clip_format(row, settings, wanted) for name, row in rows.items()}
    divided = {name: _patches_of(patches, form[:3]) for name, form in formats.items()}
    labels = _labels(rows, source, by_ref, divided, left_out)
    pairs = _pairs(rows, source, by_ref, divided, left_out)
    return Imported(list(rows.values()), labels, pairs, left_out)


def _patches_of(patches: PatchGrid, size: Sequence[int]) -> PatchGrid:
    """The patches of a clip of another size; UserError if the grid does not fit it."""
    frames, height, width = size
    if (frames, height, width) == (patches.num_frames, patches.height, patches.width):
        return patches
    try:
        return replace(patches, num_frames=frames, height=height, width=width)
    except ValueError as error:
        raise UserError(f"a clip of {frames} x {height} x {width}: {error}") from error


def _write_clips(
    clips: Sequence[CaptionedClip],
    settings: ImportConfig,
    wanted: VideoFormat,
    folder: Path,
    crf: int | None,
    left_out: list[LeftOutRow],
    closest: Closest,
) -> tuple[dict[str, ImportedRow], dict[tuple[str, str], str]]:
    """Write the clips; rows by clip_id, and the clip_id of each ref and prompt. Equal clips of a prompt are one."""
    rows: dict[str, ImportedRow] = {}
    found: dict[tuple[str, str], str] = {}
    first: dict[tuple[str, str], CaptionedClip] = {}
    prompts: dict[str, list[ImportedRow]] = {}
    for number, clip in enumerate(progress(clips, len(clips), "import")):
        if (clip.ref, clip.prompt) in found:
            continue
        clip_id = f"c{number:05d}"
        try:
            key = _content(clip), clip.prompt
            earlier = first.setdefault(key, clip)
            if earlier is not clip:
                if (earlier.ref, earlier.prompt) in found:
                    found[clip.ref, clip.prompt] = found[earlier.ref, earlier.prompt]
                raise UserError(f"the same clip and prompt as {earlier.place}")
            fit = _fitted(clip, clip_id, hash_text(f"{key[0]} {key[1]} {crf}"), settings, wanted, folder, crf, closest)
        except UserError as error:
            left_out.append(LeftOutRow(_name(clip), str(error)))
            continue
        rows[clip_id] = _row(clip, clip_id, prompts, fit)
        found[clip.ref, clip.prompt] = clip_id
    return rows, found


def _row(clip: CaptionedClip, clip_id: str, prompts: dict[str, list[ImportedRow]], fit: Fit) -> ImportedRow:
    """The row of a clip, which is added to those of its prompt."""
    alike = prompts.setdefault(clip.prompt, [])
    prompt_id = alike[0].prompt_id if alike else len(prompts) - 1
    row = ImportedRow(
        clip_id, prompt_id, clip.prompt, len(alike), clip.seed,
        f"videos/{clip_id}.mp4", None, _name(clip), clip.generator, *fit.source, fit.frames, list(fit.box), fit.changes,
    )  # fmt: skip
    alike.append(row)
    return row


def _name(clip: CaptionedClip) -> str:
    return str(clip.clip) if isinstance(clip.clip, Path) else clip.place


def _content(clip: CaptionedClip) -> str:
    """What tells whether two clips are the same."""
    if isinstance(clip.clip, Tensor):
        return hash_bytes(clip.clip.contiguous().numpy().tobytes())
    if isinstance(clip.clip, bytes):
        return hash_bytes(clip.clip)
    if clip.clip.is_dir():
        return f"folder {clip.ref}"
    try:
        return hash_file(clip.clip)
    except OSError as error:
        raise UserError(f"{error.strerror}") from error


def _fitted(
    clip: CaptionedClip,
    clip_id: str,
    key: str,
    settings: ImportConfig,
    wanted: VideoFormat,
    folder: Path,
    crf: int | None,
    closest: Closest,
) -> Fit:
    """Write a clip in the wanted format unless it is there; where its frames come from."""
    facts, video = folder / _FACTS / f"{clip_id}.json", folder / "videos" / f"{clip_id}.mp4"
    known = read_json(facts)
    if known and known["key"] == key and video.exists():
        return Fit(known["frames"], tuple(known["box"]), VideoFormat(*known["source"]), known["changes"])
    fitted = fit_clip(_stream(clip, wanted.fps), wanted, settings, closest)
    fit = fitted.fit
    own = _fitting_file(clip, fit)
    if own:
        with replacing(video) as temporary:
            shutil.copyfile(own, temporary)
    else:
        write_clip(video, fitted.video, round(wanted.fps), crf)
    write_json(facts, {"key": key, "frames": fit.frames, "box": fit.box, "source": fit.source, "changes": fit.changes})
    return fit


def _fitting_file(clip: CaptionedClip, fit: Fit) -> Path | None:
    """The clip's own file if it can stay as it is: another encoding would lose quality for nothing."""
    file, unchanged = clip.clip, not fit.changes and fit.frames == list(range(fit.source.num_frames))
    return file if unchanged and isinstance(file, Path) and file.is_file() and plays_everywhere(file) else None


def _stream(clip: CaptionedClip, fps: float) -> Iterator[Frame]:
    """The frames of a clip; those without times are shown at the clip's own rate, or at `fps`."""
    if isinstance(clip.clip, Path):
        return stream_frames(clip.clip, clip.fps or fps) if clip.clip.is_dir() else stream_clip(clip.clip)
    frames = clip.clip
    if isinstance(frames, bytes):
        frames = read_picture(io.BytesIO(frames), clip.place)[None]
    rate = clip.fps or fps
    return (Frame(number, number / rate, (number + 1) / rate, frame) for number, frame in enumerate(frames))


class _ByRef:
    """Finds the clips that a label or pair speaks of; those that were left out are noted."""

    def __init__(self, listed: Sequence[str], found: dict[tuple[str, str], str], left_out: list[LeftOutRow]) -> None:
        self._known = set(listed)
        self._found = found
        self._left_out = left_out
        self._of: dict[str, list[str]] = defaultdict(list)
        for (ref, _), clip_id in found.items():
            self._of[ref].append(clip_id)

    def clips(self, ref: str | int, place: str) -> list[str]:
        """The clips of a ref, perhaps under several prompts; none if they were left out.

        Raises:
            UserError: no clip was ever listed under it.
        """
        name = str(ref)
        if name not in self._known:
            raise UserError(f"{place}: {name} is among no clips; import it too, or leave the row out")
        if name not in self._of:
            self._left_out.append(LeftOutRow(place, f"its clip {name} is left out"))
        return self._of.get(name, [])

    def clip(self, ref: str, prompt: str, place: str) -> str | None:
        """The clip of a ref and prompt, or None if it was left out."""
        found = self._found.get((ref, prompt))
        if found is None:
            self._left_out.append(LeftOutRow(place, f"its clip {ref} is left out"))
        return found


def _labels(
    rows: dict[str, ImportedRow],
    source: Source,
    by_ref: _ByRef,
    patches: dict[str, PatchGrid],
    left_out: list[LeftOutRow],
) -> list[LabelRow]:
    """The labels of all clips that have scores or damage, the mean over those who gave them; in the order of clips."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in source.scores:
        for clip_id in by_ref.clips(one.ref, one.place):
            for name, value in one.scores.items():
                scores[clip_id][name].append(value)
    quality = _patch_quality(rows, source.damage, by_ref, patches, left_out)
    names = list(dict.fromkeys(name for one in source.scores for name in one.scores))
    grid = next(iter(patches.values())).grid
    missing = [math.nan] * math.prod(grid)
    return [
        LabelRow(
            clip_id, "imported", "ok", "", list(grid),
            {name: _mean(scores[clip_id][name]) for name in names},
            {"quality": quality.get(clip_id, missing)},
        )
        for clip_id in rows
        if clip_id in scores or clip_id in quality
    ]  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _patch_quality(
    rows: dict[str, ImportedRow],
    damage: Sequence[ClipDamage],
    by_ref: _ByRef,
    patches: dict[str, PatchGrid],
    left_out: list[LeftOutRow],
) -> dict[str, list[float]]:
    """Scores of the patches of each clip, 5 - 4 times the damage; the mean where there are several."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    for one in progress(damage, len(damage), "import: patches"):
        for clip_id in by_ref.clips(one.ref, one.place):
            try:
                found[clip_id].append(_quality(one, rows[clip_id], patches[clip_id]))
            except UserError as error:
                left_out.append(LeftOutRow(one.place, str(error)))
    return {
        clip_id: [_mean(scores) for scores in zip(*group, strict=True)] for clip_id, group in found.items() if group
    }


def _quality(one: ClipDamage, row: ImportedRow, patches: PatchGrid) -> list[float]:
    """Scores of the patches of a clip, f-major."""
    source = VideoFormat(row.source_frames, row.source_height, row.source_width, row.source_fps)
    fit = Fit(row.frames, (row.box[0], row.box[1], row.box[2], row.box[3]), source, "")
    return [float(value) for value in (5 - 4 * pool_damage(one.damage(source), fit, patches)).ravel()]


def _pairs(
    rows: dict[str, ImportedRow],
    source: Source,
    by_ref: _ByRef,
    patches: dict[str, PatchGrid],
    left_out: list[LeftOutRow],
) -> list[PairRow]:
    """The pairs of all preferences; patches are unlabelled, or with a mask labelled where the clips differ."""
    pairs: dict[str, PairRow] = {}
    for place, one in source.preferences:
        prompt = " ".join(one.prompt.split())
        a, b = (by_ref.clip(ref, prompt, place) for ref in preference_refs(place, one))
        if a is None or b is None:
            continue
        reason = "both clips are the same" if a == b else "nothing is preferred" if not one.preferred else ""
        if patches[a] != patches[b]:
            sizes = " and ".join(f"{name} of {_size_text(patches[name])}" for name in (a, b))
            reason = f"its clips are {sizes}, a pair needs one size (imports.size crop, imports.frames trim)"
        if f"{a}-{b}" in pairs:
            reason = f"the clips {a} and {b} are compared twice"
        if reason:
            left_out.append(LeftOutRow(place, reason))
            continue
        cut = [name for name in (a, b) if not _is_whole(rows[name])] if one.patches else []
        if cut:
            changed = f"the clip {cut[0]} is a part of its own ({rows[cut[0]].changes})"
            left_out.append(LeftOutRow(place, f"its scores of patches, which are of whole clips: {changed}"))
            one = replace(one, patches=None)
        try:
            pairs[f"{a}-{b}"] = _pair(rows[a], rows[b], one, patches[a])
        except UserError as error:
            left_out.append(LeftOutRow(place, str(error)))
    return list(pairs.values())


def _is_whole(row: ImportedRow) -> bool:
    """Whether an imported clip shows all of its source, frame for frame."""
    box = [0, 0, row.source_height, row.source_width]
    return row.frames == list(range(row.source_frames)) and max(map(abs, np.subtract(row.box, box))) < 1e-6


def _size_text(patches: PatchGrid) -> str:
    return f"{patches.num_frames} x {patches.height} x {patches.width}"


def _pair(a: ImportedRow, b: ImportedRow, preference: Preference, patches: PatchGrid) -> PairRow:
    """A pair on the scale from 1 to 5: 5 the preferred video, 1 the other, 3 both of a tie."""
    share = preference.preferred.get("overall", float(np.mean(list(preference.preferred.values()))))
    count = math.prod(patches.grid)
    scores = [[math.nan] * count] * 2
    if preference.mask is not None:
        # the mask says where the worse clip is worse
        worse = ClipDamage("", damage_of_file(preference.mask), "")
        scores = [[5.0] * count, _quality(worse, b if share >= 0.5 else a, patches)]
        scores = scores if share >= 0.5 else scores[::-1]
    elif preference.patches is not None:
        first, second, grid = preference.patches
        if grid != tuple(patches.grid):
            raise UserError(f"its scores are of {grid} patches, not of {tuple(patches.grid)}; set grid to that")
        scores = [first, second]
    ties = sum(not abs(x - y) > 0 for x, y in zip(*scores, strict=True))
    return PairRow(
        f"{a.clip_id}-{b.clip_id}", a.prompt_id, a.prompt, a.clip_id, b.clip_id, 1 + 4 * share, 5 - 4 * share,
        scores[0], scores[1], list(patches.grid), 8 * share - 4, ties / count, preference.weight,
    )  # fmt: skip


def forget_facts(folder: Path) -> None:
    """Remove what a killed import would continue from."""
    shutil.rmtree(folder / _FACTS, ignore_errors=True)
