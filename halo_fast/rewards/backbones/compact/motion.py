"""Net motion of a clip, read off the correlation of its features with themselves some frames later."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SHIFTS", "Motion", "motion_correlation"]

_SIDE = 16  # positions a side at which motion is followed
_REACH = 4  # largest shift that is searched: a quarter of the picture
_CHANNELS = 6
SHIFTS = (2 * _REACH + 1) ** 2
"""Shifts that are searched at each of two lags."""


class Motion(nn.Module):
    """A projection of the fine features, their motion correlation, and an MLP on it.

    Args:
        inner: channels of the fine features.
        hidden: length of the result.
    """

    def __init__(self, inner: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Conv3d(inner, _CHANNELS, 1)
        self.mlp = nn.Sequential(nn.Linear(2 * SHIFTS, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, fine: Tensor) -> Tensor:
        """[N, inner, F, y, x] -> [N, hidden]."""
        return self.mlp(motion_correlation(self.project(fine)))


def motion_correlation(features: Tensor) -> Tensor:
    """Cross-correlation over space of features with themselves later, for every shift up to a quarter of the picture.

    corr[d] = mean_t sum_x f(t, x) f(t + lag, x + d) / power, at lags of a quarter and half of the clip. The mean over
    time is subtracted first, and with it everything that stands still. The peak's shift is the net displacement. By
    the Fourier transform, padded so that nothing wraps around.

    Args:
        features: [N, c, F, y, x].

    Returns:
        [N, 2 * 81]; zeros for a still.
    """
    x = F.adaptive_avg_pool3d(features, (features.shape[2], _SIDE, _SIDE))
    x = x - x.mean(dim=2, keepdim=True)
    frames, padded, window = x.shape[2], (_SIDE + _REACH,) * 2, 2 * _REACH + 1
    power = x.square().sum(dim=(1, 2, 3, 4))[:, None] / frames
    spectrum, shifts = torch.fft.rfft2(x, s=padded), []
    for lag in (max(1, frames // 4), max(1, frames // 2)):
        if frames == 1:
            shifts.append(x.new_zeros(len(x), SHIFTS))
            continue
        product = (spectrum[:, :, :-lag].conj() * spectrum[:, :, lag:]).mean(dim=2).sum(dim=1)
        shift = torch.fft.irfft2(product, s=padded).roll((_REACH, _REACH), (-2, -1))
        shifts.append(shift[:, :window, :window].flatten(1) / (power + 1e-2))
    return torch.cat(shifts, dim=1)
