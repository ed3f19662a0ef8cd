"""The trunk of the compact backbone, and the layers that its other parts are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Equalized", "Residual", "Trunk", "shrink"]

_CHANGE_SCALE = 4.0  # changes between frames are small next to the pixels themselves


class Residual(nn.Module):
    """Pre-activation residual block of two 3-D convolutions; it starts as the identity, so no norm is needed.

    Norms over the clip are avoided on purpose: they would make a patch's score depend on how bad the others are.

    Args:
        width: channels.
        separable: a 1 x 3 x 3 and a 3 x 1 x 1 convolution in place of two of 3 x 3 x 3.
    """

    def __init__(self, width: int, separable: bool = True) -> None:
        super().__init__()
        if separable:
            self.first = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
            self.second = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
        else:
            self.first, self.second = (nn.Conv3d(width, width, 3, padding=1) for _ in range(2))
        with torch.no_grad():
            for parameter in self.second.parameters():
                parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, F, H, W] -> the same shape."""
        return x + self.second(F.gelu(self.first(F.gelu(x))))


class Equalized(nn.Linear):
    """Linear layer whose weights are drawn at unit scale, so that many inputs learn no faster than few.

    Equalised learning rate, Karras et al., arXiv:1710.10196, section 4.1.
    """

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inner] -> [..., outer]."""
        return F.linear(x * self.in_features**-0.5, self.weight, self.bias)


class Trunk(nn.Module):
    """Pixels and their changes in time, at a half, a quarter and an eighth of the resolution.

    Args:
        widths: channels of the three scales.
    """

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.stem = nn.Conv3d(9 * 4, fine, (1, 3, 3), padding=(0, 1, 1))
        self.fine = Residual(fine)
        self.shrink_fine = nn.Conv3d(fine, middle, (1, 2, 2), stride=(1, 2, 2))
        self.middle = Residual(middle)
        self.shrink_middle = nn.Conv3d(middle, coarse, (1, 2, 2), stride=(1, 2, 2))
        self.coarse = Residual(coarse, separable=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [N, 3, F, H, W] in [-1, 1] -> maps [N, c, F, H/s, W/s] at s = 2, 4, 8."""
        change = F.pad(pixels[:, :, 1:] - pixels[:, :, :-1], (0, 0, 0, 0, 1, 1))
        x = torch.cat((pixels, _CHANGE_SCALE * change[:, :, :-1], _CHANGE_SCALE * change[:, :, 1:]), dim=1)
        x = F.pixel_unshuffle(x.transpose(1, 2), 2).transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
        fine = F.gelu(self.fine(self.stem(x)))
        middle = F.gelu(self.middle(self.shrink_fine(fine)))
        return fine, middle, F.gelu(self.coarse(self.shrink_middle(middle)))


def shrink(x: Tensor, factor: int) -> Tensor:
    """Mean over factor x factor positions of [N, c, F, H, W]."""
    if x.shape[-1] % factor or x.shape[-2] % factor:
        raise ValueError(f"x: expected sides that are multiples of {factor}, got {list(x.shape[-2:])}")
    return F.avg_pool2d(x.flatten(1, 2), factor).unflatten(1, x.shape[1:3])
