"""The figures that results are told in; plain functions of arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halo_fast.rewards.agreement import bootstrap_interval, spearman

__all__ = ["DEFECTIVE", "bootstrap_interval", "compare_arms", "severity_mitigated", "spearman"]

DEFECTIVE = 0.25
"""A patch whose severity is above this is defective."""

_FIDELITY = ("digit", "colour", "motion")


def severity_mitigated(base: float, aligned: float, clean: float) -> float:
    """Share of the base's severity that is gone: 1 - (aligned - clean) / (base - clean).

    Args:
        base: mean severity of the base model's patches.
        aligned: likewise, of the aligned model's.
        clean: what the meter reads on clean clips.

    Returns:
        1 if the aligned model's clips read as clean, below 0 if they are worse than the base's; NaN if the base's are
        no worse than clean ones.
    """
    return 1 - (aligned - clean) / (base - clean) if base > clean else float("nan")


def compare_arms(
    base: Mapping[str, ArrayLike], aligned: Mapping[str, ArrayLike], clean: float, resamples: int, seed: int
) -> dict[str, Any]:
    """Aligned against base model, from what was measured on their clips of the same prompts and seeds.

    Args:
        base: columns as in evaluate/clips.parquet, one row a prompt: severity [N, P]; if known severity_<kind> [N, P],
            digit_correct, colour_correct, motion_correct, fidelity_correct, motion_amount [N].
        aligned: the same columns, the same prompts in the same order.
        clean: the meter's mean severity on clean clips.
        resamples: bootstrap draws over prompts.
        seed: of the draws.

    Returns:
        the figures of metrics.json about defects and, where they were measured, fidelity and motion; a figure that is
        not defined (a share of nothing) is left out.
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
    kinds = [name.removeprefix("severity_") for name in arms[0] if name.startswith("severity_")]
    if kinds:
        metrics["per_kind"] = {
            kind: {
                f"{arm}_rate": _defect_rate(columns[f"severity_{kind}"])
                for arm, columns in zip(("base", "aligned"), arms, strict=True)
            }
            for kind in kinds
        }
    if "fidelity_correct" in arms[0]:
        metrics["fidelity_base"], metrics["fidelity_aligned"] = [float(arm["fidelity_correct"].mean()) for arm in arms]
        metrics["fidelity"] = {
            name: {
                arm: float(columns[f"{name}_correct"].mean())
                for arm, columns in zip(("base", "aligned"), arms, strict=True)
            }
            for name in _FIDELITY
        }
        motion = [float(arm["motion_amount"].mean()) for arm in arms]
        metrics["motion_ratio"] = motion[1] / motion[0] if motion[0] > 0 else float("nan")
    return {name: value for name, value in metrics.items() if not (isinstance(value, float) and np.isnan(value))}


def _defect_rate(severity: NDArray[np.float64]) -> float:
    return float((severity > DEFECTIVE).mean())
