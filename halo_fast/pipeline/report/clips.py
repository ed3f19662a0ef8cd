"""The clips of a page: which there are, and each in the form a browser shows, made when the page is written."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from halo_fast.agreement.arms import DEFECTIVE
from halo_fast.data.clips import read_clip
from halo_fast.data.tables import EvaluatedRow
from halo_fast.errors import UserError
from halo_fast.files import hash_file
from halo_fast.patches import LatentFactors, PatchGrid

__all__ = ["Card", "Media", "Screen", "browser_picture", "browser_video", "cards_of", "frame_layers", "media_of"]

_SMALL = 160  # pixels: lower clips are enlarged to about this height without smoothing
_LARGE = 360  # pixels: higher ones are made smaller, so that hundreds fit on a page


@dataclass(frozen=True)
class Screen:
    """A clip of one model.

    Args:
        name: of the model.
        file: of the clip.
        row: what was measured.
        grid: patches along time, height and width.
        fps: frames a second.
        factors: how the latents lie on the clip.
    """

    name: str
    file: Path
    row: EvaluatedRow
    grid: tuple[int, ...]
    fps: int
    factors: LatentFactors

    @property
    def mean(self) -> float:
        """Mean severity of its patches."""
        return float(np.mean(self.row.severity))

    @property
    def defective(self) -> int:
        """How many of its patches are defective."""
        return int((np.asarray(self.row.severity) > DEFECTIVE).sum())

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds that are severest in a defective patch; none where the meter knows no kinds."""
        if not self.row.kinds:
            return []
        names = list(self.row.kinds)
        bad = np.asarray(self.row.severity) > DEFECTIVE
        severest = np.array([self.row.kinds[name] for name in names]).argmax(axis=0)[bad]
        return [names[index] for index in np.unique(severest)]


@dataclass(frozen=True)
class Card:
    """All models' clips of one prompt and seed; the first is the base's, the last the model that is looked at.

    Args:
        anchor: its address on the page.
        prompt: the prompt.
        seed: of the noise.
        screens: the clips.
    """

    anchor: str
    prompt: str
    seed: int
    screens: list[Screen]

    @property
    def margin(self) -> float:
        """Severity of the first clip less that of the last: above 0 the last one is better."""
        return self.screens[0].mean - self.screens[-1].mean

    @property
    def kinds(self) -> list[str]:
        """Kinds of defects in any of the clips."""
        return sorted({kind for screen in self.screens for kind in screen.kinds})


@dataclass(frozen=True)
class Media:
    """What a browser needs of a clip: data of the video in base64, its first frame as a data: URI, sizes, heat map.

    Args:
        video: H.264 in mp4.
        poster: the first frame.
        width: pixels of the clip itself.
        height: likewise.
        layers: for each frame the layer of patches that covers it.
        severity: of all patches, in hundredths; 0 where the meter reads nothing.
    """

    video: str
    poster: str
    width: int
    height: int
    layers: list[int]
    severity: list[int]


def cards_of(
    tables: Sequence[tuple[str, Path, Sequence[EvaluatedRow], tuple[int, ...], int, LatentFactors]],
    count: int | None,
) -> list[Card]:
    """The prompts and seeds of which all runs have a base and an aligned clip, in the order of the first run.

    Args:
        tables: of each run its name on the page (empty for a run by itself), the folder of evaluate, its clips, its
            grid, its frames a second, and how its latents lie on the clips.
        count: prompts at most; None for all.

    Raises:
        UserError: severities of another grid, or no such prompt.
    """
    found = [_screens(*table) for table in tables]
    shared = [key for key in found[0] if all(key in screens for screens in found)][:count]
    if not shared:
        where = " and ".join(str(folder / "clips.parquet") for _, folder, *_ in tables)
        raise UserError(f"{where}: no prompt has both a base and an aligned clip; redo evaluate")
    return [
        Card(f"c{number:04d}", *key, _without_copies([screen for screens in found for screen in screens[key]]))
        for number, key in enumerate(shared)
    ]


