"""Clips on disk: videos of any format read with PyAV, folders of pictures, and lossless H.264 in mp4 written."""

import gc
import io
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from halo_fast.data.tables import ClipRow
from halo_fast.errors import UserError, first_line
from halo_fast.files import replacing, return_freed_memory
from halo_fast.patches import LatentFactors

if TYPE_CHECKING:
    import av

__all__ = [
    "Frame",
    "first_frame",
    "latent_factors",
    "motion_amount",
    "natural_order",
    "picture_file",
    "plays_everywhere",
    "read_clip",
    "read_frames",
    "read_picture",
    "sample_frames",
    "stream_clip",
    "stream_frames",
    "visible_files",
    "write_clip",
]

# transfer functions of high dynamic range, by their number in ITU-T H.273
_HDR = {16: "PQ", 18: "HLG"}
_LARGEST = 2**25  # pixels of a picture, which is that of 8K
_TRIMMED = 2**23  # bytes of a clip after which freed memory is given back
_LONGEST = 600.0  # seconds that one frame may be shown
_STILL = 0.04  # seconds that a frame is shown whose file does not say it
# what systems leave in folders beside the pictures
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")


class Frame(NamedTuple):
    """A frame and when it is shown.

    Args:
        number: in the file, 0 the first.
        start: seconds since the clip's beginning.
        end: likewise.
        picture: uint8 [H, W, 3].
    """

    number: int
    start: float
    end: float
    picture: Tensor


def write_clip(path: Path | str, video: Tensor, fps: int, crf: int | None = None) -> None:
    """Write an mp4 atomically, as H.264.

    Without `crf` only the conversion of colours rounds, by 2 levels: yuv444p at quantiser 0, which Chromium plays and
    many other players do not. With it the clip plays everywhere: yuv420p in the colours of BT.709, sides even.

    Args:
        path: the mp4 file.
        video: uint8 [F, H, W, 3].
        fps: frames a second.
        crf: x264's constant rate factor, 0 to 51, higher for smaller files; None for lossless.

    Raises:
        ValueError: another shape or dtype, or odd sides with `crf`.
    """
    import av

    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"video: expected uint8 [F, H, W, 3], got {video.dtype} {list(video.shape)}")
    height, width = video.shape[1:3]
    if crf is not None and (height % 2 or width % 2):
        raise ValueError(f"video: expected even sides, got {height} x {width}; crf=None takes any")
    # with crf the index comes first in the file, so that a browser starts before it has the whole
    options = {"fflags": "+bitexact"} | ({} if crf is None else {"movflags": "+faststart"})
    # x264 divides its work by threads, and its macroblock tree varies from call to call, in one of six files of 32 x 32
    # pixels; equal clips must be equal bytes, here and on another machine.
    coding = {"x264-params": "threads=1:mbtree=0"} | ({"qp": "0"} if crf is None else {"crf": str(crf)})
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=fps, options=coding)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p" if crf is None else "yuv420p"
        if crf is not None:
            _tag_bt709(stream.codec_context)
        for picture in video.cpu().numpy():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if crf is not None:
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _tag_bt709(codec: Any) -> None:
    """Say in the stream that its colours are those of BT.709, so that every player shows the same."""
    codec.colorspace = codec.color_primaries = codec.color_trc = 1
    codec.color_range = 1


def plays_everywhere(path: Path | str) -> bool:
    """Whether a file is an mp4 as `write_clip` makes it with `crf`: H.264 in yuv420p, upright, with square pixels.

    Args:
        path: a video that `read_clip` reads.
    """
    import av

    if Path(path).suffix.lower() != ".mp4":
        return False
    with av.open(str(path)) as container:
        stream = _video_stream(container)
        codec, first = stream.codec_context, next(container.decode(stream))
        square = (codec.sample_aspect_ratio or 1) == 1
        upright = first.side_data.get("DISPLAYMATRIX") is None
        return codec.name == "h264" and codec.pix_fmt == "yuv420p" and square and upright


