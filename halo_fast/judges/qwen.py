"""Clips as Qwen2-VL and Qwen2.5-VL read them, after qwen-vl-utils: frames, sizes, pixels and the sequence of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.rewards.backbones.vlm.frames import CLIP_MEAN, CLIP_STD, pack_tubes

__all__ = ["frame_count", "frame_indices", "frame_size", "video_inputs"]

_FACTOR = 28  # pixels a side of one token, which sizes of frames are multiples of
_TUBE = 2  # frames of one token
_FEWEST, _MOST = 4, 768  # frames of a clip
MIN_PIXELS = 128 * _FACTOR**2
"""Pixels of a frame, at least, in qwen-vl-utils."""


def frame_count(total: int, clip_fps: float, fps: float, whole: Any = round) -> int:
    """How many frames of a clip are read: those of its length at a rate, 4 to 768, an even number.

    Args:
        total: frames of the clip.
        clip_fps: its rate.
        fps: at which it is read.
        whole: how half the number is made whole: `round` in VideoAlign, `math.floor` in later qwen-vl-utils.

    Raises:
        UserError: a clip of one frame.
    """
    if total < _TUBE:
        raise UserError(f"clip: expected at least {_TUBE} frames, got {total}; make longer clips")
    most = min(_MOST, total) // _TUBE * _TUBE
    count = min(max(total / clip_fps * fps, _FEWEST), most)
    return min(int(whole(count / _TUBE)) * _TUBE, total)


def frame_indices(total: int, count: int) -> list[int]:
    """The frames that are read, at equal steps from the first to the last."""
    return torch.linspace(0, total - 1, count).round().long().tolist()


def frame_size(height: int, width: int, least: float, most: float) -> tuple[int, int]:
    """Height and width that frames are resized to: multiples of 28, about the same shape, pixels within bounds.

    Args:
        height: of the clip.
        width: likewise.
        least: pixels.
        most: pixels.
    """
    rounded = [max(_FACTOR, round(side / _FACTOR) * _FACTOR) for side in (height, width)]
    if math.prod(rounded) > most:
        scale = math.sqrt(height * width / most)
        rounded = [math.floor(side / scale / _FACTOR) * _FACTOR for side in (height, width)]
    elif math.prod(rounded) < least:
        scale = math.sqrt(least / (height * width))
        rounded = [math.ceil(side * scale / _FACTOR) * _FACTOR for side in (height, width)]
    return rounded[0], rounded[1]


def video_inputs(
    frames: Tensor, size: tuple[int, int], question: str, tokenizer: Any, config: Any
) -> dict[str, Tensor]:
    """What the model takes for one clip and a question after it.

    Args:
        frames: uint8 [F, H, W, 3], those that are read.
        size: height and width that they are resized to.
        question: of the user's turn.
        tokenizer: with a chat template.
        config: of the model.

    Raises:
        UserError: a tokenizer without chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{tokenizer.name_or_path}: expected a tokenizer with a chat template, got one without")
    pixels = frames.permute(0, 3, 1, 2).float()
    # the published code resizes uint8 pictures, which rounds
    pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    mean, std = (torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    patches, grid = pack_tubes(((pixels / 255 - mean) / std)[None], config.vision_config)
    content = [{"type": "video"}, {"type": "text", "text": question}]
    turn = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    place = tokenizer.convert_ids_to_tokens(config.video_token_id)
    count = int(grid.prod()) // config.vision_config.spatial_merge_size**2
    # a prompt that spells the token out stays text: only the first one is the clip's place
    ids = tokenizer(text.replace(place, place * count, 1), return_tensors="pt").input_ids.to(frames.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": patches,
        "video_grid_thw": grid,
        "mm_token_type_ids": 2 * (ids == config.video_token_id).int(),  # 2 stands for video
    }
