"""Clips, prompts, preference pairs and caches."""

from halo_fast.data.cache import CachedPairs
from halo_fast.data.clips import read_clip, write_clip
from halo_fast.data.pairs import Pair

__all__ = ["CachedPairs", "Pair", "read_clip", "write_clip"]
