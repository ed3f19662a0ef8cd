"""Base against aligned model on held-out prompts, and the statistics that say by how much."""

from halo_fast.evaluate.stage import evaluate, evaluation_prompts, load_meter
from halo_fast.evaluate.statistics import DEFECTIVE, bootstrap_interval, compare_arms, severity_mitigated, spearman

__all__ = [
    "DEFECTIVE",
    "bootstrap_interval",
    "compare_arms",
    "evaluate",
    "evaluation_prompts",
    "load_meter",
    "severity_mitigated",
    "spearman",
]
