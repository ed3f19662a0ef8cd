"""Clips of any length, size and rate brought to those of a run, and maps on the clip brought to its patches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from halo_fast.data.clips import Frame, sample_frames
from halo_fast.errors import UserError
from halo_fast.patches import PatchGrid

__all__ = ["Closest", "Fit", "FitPolicy", "Fitted", "VideoFormat", "fit_clip", "fit_picture", "pool_damage"]

_CANDIDATES = 16  # frames in memory for one that is kept
_SAME_RATE = 0.01  # rates that differ by a smaller share are the same: 30 and 29.97


Closest = Callable[[int, int, int], tuple[int, int, int]]
"""Of frames, height and width the largest that a model makes and a clip of these can be cut to."""


class VideoFormat(NamedTuple):
    """The format of a clip, and what all clips of a run have alike unless imports keep their own.

    Args:
        num_frames: of a clip.
        height: pixels.
        width: pixels.
        fps: frames a second.
    """

    num_frames: int
    height: int
    width: int
    fps: float


@dataclass
class FitPolicy:
    """What is done to a clip of another format; "refuse" leaves it out.

    Args:
        size: "crop" scales a clip until it covers the size and cuts what is over on both sides; "resize" scales height
            and width by themselves, which changes the proportions; "keep" leaves a clip its own size, cut on all sides
            to the next that the model makes.
        frames: "trim" takes the first frames, "spread" evenly spread ones of the whole clip. A clip with too few frames
            is always left out. "keep" takes all, cut at the end to the next number that the model makes.
        fps: "sample" takes what is shown at the times of the run's rate; "keep" takes frame after frame, whatever their
            rate.
    """

    size: Literal["crop", "resize", "keep", "refuse"] = "crop"
    frames: Literal["trim", "spread", "keep", "refuse"] = "trim"
    fps: Literal["sample", "keep", "refuse"] = "sample"


class Fit(NamedTuple):
    """Where the frames of a fitted clip come from.

    Args:
        frames: number of the source's frame behind each frame.
        box: top, left, height and width, in pixels of the source, of what is shown.
        source: format of the source.
        changes: what was done, in words; empty for nothing.
    """

    frames: list[int]
    box: tuple[float, float, float, float]
    source: VideoFormat
    changes: str


class Fitted(NamedTuple):
    """A clip uint8 [F, H, W, 3] in the run's format, and where it comes from."""

    video: Tensor
    fit: Fit


def fit_clip(
    frames: Iterator[Frame],
    wanted: VideoFormat,
    policy: FitPolicy,
    closest: Closest = lambda *given: given,
) -> Fitted:
    """Bring a clip to a format; only the frames that are kept are in memory.

    Args:
        frames: of the clip, one by one.
        wanted: the format.
        policy: what may be done.
        closest: what a clip is cut to whose size or length is kept.

    Raises:
        UserError: the policy refuses the clip, it has too few frames, or its size changes; the message says which.
    """
    watched = _Watch(frames)
    sampled = sample_frames(watched, wanted.fps) if policy.fps == "sample" else watched
    if policy.size == "keep":
        wanted, sampled = _of_own_size(wanted, sampled, closest)
    kept, count = _kept_frames(sampled, wanted, policy)
    if policy.frames == "keep" and count:
        wanted = _cut(wanted._replace(num_frames=count), closest)
        kept = kept[: wanted.num_frames]
    source = watched.format()
    same_rate = abs(source.fps - wanted.fps) <= _SAME_RATE * wanted.fps
    if policy.fps == "refuse" and not same_rate:
        raise UserError(f"{source.fps:.4g} frames a second, {wanted.fps:g} are wanted (imports.fps refuse)")
    if count < wanted.num_frames:
        rate = f" at {wanted.fps:g} a second" if policy.fps == "sample" else ""
        raise UserError(f"{count} frames{rate}, {wanted.num_frames} are wanted (generate.num_frames)")
    if policy.frames == "refuse" and count > wanted.num_frames:
        raise UserError(f"{count} frames, {wanted.num_frames} are wanted (imports.frames refuse)")
    changes = []
    if not same_rate:
        verb = "sampled at" if policy.fps == "sample" else "taken as"
        changes.append(f"{source.fps:.4g} frames a second {verb} {wanted.fps:g}")
    if count > wanted.num_frames:
        which = f"{wanted.num_frames} spread over" if policy.frames == "spread" else f"first {wanted.num_frames} of"
        changes.append(f"{which} {count} frames")
    box = _box(source.height, source.width, wanted, policy)
    changes += _size_changes(source, wanted, box)
    pictures, numbers = [picture for _, picture in kept], [number for number, _ in kept]
    return Fitted(torch.stack(pictures), Fit(numbers, box, source, "; ".join(changes)))


