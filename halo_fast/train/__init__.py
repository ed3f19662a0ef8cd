"""Training: a LoRA aligned by Gran-DPO on preference pairs."""

from halo_fast.train.adapters import adapters_off
from halo_fast.train.loop import Fit, fit

__all__ = ["Fit", "adapters_off", "fit"]
