"""The trained adapter under the names other programs read."""

from collections.abc import Mapping

from torch import Tensor

from halo_fast.config import TrainConfig
from halo_fast.families import Family
from halo_fast.train.adapters import ADAPTER

__all__ = ["export"]


def export(family: Family, parameters: Mapping[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """The LoRA as diffusers names it; alpha / rank goes into B, so that no loader needs to know it."""
    scale = config.lora_alpha / config.rank
    return {
        f"{family.lora_prefix}.{name.replace(f'.{ADAPTER}.', '.')}": (
            value.detach().cpu() * (scale if ".lora_B." in name else 1.0)
        )
        for name, value in parameters.items()
    }
