"""What a score must beat: the prompt alone, the generator alone, simple statistics of pixels."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from halo_fast.rewards.pretrained import read_text

__all__ = ["folds_by_name", "frame_statistics", "group_means", "patch_statistics", "predict_ridge", "prompt_features"]


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
    """
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