def _screens(
    name: str,
    folder: Path,
    rows: Sequence[EvaluatedRow],
    grid: tuple[int, ...],
    fps: int,
    factors: LatentFactors,
) -> dict[tuple[str, int], list[Screen]]:
    """Base and aligned clip of every prompt and seed that has both."""
    found: dict[tuple[str, int], dict[str, Screen]] = {}
    for row in rows:
        if len(row.severity) != np.prod(grid):
            raise UserError(
                f"{folder / 'clips.parquet'}: {row.clip_id} has {len(row.severity)} severities, expected one for each "
                f"patch of grid {tuple(grid)}; redo evaluate"
            )
        title = f"{name}: {row.arm}" if name else row.arm
        found.setdefault((row.prompt, row.seed), {})[row.arm] = Screen(
            title, folder / row.video, row, grid, fps, factors
        )
    return {key: [arms["base"], arms["aligned"]] for key, arms in found.items() if "base" in arms and "aligned" in arms}


def _without_copies(screens: list[Screen]) -> list[Screen]:
    """The clips without those whose file equals an earlier one: the base of several runs is mostly the same."""
    if len(screens) == 2:
        return screens
    kept: dict[str, Screen] = {}
    for screen in screens:
        kept.setdefault(hash_file(screen.file) if screen.row.arm == "base" else screen.name, screen)
    return list(kept.values())


def media_of(screen: Screen) -> Media:
    """A clip for the page; UserError if its file is unreadable."""
    frames = read_clip(screen.file).numpy()
    _, height, width, _ = frames.shape
    return Media(
        browser_video(frames, screen.fps),
        browser_picture(frames[0]),
        width,
        height,
        frame_layers(len(frames), screen.grid[0], screen.factors),
        np.rint(100 * np.nan_to_num(screen.row.severity).clip(0, 1)).astype(int).tolist(),
    )


def frame_layers(frames: int, layers: int, factors: LatentFactors) -> list[int]:
    """The layer of patches that covers each frame.

    Args:
        frames: of the clip.
        layers: patches along time.
        factors: how the latents lie on the clip.
    """
    side = factors.spatial_factor
    edges = PatchGrid((layers, 1, 1), frames, side, side, **factors._asdict()).pixel_edges(0)
    return [sum(edge <= frame for edge in edges[1:]) for frame in range(frames)]


def _shown_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which a clip is shown; even, as yuv420p needs it."""
    if height <= _LARGE:
        scale = max(1, round(_SMALL / height))
        return height * scale - height * scale % 2, width * scale - width * scale % 2
    wide = round(width * _LARGE / height)
    return _LARGE, wide + wide % 2


def browser_video(frames: np.ndarray[Any, Any], fps: int) -> str:
    """A clip as H.264 in yuv420p, in base64; small clips are enlarged without smoothing, large ones made smaller.

    Args:
        frames: uint8 [F, H, W, 3].
        fps: frames a second.
    """
    import av

    _, height, width, _ = frames.shape
    shape, quality = _shown_size(height, width), "20" if height < _SMALL else "24"
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # one thread: the bytes must not depend on the machine; x264's mbtree reads uninitialised memory
        options = {"crf": quality, "preset": "veryfast", "threads": "1", "mbtree": "0", "g": "16"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = shape
        stream.pix_fmt = "yuv420p"
        bt709 = 1
        stream.codec_context.color_primaries = stream.codec_context.color_trc = bt709
        stream.codec_context.colorspace = bt709
        for picture in _enlarged(frames, shape):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            small = frame.reformat(width=shape[1], height=shape[0], format="yuv420p", dst_colorspace=bt709)
            container.mux(stream.encode(small))
        container.mux(stream.encode())
    return base64.b64encode(file.getvalue()).decode()


def _enlarged(frames: np.ndarray[Any, Any], shape: tuple[int, int]) -> Iterator[np.ndarray[Any, Any]]:
    """Frames of a small clip at a multiple of their size, cut to even sides; those of a large clip as they are."""
    scale = max(1, round(_SMALL / frames.shape[1]))
    for frame in frames:
        large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
        yield large[: shape[0], : shape[1]] if frames.shape[1] <= _LARGE else frame


def browser_picture(frame: np.ndarray[Any, Any]) -> str:
    """A frame (uint8 [H, W, 3]) as a data: URI: PNG of a small one, JPEG of a larger one at the size of its video."""
    from PIL import Image

    file, picture = io.BytesIO(), Image.fromarray(frame)
    height, width, _ = frame.shape
    if height < _SMALL:
        picture.save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    shape = _shown_size(height, width)
    picture.resize((shape[1], shape[0])).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
