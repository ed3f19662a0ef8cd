"""Training: a LoRA aligned by Gran-DPO on preference pairs."""

from halo_fast.train.adapters import adapters_off
from halo_fast.train.loop import Fit, dry_run, fit, train

__all__ = ["Fit", "adapters_off", "dry_run", "fit", "train"]