def read_clip(path: Path | str, fps: float | None = None) -> Tensor:
    """The frames of a video file as a player shows them: the first real video stream, turned, with square pixels.

    Args:
        path: of any format that FFmpeg reads.
        fps: frames a second at which the clip is sampled; None for all its frames.

    Returns:
        uint8 [F, H, W, 3].

    Raises:
        UserError: as for `stream_clip`, or the size changes.
    """
    frames = stream_clip(path) if fps is None else sample_frames(stream_clip(path), fps)
    video = _stack([frame.picture for frame in frames], f"clip {path}")
    if video.nbytes > _TRIMMED:
        return_freed_memory()
    return video


def picture_file(video: Path) -> Path:
    """Where the picture lies from which image-to-video made a clip: images/NAME.png beside videos/NAME.mp4."""
    return video.parent.parent / "images" / f"{video.stem}.png"


def first_frame(video: Path) -> Tensor:
    """The picture that a clip goes on from, uint8 [H, W, 3]: the one it was made from, else its own first frame.

    Args:
        video: of the clip.
    """
    picture = picture_file(video)
    return read_picture(picture, str(picture)) if picture.exists() else next(stream_clip(video)).picture


def stream_clip(path: Path | str) -> Iterator[Frame]:
    """The frames of a video file one by one, with the times at which a player shows them; see `read_clip`.

    Args:
        path: of any format that FFmpeg reads.

    Raises:
        UserError: the file is missing, damaged or cut short, holds no video, or has a high dynamic range.
    """
    import av

    try:
        with av.open(str(path)) as container:
            yield from _timed(_decode(container, _video_stream(container), Path(path)))
        gc.collect(1)  # key frames and their side data refer to each other, and would stay for many clips
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"clip {path}: expected a readable video, got {reason}; make it again or remove it") from error


def sample_frames(frames: Iterator[Frame], fps: float) -> Iterator[Frame]:
    """The frames that are shown at the times 0, 1 / fps, 2 / fps, ... of a clip, of whatever rate it is.

    Args:
        frames: of the clip, such as those of `stream_clip`.
        fps: frames a second.
    """
    count = 0
    for frame in frames:
        # the first frame is shown however short it is; a thousandth of a frame is rounding
        while not count or count / fps < frame.end - 1e-3 / fps:
            yield Frame(frame.number, count / fps, (count + 1) / fps, frame.picture)
            count += 1


def read_frames(folder: Path) -> Tensor:
    """A clip out of a folder of pictures, in the natural order of their names: frame_2 before frame_10.

    Args:
        folder: of pictures of one size; hidden files are ignored.

    Returns:
        uint8 [F, H, W, 3].

    Raises:
        UserError: no pictures, a file that is none, or pictures of several sizes.
    """
    return _stack([frame.picture for frame in stream_frames(folder, 1)], str(folder))


def stream_frames(folder: Path, fps: float) -> Iterator[Frame]:
    """The frames of a clip in a folder of pictures, one by one; see `read_frames`.

    Args:
        folder: of pictures; hidden files are ignored.
        fps: frames a second at which they are shown.

    Raises:
        UserError: no pictures, or a file that is none.
    """
    files = visible_files(folder)
    if not files:
        raise UserError(f"{folder}: expected a folder of frames, got an empty one")
    for number, file in enumerate(files):
        yield Frame(number, number / fps, (number + 1) / fps, read_picture(file, str(file)))


def visible_files(folder: Path) -> list[Path]:
    """The files and folders in a folder in the natural order of their names, without those that systems leave."""
    files = [file for file in folder.iterdir() if file.name[0] != "." and file.name.casefold() not in _SYSTEM_FILES]
    return sorted(files, key=natural_order)


