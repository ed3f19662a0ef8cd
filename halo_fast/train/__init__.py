"""Training a LoRA, or a whole network, on preference pairs."""

from halo_fast.train.adapters import adapters_off
from halo_fast.train.config import TrainConfig
from halo_fast.train.loop import Fit, fit

__all__ = ["Fit", "TrainConfig", "adapters_off", "fit"]
