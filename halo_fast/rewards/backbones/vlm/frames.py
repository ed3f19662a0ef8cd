"""Frames of clips through the vision towers of transformers' vision-language models, a reader for each family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CLIP_MEAN", "CLIP_STD", "READERS", "Frames", "pack_tubes", "read_idefics", "read_llava", "read_qwen"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)


class Frames(NamedTuple):
    """Features of clips by the vision tower.

    Args:
        tokens: [N, T, K, hidden], K tokens for each of T steps in time, as the language model reads them.
        maps: [N, c, T, y, x], the same in their places; the tower's own output where tokens have no place.
        deep: features that are added to the tokens in deeper layers of the language model (DeepStack, Qwen3-VL), each
            [N, T * K, hidden].
        size: frames, height, width of the clips.
    """

    tokens: Tensor
    maps: Tensor
    deep: tuple[Tensor, ...]
    size: tuple[int, int, int]


def _size(videos: Tensor) -> tuple[int, int, int]:
    return videos.shape[1], videos.shape[2], videos.shape[3]


def _normalise(videos: Tensor, side: int, multiple: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, F, H, W, 3] -> float [N, F, 3, h, w]: the shorter side at most `side`, all divisible by `multiple`."""
    count, _, height, width = videos.shape[:4]
    scale = min(1.0, side / min(height, width))
    target = [max(1, round(length * scale / multiple)) * multiple for length in (height, width)]
    frames = videos.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    if target != [height, width]:
        frames = F.interpolate(frames, target, mode="bicubic", antialias=True).clamp(0, 1)
    shift, unit = (torch.tensor(values, device=videos.device).view(3, 1, 1) for values in (mean, std))
    return ((frames - shift) / unit).unflatten(0, (count, -1))


def pack_tubes(frames: Tensor, vision: Any) -> tuple[Tensor, Tensor]:
    """Normalised frames in the order in which Qwen's vision towers read them: tubes of two frames, merged two by two.

    Args:
        frames: float [N, F, 3, H, W], sides divisible by patch and merge; a last tube is filled up with the last frame.
        vision: the tower's config.

    Returns:
        [N * patches, 3 * tube * patch * patch], and time, height and width of each clip in patches, int64 [N, 3].
    """
    patch, merge, tube = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    x = frames
    if x.shape[1] % tube:
        x = torch.cat((x, x[:, -1:].expand(-1, tube - x.shape[1] % tube, -1, -1, -1)), dim=1)
    count, length, channels, height, width = x.shape
    steps, rows, columns = length // tube, height // patch // merge, width // patch // merge
    x = x.reshape(count, steps, tube, channels, rows, merge, patch, columns, merge, patch)
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, channels * tube * patch * patch)
    return x, torch.tensor([[steps, rows * merge, columns * merge]] * count, device=frames.device)


def read_qwen(network: Any, videos: Tensor, side: int) -> Frames:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: tubes of two frames, merged two by two."""
    vision = network.config.vision_config
    merge = vision.spatial_merge_size
    deep_tower = hasattr(vision, "deepstack_visual_indexes")
    mean, std = (_HALF, _HALF) if deep_tower else (CLIP_MEAN, CLIP_STD)
    x, thw = pack_tubes(_normalise(videos, side, vision.patch_size * merge, mean, std), vision)
    count, steps, rows, columns = len(videos), *(thw[0] // torch.tensor([1, merge, merge], device=x.device)).tolist()
    output = network.model.get_video_features(x.to(network.dtype), thw, return_dict=True)
    tokens = torch.stack(list(output.pooler_output)).unflatten(1, (steps, rows * columns))
    maps = tokens.unflatten(2, (rows, columns)).movedim(-1, 1)
    layers = output.deepstack_features if deep_tower else []
    deep = [torch.cat(list(layer)) if isinstance(layer, list | tuple) else layer for layer in layers]
    return Frames(tokens, maps, tuple(layer.unflatten(0, (count, -1)) for layer in deep), _size(videos))


def read_idefics(network: Any, videos: Tensor, side: int) -> Frames:
    """Idefics2, Idefics3 and SmolVLM: each frame an image."""
    config, patch = network.config, network.config.vision_config.patch_size
    resampled = hasattr(config, "perceiver_config")
    merge = 1 if resampled else config.scale_factor
    x = _normalise(videos, side, patch * merge, _HALF, _HALF)
    rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
    output = network.model.get_image_features(x.to(network.dtype), return_dict=True)
    tokens = output.pooler_output
    tokens = torch.cat(list(tokens)) if isinstance(tokens, list | tuple) else tokens
    tokens = tokens.reshape(*x.shape[:2], -1, tokens.shape[-1])
    if resampled:  # its tokens have no place in the picture; the tower's own output has
        maps = output.last_hidden_state.unflatten(1, (rows, columns)).unflatten(0, x.shape[:2])
    else:
        maps = tokens.unflatten(2, (rows // merge, columns // merge))
    return Frames(tokens, maps.movedim(-1, 1), (), _size(videos))


def read_llava(network: Any, videos: Tensor, side: int) -> Frames:
    """LLaVA-OneVision: each frame a square image, pooled two by two."""
    config, vision = network.config, network.config.vision_config
    size = vision.image_size  # its positions are learned for squares of this size
    frames = videos.flatten(0, 1).permute(0, 3, 1, 2)
    frames = F.interpolate(frames.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    x = (frames / 127.5 - 1).unflatten(0, videos.shape[:2])
    output = network.model.get_video_features(
        x.to(network.dtype),
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        return_dict=True,
    )
    tokens = output.pooler_output[:, :-1].unflatten(1, (videos.shape[1], -1))
    edge = -(-(size // vision.patch_size) // 2)
    return Frames(tokens, tokens.unflatten(2, (edge, edge)).movedim(-1, 1), (), _size(videos))


READERS: dict[str, Callable[[Any, Tensor, int], Frames]] = {
    "qwen2_vl": read_qwen,
    "qwen2_5_vl": read_qwen,
    "qwen3_vl": read_qwen,
    "idefics2": read_idefics,
    "idefics3": read_idefics,
    "smolvlm": read_idefics,
    "llava_onevision": read_llava,
}
"""Reader of each model type: network, uint8 [N, F, H, W, 3] and the largest shorter side -> Frames."""