def read_picture(file: Path | io.BytesIO, name: str) -> Tensor:
    """A picture as a viewer shows it: turned by its EXIF orientation, 16 bits scaled to 8, transparency over black.

    Args:
        file: a file or its content.
        name: for messages.

    Returns:
        uint8 [H, W, 3].

    Raises:
        UserError: no readable picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            _check_size(*opened.size)
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):
                # Pillow would clip 16 bits at 255
                grey = (np.asarray(picture).astype(np.int64) + 128) // 257
                return torch.from_numpy(np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
            return torch.from_numpy(np.array(picture.convert("RGB")))
    except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged files
        reason = first_line(error)
        raise UserError(f"{name}: expected a picture ({reason}); make it again or leave the row out") from error


def motion_amount(video: Tensor) -> float:
    """Mean absolute change of a pixel from frame to frame, 0 to 255, of a video uint8 [F, H, W, 3]; 0 of one frame."""
    changes = [float((b.int() - a.int()).abs().float().mean()) for a, b in pairwise(video)]
    return sum(changes) / len(changes) if changes else 0.0


def latent_factors(folder: Path, clip: ClipRow) -> LatentFactors | None:
    """By how much the autoencoder compressed the space and time of a generated clip, as sizes tell it.

    Args:
        folder: of the table of clips.
        clip: one of its rows.

    Returns:
        None if the clip has no latents.

    Raises:
        UserError: sizes that do not tell.
    """
    if clip.latents is None or not (folder / clip.latents).exists():
        return None
    with safe_open(folder / clip.latents, framework="pt") as file:
        shape = file.get_slice("latents").get_shape()
        frames, height = shape[-4 if (file.metadata() or {}).get("layout") == "BFCHW" else -3], shape[-2]
    video_frames, video_height = read_clip(folder / clip.video).shape[:2]
    try:
        return LatentFactors.of_sizes((video_frames, video_height), (frames, height))
    except ValueError as error:
        raise UserError(
            f"{folder / clip.latents}: {error}; clips of CogVideoX 1.5 made by an earlier version lack latents.json, "
            "make them again with `halo generate --force`"
        ) from error


def _video_stream(container: "av.container.InputContainer") -> Any:
    """The first stream of moving pictures; ValueError if there is none."""
    from av.stream import Disposition

    streams = container.streams.video
    moving = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
    if not moving:
        raise ValueError("a cover picture alone" if streams else "no video stream")
    if moving[0].codec_context is None:
        raise ValueError("a video stream of an unknown codec")
    return moving[0]


class _Decoded(NamedTuple):
    """A frame as the decoder gives it; its time is None where the file has none."""

    time: float | None
    lasts: float
    picture: Tensor


def _decode(container: "av.container.InputContainer", stream: Any, path: Path) -> Iterator[_Decoded]:
    """The frames of a stream; ValueError at the end if there are none, or if the file is cut short."""
    context = stream.codec_context
    aspect = float(context.sample_aspect_ratio or 1)
    if context.width and context.height:
        _check_size(context.width, context.height)
    # before the decoder makes room for a larger one
    context.options = {"max_pixels": str(_LARGEST)}
    count, end, turn, rotation = 0, 0.0, None, 0
    for packet in container.demux(stream, *container.streams.audio):
        if packet.is_corrupt:
            raise ValueError("a damaged or cut one")
        if packet.pts is not None:
            lasts = float(packet.duration * packet.time_base) if packet.duration else _frame_time(stream)
            end = max(end, float(packet.pts * packet.time_base) + lasts)
        if packet.stream.index != stream.index:
            continue
        for frame in packet.decode():
            if frame.is_corrupt:
                raise ValueError("a damaged or cut one")
            if frame.color_trc in _HDR:
                raise ValueError(
                    f"one of high dynamic range ({_HDR[frame.color_trc]}), which needs tone mapping to SDR"
                )
            _check_size(frame.width * aspect, frame.height)
            count += 1
            lasts = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
            # side data make a frame a cycle of references, which stays for hundreds of frames; so not of every one
            if frame.key_frame or frame.rotation != rotation:
                turn, rotation = frame.side_data.get("DISPLAYMATRIX"), frame.rotation
                turn = None if turn is None else bytes(turn)
            yield _Decoded(frame.time, lasts or _frame_time(stream) or _STILL, _as_displayed(frame, aspect, turn))
    _check_whole(container, stream, end, path)
    if not count:
        raise ValueError("one without frames")


def _check_size(width: float, height: float) -> None:
    """ValueError for a picture of more pixels than anybody films, which damaged files claim to have."""
    if not 1 <= width * height <= _LARGEST:
        raise ValueError(f"pictures of {height:g} x {width:g} pixels, more than {_LARGEST}")


def _timed(frames: Iterator[_Decoded]) -> Iterator[Frame]:
    """Frames with their times since the first one; each is shown until the next one is."""
    shown: _Decoded | None = None
    number, zero, start = 0, 0.0, 0.0
    for frame in frames:
        time = start + (shown.lasts if shown else 0.0) if frame.time is None else frame.time - zero
        if shown is None:
            zero, time = frame.time or 0.0, 0.0
        else:
            if time - start > _LONGEST:
                raise ValueError(f"one whose frame {number + 1} is shown for {time - start:.3g} seconds")
            yield Frame(number, start, max(time, start), shown.picture)
            number += 1
        shown, start = frame, max(time, start)
    if shown is not None:
        yield Frame(number, start, start + min(shown.lasts, _LONGEST), shown.picture)


def _as_displayed(frame: "av.VideoFrame", aspect: float, turn: bytes | None) -> Tensor:
    """A frame [H, W, 3] with square pixels, turned and mirrored as a display matrix says."""
    width = round(frame.width * aspect)
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=frame.height))
    if turn is None:
        return picture
    # x' = a x + c y and y' = b x + d y, in fixed point
    a, b, _, c, d = np.frombuffer(turn, np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, rows, columns = picture.transpose(0, 1), b, c
    else:
        rows, columns = d, a
    return picture.flip([axis for axis, sign in enumerate((rows, columns)) if sign < 0])


def _check_whole(container: "av.container.InputContainer", stream: Any, end: float, path: Path) -> None:
    """Compare the end of the data with the length that the file declares; ValueError if it is cut short."""
    name = container.format.name
    declared = (container.duration or 0) / 1e6 + max(container.start_time or 0, 0) / 1e6
    if name == "avi" and stream.frames:
        # FFmpeg shortens the duration of a cut avi to its size, the count of frames stays
        declared = stream.frames * _frame_time(stream)
    if end < declared - max(1.5 * _frame_time(stream), 0.01 * declared):
        raise ValueError(f"one cut at {end:.3g} of {declared:.3g} seconds")
    # a transport stream has no end and no length, but consists of packets of one size
    if name == "mpegts" and all(path.stat().st_size % size for size in (188, 192, 204)):
        raise ValueError("one cut short, with half a packet at its end")
    if name == "gif" and path.read_bytes().rstrip(b"\0")[-1:] != b";":
        raise ValueError("one cut short, without the end that a gif has")


def _frame_time(stream: Any) -> float:
    rate = stream.average_rate or stream.guessed_rate
    return 1 / float(rate) if rate else 0.0


def _stack(frames: Sequence[Tensor], name: str) -> Tensor:
    """Frames [F, H, W, 3]; UserError if their sizes differ."""
    for number, frame in enumerate(frames, 1):
        if frame.shape != frames[0].shape:
            sizes = [f"{one.shape[0]} x {one.shape[1]}" for one in (frames[0], frame)]
            raise UserError(
                f"{name}: expected frames of one size, height x width {sizes[0]}, got {sizes[1]} at frame {number}; "
                "make it again at one size or remove it"
            )
    return torch.stack(list(frames))


def natural_order(file: Path) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by value."""
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]
