"""Shapes, inputs and the one table of tolerances that the tests of the formulas and of the kernels share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Latents (C, F, H, W) of the models people train.
LATENTS = {
    "cogvideox": (16, 13, 60, 90),
    "wan": (16, 21, 60, 104),
    "wan-720p": (16, 21, 90, 160),
    "hunyuanvideo": (16, 33, 90, 160),
    "ltx": (128, 13, 16, 24),
    "videocrafter2": (4, 16, 40, 64),
}
GRIDS = ((1, 1, 1), (2, 2, 2), (4, 3, 3), (13, 4, 6))

# Small latents with their grids: even, ragged in one or all directions, one position per patch, one frame.
SMALL = (
    ((4, 4, 6, 8), (2, 3, 4)),
    ((3, 5, 7, 9), (2, 3, 4)),
    ((1, 3, 5, 5), (3, 5, 5)),
    ((4, 1, 6, 5), (1, 4, 2)),
    ((2, 5, 4, 31), (1, 1, 3)),
    ((5, 3, 4, 6), (1, 1, 1)),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Relative L2 error of a gradient in its own dtype against float64 on the same rounded inputs: about one last place.
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def table_tolerance(dtype: torch.dtype, elements: int) -> float:
    """Error allowed in a patch's mean, as a share of the mean of its terms' magnitudes (the terms may cancel)."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return 8 * torch.finfo(accumulate).eps * math.sqrt(elements)


def latents(
    shape: tuple[int, ...], samples: int = 4, dtype: torch.dtype = torch.float64, nearness: float = 1e-2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(policy, reference, target) [samples, *shape]; the reference is ``nearness`` away from the policy."""
    generator = torch.Generator().manual_seed(seed)
    policy, step, target = torch.randn(3, samples, *shape, generator=generator, dtype=torch.float64)
    return policy.to(dtype), (policy + nearness * step).to(dtype), target.to(dtype)


def rewards(
    grid: tuple[int, ...], samples: int = 4, dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """(patch_rewards [samples, *grid], video_rewards [samples])."""
    generator = torch.Generator().manual_seed(seed)
    patch = torch.randn(samples, *grid, generator=generator, dtype=torch.float64)
    video = torch.randn(samples, generator=generator, dtype=torch.float64)
    return patch.to(dtype), video.to(dtype)


def boxes(shape: tuple[int, ...], grid: tuple[int, ...]) -> Iterator[tuple[tuple[int, int, int], tuple[slice, ...]]]:
    """Every patch index with its slices of a [C, F, H, W] array, straight from the definition."""
    for index in np.ndindex(*grid):
        sides = zip(index, shape[1:], grid, strict=True)
        yield index, (slice(None), *(slice(k * length // n, (k + 1) * length // n) for k, length, n in sides))


def loop_error(prediction: Tensor, target: Tensor, grid: tuple[int, ...]) -> np.ndarray:
    """E_p [N, f, h, w] by a loop over patches, in float64."""
    o, tau = prediction.detach().double().numpy(), target.double().numpy()
    errors = np.empty((o.shape[0], *grid))
    for sample in range(o.shape[0]):
        for index, box in boxes(o.shape[1:], grid):
            errors[(sample, *index)] = np.mean((o[sample][box] - tau[sample][box]) ** 2)
    return errors


def loop_gradient(grad: Tensor, prediction: Tensor, target: Tensor) -> np.ndarray:
    """2 (o - tau) grad_p / Z_p by a loop over patches, in float64."""
    o, tau, weight = (x.detach().double().numpy() for x in (prediction, target, grad))
    gradient = np.zeros_like(o)
    for sample in range(o.shape[0]):
        for index, box in boxes(o.shape[1:], weight.shape[1:]):
            residual = o[sample][box] - tau[sample][box]
            gradient[sample][box] = 2 * residual * weight[(sample, *index)] / residual.size
    return gradient
