"""How VBench and VBench-2.0 make totals of the scores of their dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["VBENCH2_PARTS", "VBENCH_DIMENSIONS", "Range", "vbench2_totals", "vbench_totals"]


class Range(NamedTuple):
    """How a dimension of VBench counts.

    Args:
        part: "quality" or "semantic".
        low: score that counts as 0.
        high: score that counts as 1.
        weight: within its part.
    """

    part: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


VBENCH_DIMENSIONS: Mapping[str, Range] = {
    "subject_consistency": Range("quality", 0.1462, 1.0),
    "background_consistency": Range("quality", 0.2615, 1.0),
    "temporal_flickering": Range("quality", 0.6293, 1.0),
    "motion_smoothness": Range("quality", 0.706, 0.9975),
    "dynamic_degree": Range("quality", weight=0.5),
    "aesthetic_quality": Range("quality"),
    "imaging_quality": Range("quality"),
    "object_class": Range("semantic"),
    "multiple_objects": Range("semantic"),
    "human_action": Range("semantic"),
    "color": Range("semantic"),
    "spatial_relationship": Range("semantic"),
    "scene": Range("semantic", 0.0, 0.8222),
    "appearance_style": Range("semantic", 0.0009, 0.2855),
    "temporal_style": Range("semantic", 0.0, 0.364),
    "overall_consistency": Range("semantic", 0.0, 0.364),
}
"""Bounds and weights of VBench's dimensions, as github.com/Vchitect/VBench has them in scripts/constant.py."""

_PART_WEIGHTS = {"quality": 4.0, "semantic": 1.0}

VBENCH2_PARTS: Mapping[str, Sequence[str]] = {
    "creativity": ("Composition", "Diversity"),
    "commonsense": ("Instance_Preservation", "Motion_Rationality"),
    "controllability": (
        "Camera_Motion", "Complex_Landscape", "Complex_Plot", "Dynamic_Attribute", "Dynamic_Spatial_Relationship",
        "Human_Interaction", "Motion_Order_Understanding",
    ),
    "human_fidelity": ("Human_Anatomy", "Human_Clothes", "Human_Identity"),
    "physics": ("Material", "Mechanics", "Multi-View_Consistency", "Thermotics"),
}  # fmt: skip
"""Dimensions of each part of VBench-2.0, as in VBench-2.0/scripts/constant.py of the same repository."""


def vbench_totals(scores: Mapping[str, float]) -> dict[str, float]:
    """VBench's quality, semantic and total score (Huang et al., arXiv:2311.17982).

    A part is sum_d w_d (s_d - low_d) / (high_d - low_d) / sum_d w_d over its dimensions; the total is
    (4 quality + semantic) / 5. A score beyond its bounds is not cut, as in VBench's own script.

    Args:
        scores: of the dimensions of VBENCH_DIMENSIONS, as VBench reports them, from 0 to 1.

    Returns:
        "quality", "semantic" and "total"; what a dimension is missing for is left out.
    """
    parts = {}
    for part in _PART_WEIGHTS:
        ranges = {name: one for name, one in VBENCH_DIMENSIONS.items() if one.part == part}
        if all(name in scores for name in ranges):
            weighted = [r.weight * (scores[name] - r.low) / (r.high - r.low) for name, r in ranges.items()]
            parts[part] = sum(weighted) / sum(r.weight for r in ranges.values())
    if len(parts) == len(_PART_WEIGHTS):
        weights = sum(_PART_WEIGHTS.values())
        parts["total"] = sum(_PART_WEIGHTS[part] * value for part, value in parts.items()) / weights
    return parts


def vbench2_totals(scores: Mapping[str, float]) -> dict[str, float]:
    """VBench-2.0's scores of its five parts and the total (Zheng et al., arXiv:2503.21755): plain means of means.

    Args:
        scores: of the dimensions of VBENCH2_PARTS, as VBench-2.0 reports them, from 0 to 1.

    Returns:
        a score for each part and "total"; what a dimension is missing for is left out.
    """
    parts = {
        part: sum(scores[name] for name in names) / len(names)
        for part, names in VBENCH2_PARTS.items()
        if all(name in scores for name in names)
    }
    if len(parts) == len(VBENCH2_PARTS):
        parts["total"] = sum(parts.values()) / len(parts)
    return parts
