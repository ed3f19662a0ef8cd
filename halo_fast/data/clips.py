"""Clips on disk: lossless H.264 in mp4, read and written with PyAV."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from halo_fast.data.tables import ClipRow
from halo_fast.errors import UserError
from halo_fast.files import replacing

__all__ = ["latent_factors", "read_clip", "write_clip"]


def write_clip(path: Path | str, video: Tensor, fps: int) -> None:
    """Write an mp4 atomically: H.264, yuv444p, quantiser 0, so that only colour conversion rounds, by 2 levels.

    Args:
        path: the mp4 file.
        video: uint8 [F, H, W, 3].
        fps: frames a second.

    Raises:
        ValueError: another shape or dtype.
    """
    import av

    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"video: expected uint8 [F, H, W, 3], got {video.dtype} {list(video.shape)}")
    with (
        replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"fflags": "+bitexact"}) as container,
    ):
        # One thread: x264 divides its work by threads, and the bytes must not depend on the machine.
        options = {"qp": "0", "x264-params": "threads=1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv444p"
        for frame in video.cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_clip(path: Path | str) -> Tensor:
    """All frames of a video file, uint8 [F, H, W, 3].

    Raises:
        UserError: the file is missing, holds no video, or cannot be decoded.
    """
    import av

    try:
        with av.open(str(path)) as container:
            frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    except (av.FFmpegError, OSError, IndexError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"clip {path}: expected a readable video, got {reason}; make it again or remove it") from error
    if not frames:
        raise UserError(f"clip {path}: expected a readable video, got one without frames; make it again or remove it")
    return torch.stack(frames)


def latent_factors(folder: Path, clip: ClipRow) -> tuple[int, int, bool] | None:
    """By how much the autoencoder compressed the space and time of a generated clip.

    Args:
        folder: of the table of clips.
        clip: one of its rows.

    Returns:
        pixels to a side and frames of one latent position, and whether the autoencoder is causal; None if the clip has
        no latents.
    """
    if clip.latents is None or not (folder / clip.latents).exists():
        return None
    with safe_open(folder / clip.latents, framework="pt") as file:
        frames, height, _ = file.get_slice("latents").get_shape()[-3:]
    video_frames, video_height = read_clip(folder / clip.video).shape[:2]
    causal = frames > 1 and (video_frames - 1) % (frames - 1) == 0
    time = (video_frames - 1) // (frames - 1) if causal else video_frames // frames
    return video_height // height, time, causal
