"""Marked damage in still pictures from pretrained features alone: how much of the patch task they hold already."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from halo_fast.rewards.compact import frame_network
from halo_fast.runs import progress

__all__ = ["MarkHead", "cross_validated_patches", "stage_features"]

_PICTURE = 224
_BATCH = 16
_CLAMP = 6.0  # standardised features beyond this are outliers of a few training pictures


class MarkHead(nn.Module):
    """Logit of damage for each patch, from its features, their mean and spread over the picture, and its neighbours."""

    def __init__(self, channels: int, width: int = 64, dropout: float = 0.3) -> None:
        super().__init__()
        self.local, self.whole = nn.Linear(channels, width), nn.Linear(2 * channels, width)
        self.neighbours, self.out = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, 1)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.neighbours.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, C, h, w] -> logits [N, h, w]."""
        x = features.movedim(1, -1)
        whole = torch.cat((x.mean(dim=(1, 2)), x.std(dim=(1, 2))), dim=1)
        hidden = F.gelu(self.local(self.dropout(x)) + self.whole(self.dropout(whole))[:, None, None])
        hidden = hidden + F.gelu(self.neighbours(hidden.movedim(-1, 1))).movedim(1, -1)
        return self.out(self.dropout(hidden))[..., 0]


@torch.no_grad()
def stage_features(pictures: Tensor, grid: tuple[int, int]) -> Tensor:
    """Features of every stage of EfficientNet-Lite0 (Tan and Le, 2019) over a grid, float16 [N, C, h, w].

    Stages finer than the grid give the mean, the largest and the deviation within each patch, so that a mark smaller
    than the patch is not averaged away.

    Args:
        pictures: uint8 [N, H, W, 3].
        grid: patches along height and width.
    """
    network, rows = frame_network(), []
    for part in pictures.split(_BATCH):
        x = F.interpolate(
            part.permute(0, 3, 1, 2).float() / 255, (_PICTURE, _PICTURE), mode="bicubic", antialias=True
        ).clamp(0, 1)
        x = network._swish(network._bn0(network._conv_stem((x - 0.498) / 0.502)))
        stages: list[Tensor] = []
        for block in network._blocks:
            before, x = x, block(x)
            if x.shape[1] != before.shape[1] or x.shape[2] != before.shape[2]:
                stages.append(before)
        rows.append(torch.cat([_pooled(stage, grid) for stage in [*stages[1:], x]], dim=1).half())
    return torch.cat(rows)


def _pooled(stage: Tensor, grid: tuple[int, int]) -> Tensor:
    if stage.shape[-1] <= grid[-1]:
        return F.interpolate(stage, grid, mode="bilinear")
    mean = F.adaptive_avg_pool2d(stage, grid)
    spread = (F.adaptive_avg_pool2d(stage**2, grid) - mean**2).clamp(min=0).sqrt()
    return torch.cat((mean, F.adaptive_max_pool2d(stage, grid), spread), dim=1)


def cross_validated_patches(
    pictures: Tensor, shares: Tensor, grid: tuple[int, int], folds: NDArray[np.int64], seed: int, steps: int = 200
) -> NDArray[np.float64]:
    """Damage of each patch [N, P] by heads that never saw a picture of its fold, averaged over the eight mirrorings.

    Args:
        pictures: uint8 [N, H, W, 3], square.
        shares: [N, P] marked share of each patch.
        grid: patches along height and width, square.
        folds: [N].
        seed: of weights and batches.
        steps: optimiser steps of each fold's head.
    """
    looks = torch.stack([stage_features(turned, grid) for turned in _turnings(pictures, (1, 2))])
    targets = torch.stack(list(_turnings(shares.unflatten(1, grid), (1, 2))))
    result = np.empty(shares.shape)
    for fold in progress(np.unique(folds), len(np.unique(folds)), "marks"):
        train, test = (torch.from_numpy(np.flatnonzero(rows)) for rows in (folds != fold, folds == fold))
        known = looks[0, train].float()
        centre, scale = known.mean(dim=(0, 2, 3), keepdim=True), known.std(dim=(0, 2, 3), keepdim=True) + 1e-3

        def standard(features: Tensor, centre: Tensor = centre, scale: Tensor = scale) -> Tensor:
            return ((features.float() - centre) / scale).clamp(-_CLAMP, _CLAMP)

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = MarkHead(looks.shape[2])
            optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
            for _ in range(steps):
                rows, turn = train[torch.randint(len(train), (_BATCH,))], torch.randint(len(looks), (_BATCH,))
                loss = F.binary_cross_entropy_with_logits(head(standard(looks[turn, rows])), targets[turn, rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        head.eval()
        with torch.no_grad():
            turned = [head(standard(looks[turn, test])) for turn in range(len(looks))]
        back = [_turned_back(logits, turn) for turn, logits in enumerate(turned)]
        result[test.numpy()] = torch.stack(back).mean(dim=0).flatten(1).numpy()
    return result


def _turnings(images: Tensor, axes: tuple[int, int]) -> Iterator[Tensor]:
    """The eight mirrorings and turns of the square."""
    for turn in range(8):
        x = images.transpose(*axes) if turn & 4 else images
        x = x.flip(axes[1]) if turn & 1 else x
        yield (x.flip(axes[0]) if turn & 2 else x).contiguous()


def _turned_back(maps: Tensor, turn: int) -> Tensor:
    x = maps.flip(1) if turn & 2 else maps
    x = x.flip(2) if turn & 1 else x
    return x.transpose(1, 2) if turn & 4 else x
