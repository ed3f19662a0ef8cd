"""What a score must beat: the prompt alone, the generator alone, simple statistics of pixels."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.rewards.pretrained import read_text

__all__ = [
    "folds_by_name",
    "frame_statistics",
    "group_means",
    "local_ssim",
    "patch_statistics",
    "predict_ridge",
    "prompt_features",
]


def folds_by_name(names: Sequence[str], count: int, seed: int) -> NDArray[np.int64]:
    """A random fold in [0, count) for each row, the same for rows of the same name, and about equally many names."""
    unique, index = np.unique(np.asarray(names), return_inverse=True)
    return (np.random.default_rng(seed).permutation(len(unique)) % count)[index]


def predict_ridge(
    features: ArrayLike, labels: ArrayLike, folds: ArrayLike, penalties: Sequence[float] = (1, 10, 100, 1000)
) -> NDArray[np.float64]:
    """Ridge regression whose prediction of a row never saw the row's fold; the penalty is chosen within the others.

    Args:
        features: [N, K]; standardised here by the rows that are fitted.
        labels: [N] or [N, D]; every column is fitted by itself, NaN filled with the column's mean.
        folds: [N], fold of each row; at least three.
        penalties: to choose from, by the squared error on one inner fold after another.

    Returns:
        the predictions, in the shape of labels.

    Raises:
        UserError: fewer than three folds.
    """
    if len(np.unique(np.asarray(folds))) < 3:
        raise UserError(
            "expected labelled clips of at least three prompts, which are held out in turn; label clips of more prompts"
        )
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # what varies by less than this is rounding, which standardising would make a feature of
    x, groups = np.asarray(features, dtype=float).round(6), np.asarray(folds)
    columns = np.asarray(labels, dtype=float).reshape(len(x), -1)
    columns = np.where(np.isnan(columns), np.nanmean(columns, axis=0), columns)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge()),
        {"ridge__alpha": penalties},
        scoring="neg_mean_squared_error",
        cv=LeaveOneGroupOut(),
    )
    predictions = np.empty_like(columns)
    for train, test in LeaveOneGroupOut().split(x, groups=groups):
        for column in range(columns.shape[1]):
            search.fit(x[train], columns[train, column], groups=groups[train])
            predictions[test, column] = search.predict(x[test])
    return predictions.reshape(np.shape(labels))


def group_means(labels: NDArray[np.float64], groups: Sequence[str]) -> NDArray[np.float64]:
    """For each row the mean of labels [N, D] over its group, NaN left out."""
    names = np.asarray(groups)
    return np.stack([np.nanmean(labels[names == name], axis=0) for name in names])


def prompt_features(prompts: Sequence[str]) -> NDArray[np.float64]:
    """Embeddings of the prompts by the compact backbone's prompt encoder, [N, 384]."""
    return torch.stack([read_text(prompt) for prompt in prompts]).double().numpy()


def frame_statistics(video: Tensor) -> NDArray[np.float64]:
    """Simple statistics of a clip uint8 [F, H, W, 3]: colour, contrast, saturation, detail, change over time; [12]."""
    x = video.float() / 255
    grey = x.mean(dim=-1)
    change = grey.diff(dim=0).abs() if len(grey) > 1 else torch.zeros_like(grey)
    detail = [grey.diff(dim=axis).abs().mean() for axis in (1, 2)]
    sharp = grey.diff(n=2, dim=2).abs().mean()
    saturation = (x.amax(dim=-1) - x.amin(dim=-1)).mean()
    values = [*x.mean(dim=(0, 1, 2)), *x.std(dim=(0, 1, 2)), saturation, *detail, sharp]
    return torch.stack([*values, change.amax(dim=0).mean(), change.mean()]).double().numpy()


def patch_statistics(videos: Tensor, grid: tuple[int, int, int]) -> NDArray[np.float64]:
    """Simple statistics of every patch of clips uint8 [N, F, H, W, 3] on any grid (f, h, w): [N, P, 14].

    Mean and deviation of each colour, detail, change over time; the same less the clip's mean.
    """
    x = videos.permute(0, 4, 1, 2, 3).float() / 255
    grey = x.mean(dim=1, keepdim=True)
    detail = F.pad(grey.diff(dim=-1).abs(), (0, 1)) + F.pad(grey.diff(dim=-2).abs(), (0, 0, 0, 1))
    change = F.pad(grey.diff(dim=2).abs(), (0, 0, 0, 0, 1, 0)) if videos.shape[1] > 1 else torch.zeros_like(grey)
    mean, square, *rest = (F.adaptive_avg_pool3d(part, grid) for part in (x, x**2, detail, change))
    values = torch.cat((mean, (square - mean**2).clamp(min=0).sqrt()[:, :2], *rest), dim=1).flatten(2)
    return torch.cat((values, values - values.mean(dim=2, keepdim=True)), dim=1).transpose(1, 2).double().numpy()


def local_ssim(first: Tensor, second: Tensor, grid: Sequence[int]) -> NDArray[np.float64]:
    """Structural similarity of two clips (Wang et al., 2004, 10.1109/TIP.2003.819861), averaged over each patch.

    SSIM = (2 m n + c) (2 s_xy + d) / ((m^2 + n^2 + c) (s_x^2 + s_y^2 + d)), c = (0.01 * 255)^2, d = (0.03 * 255)^2, of
    the grey value (mean of the colours) in Gaussian windows of 11 x 11 pixels with deviation 1.5, mirrored at the edge.

    Args:
        first: values from 0 to 255, [F, H, W, 3], sides of at least 6 pixels.
        second: of the same shape.
        grid: patches (f, h, w).

    Returns:
        float64 [f, h, w], at most 1.
    """
    offsets = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = (window / window.sum()).float()

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(F.pad(x, (5, 5, 0, 0), mode="reflect"), kernel.view(1, 1, 1, -1))
        return F.conv2d(F.pad(x, (0, 0, 5, 5), mode="reflect"), kernel.view(1, 1, -1, 1))

    x, y = (clip.float().mean(dim=-1)[:, None] for clip in (first, second))
    m, n = blur(x), blur(y)
    spread = blur(x * x) - m * m + blur(y * y) - n * n
    c, d = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * m * n + c) * (2 * (blur(x * y) - m * n) + d) / ((m * m + n * n + c) * (spread + d))
    return F.adaptive_avg_pool3d(similarity.movedim(0, 1), (grid[0], grid[1], grid[2]))[0].double().numpy()
