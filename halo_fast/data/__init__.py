"""Clips, preference pairs and caches."""

from halo_fast.data.cache import CachedPairs, build_cache
from halo_fast.data.clips import read_clip, write_clip
from halo_fast.data.pairs import Pair, build_pairs

__all__ = ["CachedPairs", "Pair", "build_cache", "build_pairs", "read_clip", "write_clip"]