def fit_picture(picture: Tensor, height: int, width: int) -> Tensor:
    """A picture uint8 [H, W, 3] scaled until it covers a size, and cut alike on both sides."""
    return _resized(picture, VideoFormat(1, height, width, 0.0), FitPolicy())


def _of_own_size(wanted: VideoFormat, frames: Iterator[Frame], closest: Closest) -> tuple[VideoFormat, Iterator[Frame]]:
    """The format with the size that a clip is cut to, which its first frame tells; and all frames."""
    first = next(frames, None)
    if first is None:
        return wanted, frames
    height, width = first.picture.shape[:2]
    return _cut(wanted._replace(height=height, width=width), closest), chain([first], frames)


def _cut(own: VideoFormat, closest: Closest) -> VideoFormat:
    """The closest format that the model makes; UserError if a clip is too small for any."""
    cut = closest(*own[:3])
    if any(less > given for less, given in zip(cut, own, strict=False)):
        given, least = (" x ".join(map(str, size)) for size in (own[:3], cut))
        raise UserError(f"{given} frames and pixels, the model makes no less than {least}; leave it out, or enlarge it")
    return VideoFormat(*cut, own.fps)


def _kept_frames(
    frames: Iterator[Frame], wanted: VideoFormat, policy: FitPolicy
) -> tuple[list[tuple[int, Tensor]], int]:
    """Number and picture of the frames that are kept, at most as many as wanted or all; and how many there were.

    Frames are spread at the middles of equal parts. Of a long clip every second, fourth, ... frame is a candidate, so
    that no more than sixteen times the wanted number are in memory.
    """
    kept: list[tuple[int, Tensor]] = []
    count, stride = 0, 1
    for frame in frames:
        if count % stride == 0 and (policy.frames in ("spread", "keep") or count < wanted.num_frames):
            kept.append((frame.number, _resized(frame.picture, wanted, policy)))
        if policy.frames != "keep" and len(kept) > _CANDIDATES * wanted.num_frames:
            kept, stride = kept[::2], 2 * stride
        count += 1
    if policy.frames == "spread" and count > wanted.num_frames:
        middles = [(2 * k + 1) * count // (2 * wanted.num_frames) for k in range(wanted.num_frames)]
        kept = [kept[middle // stride] for middle in middles]
    return kept, count


class _Watch:
    """Frames that pass by, counted and measured; UserError where their size changes."""

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames = frames
        self._size: tuple[int, int] = (0, 0)
        self._count, self._end = 0, 0.0

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        frame = next(self._frames)
        height, width = frame.picture.shape[:2]
        if self._count and (height, width) != self._size:
            raise UserError(
                f"frames of {self._size[0]} x {self._size[1]} and, from number {self._count + 1} on, of "
                f"{height} x {width}; one size is wanted"
            )
        self._size, self._count, self._end = (height, width), self._count + 1, frame.end
        return frame

    def format(self) -> VideoFormat:
        """The format of all frames; the rate is their number over the clip's duration."""
        return VideoFormat(self._count, *self._size, self._count / self._end if self._end else 0.0)


def _box(height: int, width: int, wanted: VideoFormat, policy: FitPolicy) -> tuple[float, float, float, float]:
    """The part of a picture that is shown, centred: all of it, or by "crop" the largest of the wanted proportions."""
    if policy.size == "keep":
        top, left = (height - wanted.height) // 2, (width - wanted.width) // 2
        return float(top), float(left), float(wanted.height), float(wanted.width)
    if policy.size != "crop":
        return 0.0, 0.0, float(height), float(width)
    scale = min(height / wanted.height, width / wanted.width)
    shown = wanted.height * scale, wanted.width * scale
    return (height - shown[0]) / 2, (width - shown[1]) / 2, *shown


def _resized(picture: Tensor, wanted: VideoFormat, policy: FitPolicy) -> Tensor:
    """A picture uint8 [H, W, 3] at the wanted size; cutting is on whole pixels after scaling."""
    height, width = picture.shape[:2]
    size = wanted.height, wanted.width
    if (height, width) == size:
        return picture
    if policy.size == "refuse":
        raise UserError(f"{height} x {width} pixels, {size[0]} x {size[1]} are wanted (imports.size refuse)")
    if policy.size == "crop":
        scale = max(size[0] / height, size[1] / width)
        scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    else:
        scaled = (height, width) if policy.size == "keep" else size
    if scaled != (height, width):
        # channel by channel: a picture of 8K takes a gigabyte as floats
        channels = [
            F.interpolate(one[None, None].float(), scaled, mode="bicubic", antialias=True, align_corners=False)[0, 0]
            for one in picture.unbind(-1)
        ]
        picture = torch.stack(channels, dim=-1).round().clamp(0, 255).to(torch.uint8)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return picture[top : top + size[0], left : left + size[1]].contiguous()


def _size_changes(source: VideoFormat, wanted: VideoFormat, box: tuple[float, float, float, float]) -> list[str]:
    """What was done to the size, in words."""
    changes = []
    if max(source.height - box[2], source.width - box[3]) > 1e-6:
        changes.append(f"middle {box[2]:.4g} x {box[3]:.4g} of {source.height} x {source.width} pixels")
    if (round(box[2]), round(box[3])) != (wanted.height, wanted.width):
        changes.append(f"{box[2]:.4g} x {box[3]:.4g} scaled to {wanted.height} x {wanted.width}")
    return changes


def pool_damage(damage: Callable[[int], NDArray[np.floating]], fit: Fit, patches: PatchGrid) -> NDArray[np.float64]:
    """The mean damage of every patch of a fitted clip, by the share of the patch's area that each cell covers.

    Args:
        damage: of a frame of the source, by its number: [Y, X] cells that divide the source's picture evenly; NaN is
            unlabelled. A region that moves is another array in each frame.
        fit: how the clip was made of its source.
        patches: of the fitted clip.

    Returns:
        [f, h, w]; NaN for a patch of which nothing is labelled.
    """
    sums, areas = np.zeros(patches.grid), np.zeros(patches.grid)
    edges = patches.pixel_edges(0)
    for time in range(patches.grid[0]):
        for frame in fit.frames[edges[time] : edges[time + 1]]:
            cells = np.asarray(damage(frame), np.float64)
            rows = _overlap(patches.pixel_edges(1), patches.height, fit.box[0::2], cells.shape[0], fit.source.height)
            columns = _overlap(patches.pixel_edges(2), patches.width, fit.box[1::2], cells.shape[1], fit.source.width)
            known = ~np.isnan(cells)
            sums[time] += rows @ np.where(known, cells, 0) @ columns.T
            areas[time] += rows @ known @ columns.T
    return np.where(areas > 1e-9, sums / np.where(areas > 1e-9, areas, 1), np.nan)


def _overlap(edges: Sequence[int], length: int, box: Sequence[float], count: int, source: float) -> NDArray[np.float64]:
    """Length that patch p and cell c share along an axis, [patches, count], in pixels of the source."""
    borders = box[0] + np.asarray(edges) / length * box[1]
    cells = np.arange(count + 1) * source / count
    shared = np.minimum(borders[1:, None], cells[1:]) - np.maximum(borders[:-1, None], cells[:-1])
    return shared.clip(min=0)
