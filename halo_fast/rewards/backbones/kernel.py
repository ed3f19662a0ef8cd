"""The backbone "kernel": frozen frame features of a patch, its surroundings and its clip, and a ridge in closed form.

It is fitted to the labels before the first step, so that a few thousand labelled patches suffice and no step is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halo_fast.files import scratch_tensor
from halo_fast.rewards.backbones.frames import FrameFeatures
from halo_fast.rewards.base import RewardModelConfig
from halo_fast.rewards.clips import LabelledClips
from halo_fast.rewards.pretrained import STAGE_CHANNELS, frame_stages

__all__ = ["KernelRidge", "as_logit"]

_STAGES = sum(STAGE_CHANNELS)
_MATCHED = (1, 2, 4, 6)  # stages whose frames are matched with the next
_REACH = 2  # positions that a match may lie away
_MOTION = 3 * len(_MATCHED)
_FROZEN = 3 * _STAGES + _MOTION  # mean, deviation and change from frame to frame of each channel, and matches
_LOOKS = 4 * _STAGES  # and how far the means spread over a patch
_FRAMES, _TIMES, _SIDE = 16, 8, 8  # frames that are read; cells along time, height and width that are kept of them
_COMPONENTS, _FOURIER = 128, 1280  # principal components; random features of a view
_VIEWS = 3  # patch, surroundings, clip
_WEIGHTS = 5.0, 3.0, 1.0  # in the kernel: of the looks' views, the motion's views, and the place
_PLACE = 6
_NOISE = 3.0  # variance of a label, in units of the kernel
_CLIP_NOISE = 10.0  # variance of what all labels of a clip have in common and its features do not say
_CLAMP = 6.0  # standardised features beyond this are outliers of a few training clips
_EDGE = 0.02
_BATCH = 16
_EXACT = 4096  # labels up to which the ridge is solved directly, in memory


class KernelRidge(nn.Module):
    """Kernel ridge regression on features of all stages of EfficientNet-Lite0 (arXiv:1905.11946), by random features.

    A patch's looks are mean, deviation, change from frame to frame and spread of every channel: standardised, then
    their principal components. Its motion is how far features are from those of the next frame, at the same position
    and at the best of 5 x 5 around it, in the logarithm. With z_v the looks, m_v the motion of the patch, of the 3 x 3
    patches around it, and of its clip, each scaled to mean square 1, the kernel is

        k(p, q) = 5 sum_v exp(-|z_v(p) - z_v(q)|^2 / 2) + 3 sum_v exp(-|m_v(p) - m_v(q)|^2 / 2) + <place(p), place(q)>.

    Exponentials are approximated by cosines of random projections (Rahimi and Recht, 2007), so that cost grows with
    the number of patches and not with its cube. `fit_scores` solves for the weights; steps may train them on.
    """

    negatives = 1
    centre: Tensor
    scale: Tensor
    components: Tensor
    view_scale: Tensor
    look_waves: Tensor
    motion_waves: Tensor
    phases: Tensor

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        video, patch = len(config.video_dimensions), len(config.patch_dimensions)
        self.patch_head = nn.Linear(2 * _VIEWS * _FOURIER + _PLACE, patch)
        self.video_head = nn.Linear(2 * _FOURIER, video)
        for head in (self.patch_head, self.video_head):
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, 0.5)
        self.register_buffer("centre", torch.zeros(_LOOKS + _MOTION))
        self.register_buffer("scale", torch.ones(_LOOKS + _MOTION))
        self.register_buffer("components", torch.zeros(_LOOKS, _COMPONENTS))
        self.register_buffer("view_scale", torch.ones(2, _VIEWS))
        self.register_buffer("look_waves", torch.randn(_VIEWS, _COMPONENTS, _FOURIER))
        self.register_buffer("motion_waves", torch.randn(_VIEWS, _MOTION, _FOURIER))
        self.register_buffer("phases", 2 * math.pi * torch.rand(2, _VIEWS, _FOURIER))

    @torch.no_grad()
    def frozen_features(self, videos: Tensor) -> Tensor:
        """Features of up to sixteen frames enlarged to 224: [N, 2364, up to 8, up to 8, up to 8]."""
        height, width = videos.shape[2:4]
        factor = self.config.features_factor or self.config.spatial_factor
        grid = min(_SIDE, height // factor), min(_SIDE, width // factor)
        clips = []
        for video in videos.split(1):
            parts = [
                _statistics(stage, grid, index in _MATCHED)
                for index, stage in enumerate(frame_stages(video, "bicubic", frames=_FRAMES))
            ]
            frames = torch.cat([torch.cat(part, dim=1) for part in zip(*parts, strict=True)], dim=1).transpose(0, 1)
            clips.append(F.adaptive_avg_pool3d(frames, (min(_TIMES, frames.shape[1]), *grid)))
        return torch.stack(clips)

    def fit_closed_form(self, frozen: Tensor, prompts: Sequence[str], weight: Tensor) -> None:
        """Nothing: what is fitted needs the labels, see `fit_scores`."""

    @torch.no_grad()
    def fit_scores(self, frozen: Tensor, clips: LabelledClips, rows: Tensor, folder: Path | None = None) -> None:
        """Fit everything to the labels of some clips.

        Args:
            frozen: [N, 2364, f', y, x], frozen features of these clips, half precision.
            clips: labelled clips.
            rows: int64 [N], which of them.
            folder: on whose disk what grows with N lies: 43 KB a patch, 74 KB where there are many; None keeps it in
                memory.
        """
        grid = clips.patch_scores.shape[2:]
        size = (clips.videos.shape[1], clips.videos.shape[2], clips.videos.shape[3])
        features = scratch_tensor(folder, (len(rows), *grid, _LOOKS + _MOTION), torch.float32)
        for kept, part in zip(features.split(_BATCH), frozen.split(_BATCH), strict=True):
            kept.copy_(self._pooled(FrameFeatures(part.float(), size), grid))
        self._fit_views(features)
        patches = scratch_tensor(folder, (len(rows), math.prod(grid), self.patch_head.in_features), torch.float32)
        whole = torch.empty(len(rows), 1, self.video_head.in_features)
        for start, part in enumerate(features.split(_BATCH)):
            chosen, views = slice(start * _BATCH, start * _BATCH + len(part)), self._views(part)
            patches[chosen] = self._patch_inputs(views).flatten(1, 3)
            whole[chosen, 0] = self._video_inputs(views)
        for index, scores in enumerate(clips.patch_scores[rows].flatten(2).unbind(1)):
            _solve(self.patch_head, index, patches, scores, folder)
        for index, scores in enumerate(clips.video_scores[rows].unbind(1)):
            _solve(self.video_head, index, whole, scores[:, None], folder)

    def encode(self, videos: Tensor, frozen: Tensor, word_evidence: Tensor | None = None) -> FrameFeatures:
        """The frozen features [N, 2364, f', y, x] and the clips' size."""
        return FrameFeatures(frozen, (videos.shape[1], videos.shape[2], videos.shape[3]))

    def logits(self, features: FrameFeatures, prompts: Sequence[str], grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits of the video scores [N, D] and of the patch scores [N, Q, f, h, w]."""
        views = self._views(self._pooled(features, grid))
        patches = self.patch_head(self._patch_inputs(views)).movedim(-1, 1)
        return as_logit(self.video_head(self._video_inputs(views))), as_logit(patches)

    def video_logits_for(self, features: FrameFeatures, prompts: Sequence[str], others: Tensor) -> Tensor:
        """Video logits [N, M, D]; no prompt is read, so they are the same for all."""
        logits = self.logits(features, prompts, (1, 1, 1))[0]
        return logits[:, None].expand(-1, others.shape[1], -1)

    def _pooled(self, features: FrameFeatures, grid: Sequence[int]) -> Tensor:
        """Features of every patch [N, f, h, w, 3136 + 12]."""
        pool, means = self.config.patches(grid, features.size).pool_complete, features.frozen[:, :_STAGES]
        pooled = pool(features.frozen)
        looks, motion = pooled.split((3 * _STAGES, _MOTION), dim=1)
        spread = (pool(means.square()) - pooled[:, :_STAGES].square()).clamp(min=0).sqrt()
        return torch.cat((looks, spread, (motion.clamp(min=0) + 0.01).log()), dim=1).movedim(1, -1)

    def _fit_views(self, features: Tensor) -> None:
        """Centre, scale and principal components of features [N, f, h, w, 3148], and the scale of each view."""
        parts, count = features.split(_BATCH), features.flatten(0, -2).shape[0]
        self.centre.copy_(_sum(part.flatten(0, -2) for part in parts) / count)
        spread = _sum((part.flatten(0, -2) - self.centre).square() for part in parts) / max(1, count - 1)
        self.scale.copy_(1 / (spread.sqrt() + 1e-3))

        def looks() -> Iterable[Tensor]:
            return (self._standardised(part).flatten(0, -2)[:, :_LOOKS] for part in parts)

        self.components.copy_(_principal(looks, _LOOKS, min(_COMPONENTS, count)))
        self.view_scale.fill_(1)
        squares = [
            torch.stack([view.square().sum(dim=-1).flatten(1).mean(dim=1) for view in self._views(part)]) * len(part)
            for part in parts
        ]
        self.view_scale.copy_((torch.stack(squares).sum(dim=0) / len(features)).clamp(min=1e-12).rsqrt())

    def _standardised(self, features: Tensor) -> Tensor:
        return ((features - self.centre) * self.scale).clamp(-_CLAMP, _CLAMP)

    def _views(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Looks [3, N, f, h, w, 128] and motion [3, N, f, h, w, 12] of the patch, its surroundings and its clip."""
        looks, motion = self._standardised(features).split((_LOOKS, _MOTION), dim=-1)
        views = []
        for own, scale in zip((looks @ self.components, motion), self.view_scale, strict=True):
            around = F.pad(own.movedim(-1, 1), (1, 1, 1, 1, 0, 0), mode="replicate")
            around = F.avg_pool3d(around, (1, 3, 3), stride=1).movedim(1, -1)
            clip = own.mean(dim=(1, 2, 3), keepdim=True).expand_as(own)
            views.append(torch.stack((own, around, clip)) * scale.view(-1, 1, 1, 1, 1, 1))
        return views[0], views[1]

    def _fourier(self, views: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Random features [..., 2 * 1280] of the looks and the motion in a view; their products are its kernels."""
        parts = [
            math.sqrt(2 * weight / _FOURIER) * torch.cos(part[index] @ waves[index] + phases[index])
            for part, waves, phases, weight in zip(
                views, (self.look_waves, self.motion_waves), self.phases, _WEIGHTS[:2], strict=True
            )
        ]
        return torch.cat(parts, dim=-1)

    def _patch_inputs(self, views: tuple[Tensor, Tensor]) -> Tensor:
        """What the patch head reads: [N, f, h, w, 6 * 1280 + 6]."""
        kernels = torch.cat([self._fourier(views, index) for index in range(_VIEWS)], dim=-1)
        place = _places(kernels.shape[1:4]).to(kernels) * math.sqrt(_WEIGHTS[2] / _PLACE)
        return torch.cat((kernels, place.expand(len(kernels), -1, -1, -1, -1)), dim=-1)

    def _video_inputs(self, views: tuple[Tensor, Tensor]) -> Tensor:
        """What the video head reads: [N, 2 * 1280]."""
        return self._fourier((views[0][:, :, 0, 0, 0], views[1][:, :, 0, 0, 0]), _VIEWS - 1)


def _statistics(stage: Tensor, grid: tuple[int, int], matched: bool) -> tuple[Tensor, ...]:
    """What is kept of a stage [f', c, y, x] in each cell of the grid (h, w).

    Mean, deviation and mean change to the next frame of each channel, [f', c, h, w] each; where it is `matched` also
    [f', 3, h, w]: root mean square, and distance to the next frame at the same and at the best position nearby. The
    last frame repeats the changes of the one before; a still does not change.
    """
    motion = stage[:, :0]
    if matched:
        motion = torch.cat((stage.square().mean(dim=1, keepdim=True).sqrt(), _repeated(_distances(stage), stage, 2)), 1)
    finer = [max(cells, side) for cells, side in zip(grid, stage.shape[2:], strict=True)]
    if finer != list(stage.shape[2:]):
        stage, motion = (F.interpolate(x, finer, mode="bilinear") if x.shape[1] else x for x in (stage, motion))
    mean = F.adaptive_avg_pool2d(stage, grid)
    deviation = (F.adaptive_avg_pool2d(stage.square(), grid) - mean.square()).clamp(min=0).sqrt()
    change = _repeated(F.adaptive_avg_pool2d(stage.diff(dim=0).abs(), grid), mean, mean.shape[1])
    motion = F.adaptive_avg_pool2d(motion, grid) if matched else mean[:, :0]
    return mean, deviation, change, motion


def _repeated(changes: Tensor, like: Tensor, channels: int) -> Tensor:
    """Changes of all frames but the last, with the last repeated; zeros for a single frame."""
    if not len(changes):
        return like.new_zeros(1, channels, *like.shape[2:])
    return torch.cat((changes, changes[-1:]))


def _distances(stage: Tensor) -> Tensor:
    """Root mean square distance of [f', c, y, x] to the next frame, at the same and at the best position nearby."""
    here, following = stage[:-1], F.pad(stage[1:], (_REACH,) * 4, mode="replicate")
    height, width = stage.shape[2:]
    distances = [
        (here - following[:, :, row : row + height, column : column + width]).square().mean(dim=1)
        for row in range(2 * _REACH + 1)
        for column in range(2 * _REACH + 1)
    ]
    return torch.stack((distances[len(distances) // 2], torch.stack(distances).amin(dim=0)), dim=1).sqrt()


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """The sum of the rows of all parts, in float64."""
    return torch.stack([part.sum(dim=0, dtype=torch.float64) for part in parts]).sum(dim=0)


def _principal(parts: Callable[[], Iterable[Tensor]], width: int, count: int) -> Tensor:
    """The first `count` principal directions of rows [M, C], by subspace iteration: [C, 128], the others 0."""
    basis = torch.randn(width, count, generator=torch.Generator().manual_seed(0))
    for _ in range(8):
        product = torch.zeros_like(basis)
        for x in parts():
            product += x.T @ (x @ basis)
        basis = torch.linalg.qr(product)[0]
    return F.pad(basis, (0, _COMPONENTS - count))


def _places(grid: Sequence[int]) -> Tensor:
    """Time, row and column of a patch from -1 to 1, and how far it is from the middle, of mean 0: [f, h, w, 6]."""
    lines = [torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1) for count in grid]
    along = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)
    away = along.abs()
    return torch.cat((along, away - away.mean(dim=(0, 1, 2))), dim=-1)


def _solve(head: nn.Linear, row: int, inputs: Tensor, scores: Tensor, folder: Path | None = None) -> None:
    """Fit one row of a head to (score - 1) / 4 by ridge; NaN scores are left out.

    Labels of a clip err together: their covariance is K + s I + c 1 1^T within it. Both sides are multiplied by
    (s I + c 1 1^T)^(-1/2) sqrt(s), which takes a share 1 - sqrt(s / (s + n c)) of the clip's mean away. Then
    w = X^T (X X^T + s I)^-1 t, by whichever of X X^T and X^T X is smaller. Many labels are solved for by conjugate
    gradients, which need no such matrix.

    Args:
        head: maps inputs to shares of the scale from 1 to 5.
        row: of the head.
        inputs: [N, P, K].
        scores: [N, P].
        folder: on whose disk X lies where there are many labels.
    """
    known = ~scores.isnan()
    count = int(known.sum())
    if not count:
        return
    middle = (scores[known].mean() - 1) / 4
    x = scratch_tensor(folder if count > _EXACT else None, (count, inputs.shape[-1]), torch.float32)
    target, begin = torch.empty(count, 1), 0
    for own, score, chosen in zip(inputs, scores, known, strict=True):
        end = begin + int(chosen.sum())
        share = 1 - math.sqrt(_NOISE / (_NOISE + (end - begin) * _CLIP_NOISE)) if end - begin > 1 else 0.0
        for kept, values in ((x, own[chosen]), (target, (score[chosen, None] - 1) / 4 - middle)):
            kept[begin:end] = values - share * values.mean(dim=0)
        begin = end
    weight = _direct(x, target) if count <= _EXACT else _conjugate_gradients(x, target)
    head.weight[row], head.bias[row] = weight[:, 0], middle


def _direct(x: Tensor, target: Tensor) -> Tensor:
    """Weights [K, 1] of the ridge of a target [M, 1] on rows [M, K]."""
    dual = len(x) <= x.shape[1]
    gram = (x @ x.T if dual else x.T @ x).double()
    gram.diagonal().add_(_NOISE)
    wanted = (target if dual else x.T @ target).double()
    weight = torch.cholesky_solve(wanted, torch.linalg.cholesky(gram)).to(x)
    return x.T @ weight if dual else weight


def _conjugate_gradients(x: Tensor, target: Tensor) -> Tensor:
    """The same, by passes over the rows until what is left of X^T t is a millionth (Hestenes and Stiefel, 1952).

    Exact arithmetic ends after as many passes as there are weights, so there are never more.
    """
    parts = x.split(_EXACT)
    weight = torch.zeros(x.shape[1], 1, dtype=torch.float64)
    left = sum(part.T @ known for part, known in zip(parts, target.split(_EXACT), strict=True)).double()
    direction, squared = left.clone(), float(left.square().sum())
    enough = 1e-12 * squared
    for _ in range(x.shape[1]):
        if squared <= enough:
            break
        along = direction.to(x)
        turned = _NOISE * direction + sum(part.T @ (part @ along) for part in parts).double()
        step = squared / float((direction * turned).sum())
        weight += step * direction
        left -= step * turned
        before, squared = squared, float(left.square().sum())
        direction = left + squared / before * direction
    return weight.to(x)


def as_logit(share: Tensor) -> Tensor:
    """logit(x) between 0.02 and 0.98 and its tangents beyond, so that whatever a ridge predicts keeps its order."""
    inside = share.clamp(_EDGE, 1 - _EDGE)
    return inside.logit() + (share - inside) / (_EDGE * (1 - _EDGE))
