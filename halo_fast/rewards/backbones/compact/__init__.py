"""The compact backbone, made for a CPU; see `halo_fast.rewards.backbones.compact.network`."""

from halo_fast.rewards.backbones.compact.network import Compact, CompactFeatures

__all__ = ["Compact", "CompactFeatures"]
