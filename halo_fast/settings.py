"""Bounds of settings, checked alike for the command line and for Python."""

from collections.abc import Mapping
from typing import Any

__all__ = ["check_numbers"]


_MAY_BE_ZERO = {
    *("seed", "video_steps", "patch_steps", "lora_rank", "rank", "lr_warmup_steps", "reference_draws", "max_retries"),
    *("off_policy_pairs", "off_policy_fresh", "heldout_pairs", "examples"),
}


def check_numbers(values: Mapping[str, Any], place: str = "") -> None:
    """Counts are positive and shares are shares; ValueError naming the setting."""
    for name, value in values.items():
        if isinstance(value, dict):
            check_numbers(value, f"{place}{name}.")
        elif isinstance(value, int) and not isinstance(value, bool) and value < (least := name not in _MAY_BE_ZERO):
            raise ValueError(f"{place}{name}: expected at least {int(least)}, got {value}")
        elif name.endswith("_share") and not 0 <= value <= 1:
            raise ValueError(f"{place}{name}: expected a share from 0 to 1, got {value}")
