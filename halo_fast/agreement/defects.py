"""Patch defects counted: how many, how severe, how large, for how long, where, when and of which kind.

Pure functions of severities [N, f, h, w]. A patch is defective where its severity is above `DEFECTIVE`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halo_fast.agreement.arms import DEFECTIVE
from halo_fast.agreement.paired import Paired, Parts, paired_mean, paired_ratio

__all__ = ["ClipDefects", "clip_defects", "defect_rates", "defect_sizes", "lost_patches"]


class ClipDefects(NamedTuple):
    """What is counted of every clip, [N] each.

    Args:
        defective: defective patches.
        severity: sum of the severities of all patches.
        deep: sum of the severities of the defective ones.
        regions: defects: regions of defective patches that touch side by side within one layer of time.
        runs: spells: successive layers in which a place stays defective; one that the clip's end cuts counts as it is.
    """

    defective: NDArray[np.int64]
    severity: NDArray[np.float64]
    deep: NDArray[np.float64]
    regions: NDArray[np.int64]
    runs: NDArray[np.int64]


def clip_defects(severity: ArrayLike) -> ClipDefects:
    """Count the defects of every clip.

    Args:
        severity: of all patches, [N, f, h, w] in [0, 1].
    """
    from scipy.ndimage import label

    values = np.asarray(severity, dtype=np.float64)
    bad = values > DEFECTIVE
    # neighbours within a layer only: patches that touch at corners, and layers, do not join
    within = np.zeros((3, 3, 3), dtype=bool)
    within[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    starts = bad & ~np.concatenate((np.zeros_like(bad[:, :1]), bad[:, :-1]), axis=1)
    return ClipDefects(
        defective=bad.sum(axis=(1, 2, 3)),
        severity=values.sum(axis=(1, 2, 3)),
        deep=np.where(bad, values, 0).sum(axis=(1, 2, 3)),
        regions=np.array([label(clip, within)[1] for clip in bad], dtype=np.int64),
        runs=starts.sum(axis=(1, 2, 3)),
    )


def defect_sizes(base: ArrayLike, aligned: ArrayLike, resamples: int = 1000, seed: int = 0) -> dict[str, Paired]:
    """Rate, severity, area and persistence of the defects of both arms, with paired intervals.

    Args:
        base: severities of the base's clips, [N, f, h, w].
        aligned: of the aligned model's clips of the same prompts and seeds.
        resamples: draws of the bootstrap over pairs.
        seed: of the draws.

    Returns:
        defective patches: share of all patches.
        mean severity: over all patches.
        severity of a defect: mean over defective patches.
        area of a defect: share of the frame that a region of defective patches covers in its layer.
        persistence: layers of time through which a place stays defective, mean over spells.
        clips with a defect: share of clips.
    """
    shape = np.asarray(base).shape
    patches = np.full(shape[0], float(np.prod(shape[1:])))
    ones = np.ones(shape[0])
    frame = float(shape[2] * shape[3])

    def parts(severity: ArrayLike) -> dict[str, Parts]:
        found = clip_defects(severity)
        return {
            "defective patches": (found.defective, patches),
            "mean severity": (found.severity, patches),
            "severity of a defect": (found.deep, found.defective),
            "area of a defect": (found.defective, found.regions * frame),
            "persistence": (found.defective, found.runs),
            "clips with a defect": (found.defective > 0, ones),
        }

    arms = parts(base), parts(aligned)
    return {name: paired_ratio(arms[0][name], arms[1][name], resamples, seed) for name in arms[0]}


def defect_rates(
    base: ArrayLike,
    aligned: ArrayLike,
    kinds: tuple[Mapping[str, ArrayLike], Mapping[str, ArrayLike]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Paired]]:
    """Share of defective patches by place, by time and, where they are known, by kind, with paired intervals.

    Args:
        base: severities of the base's clips, [N, f, h, w].
        aligned: of the aligned model's clips of the same prompts and seeds.
        kinds: for either arm its severities by kind, each of the same shape; a defective patch counts for the kind
            that is severest in it.
        resamples: draws of the bootstrap over pairs.
        seed: of the draws.

    Returns:
        the rates under "time" (layers), "place" (rows and columns of the grid, all layers together) and "kind".
    """
    bad = [np.asarray(arm) > DEFECTIVE for arm in (base, aligned)]
    _, f, h, w = bad[0].shape

    def rate(part: list[NDArray[np.bool_]]) -> Paired:
        base_share, aligned_share = (one.reshape(len(one), -1).mean(axis=1) for one in part)
        return paired_mean(base_share, aligned_share, resamples, seed)

    tables = {
        "time": {f"layer {time + 1}": rate([arm[:, time] for arm in bad]) for time in range(f)},
        "place": {
            f"row {row + 1}, column {column + 1}": rate([arm[:, :, row, column] for arm in bad])
            for row in range(h)
            for column in range(w)
        },
    }
    if kinds is not None and kinds[0]:
        names = list(kinds[0])
        severest = [np.stack([np.asarray(arm[name]) for name in names]).argmax(axis=0) for arm in kinds]
        tables["kind"] = {
            name: rate([arm & (kind == index) for arm, kind in zip(bad, severest, strict=True)])
            for index, name in enumerate(names)
        }
    return tables


def lost_patches(video_gaps: ArrayLike, patch_gaps: ArrayLike, tie: float = 0.0) -> dict[str, NDArray[np.float64]]:
    """What a preference between two videos cannot see: patches in which its winner is the worse one.

    Args:
        video_gaps: reward of one video less that of the other, [N]; a pair whose gap is 0 or NaN has no winner.
        patch_gaps: likewise of every patch, [N, ...].
        tie: patches whose gap is no more than this tie, as does NaN.

    Returns:
        shares of each pair, [N], NaN without a winner: lost and tied patches, and 1 or 0 for a pair whose winner loses
        any patch, or more than it wins.
    """
    gaps = np.asarray(video_gaps, dtype=np.float64)
    patches = np.asarray(patch_gaps, dtype=np.float64).reshape(len(gaps), -1)
    decided = np.abs(patches) > tie
    lost = (decided & (np.sign(patches) == -np.sign(gaps)[:, None])).mean(axis=1)
    tied = 1 - decided.mean(axis=1)
    shares = {
        "lost patches": lost,
        "tied patches": tied,
        "winners that lose a patch": (lost > 0).astype(np.float64),
        "winners that lose most": (lost > 1 - tied - lost).astype(np.float64),
    }
    winner = np.abs(gaps) > 0
    return {name: np.where(winner, share, np.nan) for name, share in shares.items()}
