"""How far the pixels are from the colours that the prompt leads to expect."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halo_fast.rewards.backbones.compact.blocks import shrink

__all__ = ["COLOURS", "palette_distance"]

COLOURS = 4
"""Colours that a prompt leads to expect."""

_SHARPNESS = 4.0  # of the soft minimum over them


def palette_distance(pixels: Tensor, palette: Tensor) -> Tensor:
    """Root mean square distance of 4 x 4 pixels to each expected colour and, by a soft minimum, to the nearest one.

    Damage often shows in a colour that nothing in the prompt accounts for.

    Args:
        pixels: [N, 3, F, H, W].
        palette: [N, 4, 3], the expected colours, in the pixels' units.

    Returns:
        [N, 4 + 1, F, H/4, W/4].
    """
    cross = torch.einsum("nkc,ncfhw->nkfhw", palette, pixels)
    distance = pixels.square().sum(dim=1, keepdim=True) - 2 * cross + palette.square().sum(2)[..., None, None, None]
    nearest = -torch.logsumexp(-_SHARPNESS * distance, dim=1, keepdim=True) / _SHARPNESS
    nearest = nearest + math.log(COLOURS) / _SHARPNESS
    return (shrink(torch.cat((distance, nearest), dim=1), 4).clamp(min=0) + 1e-4).sqrt()
