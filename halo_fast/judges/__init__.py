"""Judges score whole clips when models are compared: by detectors for each dimension, or end to end by one model."""

from halo_fast.judges.base import ClipJudge, JudgeTable, load_judge
from halo_fast.judges.hacking import Gain, gains
from halo_fast.judges.suites import vbench2_totals, vbench_totals

__all__ = ["ClipJudge", "Gain", "JudgeTable", "gains", "load_judge", "vbench2_totals", "vbench_totals"]
