"""Figures of a base and an aligned model on the same prompts and seeds; plain functions of arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halo_fast.agreement.figures import bootstrap_interval, spearman
from halo_fast.agreement.paired import read_in_both
from halo_fast.data.tables import EvaluatedRow

__all__ = ["DEFECTIVE", "arm_columns", "compare_arms", "compare_rewards", "rates_by_kind", "severity_mitigated"]

DEFECTIVE = 0.25
"""A patch whose severity is above this is defective; severity is in [0, 1]."""


def severity_mitigated(base: float, aligned: float, clean: float) -> float:
    """Share of the base's severity that is gone: 1 - (aligned - clean) / (base - clean).

    Args:
        base: mean severity of the base model's patches.
        aligned: likewise, of the aligned model's.
        clean: mean severity that the meter reads on clean clips.

    Returns:
        1 if the aligned model's clips read as clean, below 0 if they are worse than the base's; NaN if the base's are
        no worse than clean ones.
    """
    return 1 - (aligned - clean) / (base - clean) if base > clean else float("nan")


def rates_by_kind(severity: ArrayLike, by_kind: ArrayLike) -> NDArray[np.float64]:
    """Share of all patches that are defective, by kind; the shares add up to the share of defective patches.

    A defective patch counts for the kind that is severest in it. A meter's estimates of rare kinds are biased towards
    0, so their patches may count for another kind.

    Args:
        severity: of each patch, [...] in [0, 1].
        by_kind: its split by kind, [K, ...].

    Returns:
        the shares, [K].
    """
    severity, by_kind = np.asarray(severity), np.asarray(by_kind)
    kinds = np.arange(len(by_kind)).reshape(-1, *[1] * severity.ndim)
    return ((by_kind.argmax(axis=0) == kinds) & (severity > DEFECTIVE)).reshape(len(by_kind), -1).mean(axis=1)


def arm_columns(rows: Sequence[EvaluatedRow], arm: str) -> dict[str, NDArray[Any]]:
    """What was measured of an arm's clips, by the names of columns: [N], or [N, P] of patches.

    Args:
        rows: of both arms; a prompt's clips are in the same place among those of their arm.
        arm: "base" or "aligned".

    Returns:
        severity, severity_<kind> and the meter's other readings in float64; video_<dimension> and patch_<dimension> in
        float32, as the reward model gives them.
    """
    own = [row for row in rows if row.arm == arm]
    columns: dict[str, NDArray[Any]] = {"severity": np.array([row.severity for row in own])}
    for prefix, name, kind in (
        ("severity_", "kinds", np.float64), ("", "readings", np.float64),
        ("video_", "video_scores", np.float32), ("patch_", "patch_scores", np.float32),
    ):  # fmt: skip
        found = [getattr(row, name) for row in own]
        columns |= {f"{prefix}{key}": np.array([one[key] for one in found], dtype=kind) for key in found[0]}
    return columns


def compare_arms(
    base: Mapping[str, ArrayLike], aligned: Mapping[str, ArrayLike], clean: float, resamples: int, seed: int
) -> dict[str, Any]:
    """Defects of aligned against base model and, where they were measured, fidelity and motion.

    Args:
        base: a meter's readings, one row a prompt: severity [N, P]; if known severity_<kind> [N, P] and, [N] each,
            fidelity_correct, <aspect>_correct of what a prompt names, and motion_amount; NaN where nothing was read.
        aligned: the same columns, the same prompts in the same order.
        clean: the meter's mean severity on clean clips.
        resamples: bootstrap draws over prompts.
        seed: of the draws.

    Returns:
        the figures by name; one that is not defined (a share of nothing, an interval over one prompt) is left out.
    """
    arms = [{name: np.asarray(values, dtype=np.float64) for name, values in arm.items()} for arm in (base, aligned)]
    severity = [arm["severity"].reshape(len(arm["severity"]), -1) for arm in arms]
    means = [values.mean(axis=1) for values in severity]

    def mitigated(rows: NDArray[np.int64] | slice) -> float:
        return severity_mitigated(means[0][rows].mean(), means[1][rows].mean(), clean)

    metrics: dict[str, Any] = {
        "num_prompts": len(severity[0]),
        "base_defect_rate": _defect_rate(severity[0]),
        "aligned_defect_rate": _defect_rate(severity[1]),
        "base_severity": float(means[0].mean()),
        "aligned_severity": float(means[1].mean()),
        "meter_clean_reading": float(clean),
        "mitigated": mitigated(slice(None)),
    }
    if np.isfinite(metrics["mitigated"]):
        metrics["mitigated_interval"] = list(bootstrap_interval(mitigated, len(means[0]), resamples, seed))
    metrics |= _per_kind(arms)
    if "fidelity_correct" in arms[0]:
        metrics |= _fidelity(arms, resamples, seed)
    if "motion_amount" in arms[0]:
        metrics |= _motion(arms, resamples, seed)
    return _defined(metrics)


def compare_rewards(
    base: Mapping[str, ArrayLike], aligned: Mapping[str, ArrayLike], severity: str | None = None
) -> dict[str, Any]:
    """What the reward model gives both arms, and how far it agrees with the meter.

    Args:
        base: columns video_<dimension> [N] and patch_<dimension> [N, P].
        aligned: likewise, of the aligned model; both may lack patches.
        severity: the column of a meter that is independent of the reward model, [N, P]; None if there is none.

    Returns:
        reward_base and reward_aligned, the mean of every column; with a meter, patch_spearman and
        patch_spearman_aligned: the rank correlation of patch quality and -severity. The sounder the aligned clips,
        the more of the latter is noise. One is left out that has no ranks, as the meter reads the same everywhere.
    """
    arms = {"base": base, "aligned": aligned}
    metrics: dict[str, Any] = {
        f"reward_{name}": {
            key: float(np.asarray(arm[key]).mean()) for key in arm if key.startswith(("video_", "patch_"))
        }
        for name, arm in arms.items()
    }
    if severity is not None and "patch_quality" in base:
        metrics["patch_spearman"], metrics["patch_spearman_aligned"] = (
            spearman(arm["patch_quality"], -np.asarray(arm[severity])) for arm in arms.values()
        )
    return _defined(metrics)


def _defined(metrics: dict[str, Any]) -> dict[str, Any]:
    """The figures without those that are NaN or hold one."""
    undefined = {name for name, value in metrics.items() if isinstance(value, float | list) and np.isnan(value).any()}
    return {name: value for name, value in metrics.items() if name not in undefined}


def _per_kind(arms: list[dict[str, NDArray[np.float64]]]) -> dict[str, Any]:
    """Mean severity and share of defective patches by kind, base and aligned; nothing where no kinds were measured."""
    kinds = [name.removeprefix("severity_") for name in arms[0] if name.startswith("severity_")]
    if not kinds:
        return {}
    per_kind: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for arm, columns in zip(("base", "aligned"), arms, strict=True):
        by_kind = np.stack([columns[f"severity_{kind}"] for kind in kinds])
        for kind, mean, rate in zip(kinds, by_kind, rates_by_kind(columns["severity"], by_kind), strict=True):
            per_kind[kind] |= {f"{arm}_severity": float(mean.mean()), f"{arm}_rate": float(rate)}
    return {"per_kind": per_kind}


def _fidelity(arms: list[dict[str, NDArray[np.float64]]], resamples: int, seed: int) -> dict[str, Any]:
    """Share of clips that show what the prompt names, base and aligned, over the prompts where a meter reads both."""
    correct = read_in_both(arms, "fidelity_correct")
    if not correct.size:
        return {}

    def gain(rows: NDArray[np.int64] | slice) -> float:
        return float(correct[1, rows].mean() - correct[0, rows].mean())

    aspects = [name.removesuffix("_correct") for name in arms[0] if name.endswith("_correct")]
    aspects.remove("fidelity")
    shares = {name: read_in_both(arms, f"{name}_correct") for name in aspects}
    return {
        "fidelity_base": float(correct[0].mean()),
        "fidelity_aligned": float(correct[1].mean()),
        "fidelity_difference": gain(slice(None)),
        "fidelity_difference_interval": list(bootstrap_interval(gain, correct.shape[1], resamples, seed)),
        "fidelity": {
            name: {"base": float(share[0].mean()), "aligned": float(share[1].mean())}
            for name, share in shares.items()
            if share.size
        },
    }


def _motion(arms: list[dict[str, NDArray[np.float64]]], resamples: int, seed: int) -> dict[str, Any]:
    """How much the aligned model's clips move, the base's being 1, over the prompts where a meter reads both."""
    motion = read_in_both(arms, "motion_amount")
    if not motion.size:
        return {}

    def motion_ratio(rows: NDArray[np.int64] | slice) -> float:
        moved = motion[0, rows].mean()
        return float(motion[1, rows].mean() / moved) if moved > 0 else float("nan")

    metrics: dict[str, Any] = {"motion_ratio": motion_ratio(slice(None))}
    if np.isfinite(metrics["motion_ratio"]):
        interval = bootstrap_interval(motion_ratio, motion.shape[1], resamples, seed)
        metrics["motion_ratio_interval"] = list(interval)
    return metrics


def _defect_rate(severity: NDArray[np.float64]) -> float:
    return float((severity > DEFECTIVE).mean())
