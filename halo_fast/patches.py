"""Which pixels and frames a latent patch covers, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool3d

__all__ = ["PIXELS", "LatentFactors", "PatchGrid", "guard_band"]


class LatentFactors(NamedTuple):
    """How latents lie on a clip: the last four arguments of `PatchGrid`.

    Args:
        spatial_factor: pixels a latent position along rows and columns.
        temporal_factor: frames a latent frame.
        causal: whether the first latent frame covers one frame alone.
        padding: latent frames in front that cover no frame of the clip.
    """

    spatial_factor: int = 1
    temporal_factor: int = 1
    causal: bool = False
    padding: int = 0

    @classmethod
    def of_sizes(cls, clip: tuple[int, int], latent: tuple[int, int]) -> LatentFactors:
        """Those of a clip (frames, height) whose latents have a size (frames, height) and no padding.

        Where both readings of the frames fit, that one is taken whose temporal factor is a power of 2.

        Raises:
            ValueError: neither fits.
        """
        frames, length = clip[0], latent[0]
        causal = length > 1 and (frames - 1) % (length - 1) == 0
        if not causal and frames % length:
            raise ValueError(f"{frames} frames cannot be divided among {length} latent frames without padding")
        if causal and frames % length == 0:
            after_first, each = (frames - 1) // (length - 1), frames // length
            causal = after_first.bit_count() == 1 or each.bit_count() != 1
        time = (frames - 1) // (length - 1) if causal else frames // length
        return cls(clip[1] // latent[1], time, causal)


PIXELS = LatentFactors()
"""Patches that divide the clip itself, where no latents are known."""


@dataclass(frozen=True)
class PatchGrid:
    """A patch grid on the latent of a video, with the pixel box of every patch.

    Args:
        grid: (f, h, w) patches along latent frames, rows, columns; patch k of n along a latent side of length L covers
            latent positions floor(k L/n) .. floor((k+1) L/n).
        num_frames: frames of the video.
        height: pixels, a multiple of spatial_factor.
        width: pixels, a multiple of spatial_factor.
        spatial_factor: pixels a latent position along rows and columns; 8 for Wan, CogVideoX and HunyuanVideo, 32 for
            LTX.
        temporal_factor: frames a latent frame; 4 for Wan, CogVideoX and HunyuanVideo, 8 for LTX, 1 for image
            autoencoders.
        causal: whether the first latent frame covers one frame, and each other one temporal_factor of them. Then
            num_frames is 1 more than a multiple of temporal_factor, else a multiple.
        padding: latent frames in front that cover no frame of the video, such as the one that CogVideoX 1.5 adds to
            an odd number.

    Raises:
        ValueError: naming the side that does not fit.
    """

    grid: tuple[int, int, int]
    num_frames: int
    height: int
    width: int
    spatial_factor: int = 8
    temporal_factor: int = 4
    causal: bool = True
    padding: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.grid, tuple | list) or len(self.grid) != 3:
            raise ValueError(f"grid must be (frames, rows, columns); got {self.grid!r}")
        if any(isinstance(count, float) for count in self.grid):
            raise ValueError(f"grid must be three integers; got {self.grid!r}")
        for name in ("num_frames", "height", "width", "spatial_factor", "temporal_factor"):
            if isinstance(getattr(self, name), float):
                raise ValueError(f"{name} must be an integer; got {getattr(self, name)!r}")
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("height", "width"):
            if getattr(self, name) % self.spatial_factor:
                raise ValueError(
                    f"{name} must be a multiple of {self.spatial_factor}; got {getattr(self, name)}: crop the video"
                )
        alone = int(self.causal)
        if (self.num_frames - alone) % self.temporal_factor:
            raise ValueError(
                f"num_frames must be a multiple of {self.temporal_factor}{' plus 1' * alone}; got {self.num_frames}: "
                "trim the video, or check temporal_factor and causal"
            )
        for side, count, length in zip(("frames", "rows", "columns"), self.grid, self.latent_shape, strict=True):
            if not 1 <= count <= length:
                raise ValueError(f"grid must have 1 to {length} patches along {length} latent {side}; got {count}")
        if self.latent_edges(0)[1] <= self.padding:
            raise ValueError(
                f"grid must have fewer patches along latent frames; got {self.grid[0]}, of which the first lies in the "
                f"padding of {self.padding} before {self.latent_shape[0] - self.padding} latent frames"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(F, H, W) of the latent."""
        frames = (self.num_frames - self.causal) // self.temporal_factor + self.causal + self.padding
        return frames, self.height // self.spatial_factor, self.width // self.spatial_factor

    def latent_edges(self, axis: int) -> list[int]:
        """Latent positions where patches begin and end along ``axis`` (0 frames, 1 rows, 2 columns): n + 1 numbers."""
        count, length = self.grid[axis], self.latent_shape[axis]
        return [k * length // count for k in range(count + 1)]

    def pixel_edges(self, axis: int) -> list[int]:
        """Frames or pixels where patches begin and end along ``axis``: n + 1 numbers."""
        edges = self.latent_edges(axis)
        if axis:
            return [edge * self.spatial_factor for edge in edges]
        first = self.temporal_factor - 1 if self.causal else 0
        return [max((edge - self.padding) * self.temporal_factor - first, 0) for edge in edges]

    def latent_box(self, patch: Sequence[int]) -> tuple[slice, slice, slice]:
        """The latent positions of patch (i, j, k), as slices of a [..., F, H, W] tensor."""
        return self._box(patch, [self.latent_edges(axis) for axis in range(3)])

    def pixel_box(self, patch: Sequence[int]) -> tuple[slice, slice, slice]:
        """The frames, rows and columns of patch (i, j, k), as slices of a [..., frames, height, width] tensor."""
        return self._box(patch, [self.pixel_edges(axis) for axis in range(3)])

    def _box(self, patch: Sequence[int], edges: list[list[int]]) -> tuple[slice, slice, slice]:
        if len(patch) != 3 or any(not 0 <= index < count for index, count in zip(patch, self.grid, strict=True)):
            raise ValueError(f"patch must lie within the grid {self.grid}; got {tuple(patch)}")
        frames, rows, columns = (slice(line[index], line[index + 1]) for line, index in zip(edges, patch, strict=True))
        return frames, rows, columns

    def patch_of(self, frame: int, row: int, column: int) -> tuple[int, int, int]:
        """The patch (i, j, k) that covers a pixel of a frame; ValueError outside the video."""
        found = []
        for axis, place in enumerate((frame, row, column)):
            edges = self.pixel_edges(axis)
            if not 0 <= place < edges[-1]:
                raise ValueError(f"pixel ({frame}, {row}, {column}) lies outside the video {self._pixels()}")
            found.append(sum(edge <= place for edge in edges) - 1)
        return found[0], found[1], found[2]

    def _pixels(self) -> tuple[int, int, int]:
        return self.num_frames, self.height, self.width

    def pool(self, heatmap: Tensor) -> Tensor:
        """Mean of a heatmap over the pixel box of each patch; differentiable.

        Args:
            heatmap: [..., T, Y, X], float, of any resolution: its cells divide the video evenly, and a cell counts by
                the share of its area inside the patch. NaN cells are unlabelled and left out.

        Returns:
            [..., f, h, w], summed in float32 or float64 and returned in the heatmap's dtype. A patch of unlabelled
            cells alone is NaN.

        Raises:
            ValueError: another dtype or shape.
        """
        _check_maps("heatmap", heatmap)
        # bfloat16 cannot hold pixel indices, nor float16 a sum over pixels
        wide = heatmap.to(torch.promote_types(heatmap.dtype, torch.float32))
        labelled = ~wide.isnan()
        with torch.autocast(heatmap.device.type, enabled=False):
            sums = self._overlap_sum(torch.where(labelled, wide, 0.0))
            areas = self._overlap_sum(labelled.to(wide.dtype))
        # 0 / 0 gives the same NaN, but its gradient would be NaN in the cells of every other patch
        mean = torch.where(areas > 0, sums / torch.where(areas > 0, areas, 1.0), torch.nan)
        return mean.to(heatmap.dtype)

    def pool_complete(self, maps: Tensor) -> Tensor:
        """`pool` of maps without a NaN, such as features: the same means for less than half of the work.

        Args:
            maps: [..., T, Y, X], float. A NaN or an infinity spreads to patches that it is not in.

        Returns:
            [..., f, h, w], as `pool`.

        Raises:
            ValueError: another dtype or shape.
        """
        _check_maps("maps", maps)
        wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
        with torch.autocast(maps.device.type, enabled=False):
            areas = self._overlap_sum(wide.new_ones(wide.shape[-3:]))
            return (self._overlap_sum(wide) / areas).to(maps.dtype)

    def _overlap_sum(self, heatmap: Tensor) -> Tensor:
        """Sum of the cells [..., T, Y, X] of each patch, weighted by the area inside it: [..., f, h, w]."""
        frames, rows, columns = (
            self._overlap(axis, heatmap.shape[axis - 3]).to(heatmap.device, heatmap.dtype) for axis in range(3)
        )
        # along T first, on flattened frames: no axis has to move
        sums = (frames @ heatmap.flatten(-2)).unflatten(-1, heatmap.shape[-2:])
        return rows @ sums @ columns.T

    def _overlap(self, axis: int, cells: int) -> Tensor:
        """How many pixels of an axis each patch has in common with each of its cells, [patches, cells] in float64."""
        edges = torch.tensor(self.pixel_edges(axis), dtype=torch.float64)
        borders = torch.arange(cells + 1, dtype=torch.float64) * self._pixels()[axis] / cells
        ends = torch.minimum(edges[1:, None], borders[1:])
        return (ends - torch.maximum(edges[:-1, None], borders[:-1])).clamp(min=0)

    def spread(self, values: Tensor) -> Tensor:
        """Each patch's value [..., f, h, w] at every pixel that it covers: [..., frames, height, width]."""
        if tuple(values.shape[-3:]) != tuple(self.grid):
            raise ValueError(f"values must end in the grid {self.grid}; got {tuple(values.shape)}")
        for axis in range(3):
            edges = torch.tensor(self.pixel_edges(axis), device=values.device)
            values = values.repeat_interleave(edges.diff(), dim=axis - 3)
        return values


def guard_band(labels: Tensor, width: int = 1, tolerance: float = 0.0) -> Tensor:
    """``labels`` [..., f, h, w] with NaN (unlabelled) wherever a label within ``width`` patches differs by > tolerance.

    An autoencoder's receptive field mixes neighbouring patches, so labels at the border of a mask are unreliable. Not
    differentiable.

    Args:
        labels: float; NaN labels stay NaN and are ignored in comparisons.
        width: in patches, at least 0.
        tolerance: largest difference that leaves a label as it is.

    Raises:
        ValueError: naming the argument.
    """
    if width < 0:
        raise ValueError(f"width must be at least 0 patches; got {width}")
    if labels.ndim < 3 or not labels.is_floating_point():
        raise ValueError(f"labels must be float [..., f, h, w]; got {labels.dtype} {tuple(labels.shape)}")
    maps = labels.detach().reshape(-1, 1, *labels.shape[-3:])
    missing = maps.isnan()
    window = 2 * width + 1
    highest = max_pool3d(maps.masked_fill(missing, -torch.inf), window, stride=1, padding=width)
    lowest = -max_pool3d((-maps).masked_fill(missing, -torch.inf), window, stride=1, padding=width)
    guarded = torch.where(highest - lowest > tolerance, torch.nan, maps)
    return guarded.reshape(labels.shape)


def _check_maps(name: str, maps: Tensor) -> None:
    if maps.ndim < 3 or not maps.is_floating_point() or 0 in maps.shape[-3:]:
        raise ValueError(
            f"{name} must be float [..., T, Y, X] with no empty side; got {maps.dtype} {tuple(maps.shape)}"
        )
