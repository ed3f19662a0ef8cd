"""Vision-language models as backbones; see `halo_fast.rewards.backbones.vlm.network`."""

from halo_fast.rewards.backbones.vlm.network import VisionLanguage

__all__ = ["VisionLanguage"]
