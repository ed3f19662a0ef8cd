"""What training reads instead of running the autoencoder and the text encoder: latents and trimmed text embeddings.

A file's name is the hash of what it was made from (clip and autoencoder, or prompt and text encoder), so none is ever
stale and each is made once.
"""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from halo_fast.data.pairs import Pair
from halo_fast.files import read_table

__all__ = [
    "CachedPairs",
]


class CachedPairs(Sequence[Pair]):
    """Preference pairs on disk, read one at a time.

    Args:
        pairs: parquet table of the pairs.
        cache: folder of their latents and text embeddings, with index.parquet.
    """

    def __init__(self, pairs: Path, cache: Path) -> None:
        self._rows: list[dict[str, Any]] = read_table(pairs).to_pylist()
        index = read_table(cache / "index.parquet").to_pylist()
        self._files = {(row["kind"], row["id"]): cache / row["file"] for row in index}

    @property
    def prompts(self) -> list[str]:
        """The prompt of each pair."""
        return [row["prompt"] for row in self._rows]

    def where(self, mask: Sequence[bool]) -> "CachedPairs":
        """The pairs whose place in the mask is true."""
        chosen = copy(self)
        chosen._rows = [row for row, wanted in zip(self._rows, mask, strict=True) if wanted]
        return chosen

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._rows[index]
        rewards = torch.tensor([row["patch_rewards_a"], row["patch_rewards_b"]])
        return Pair(
            latents=torch.stack([self._read("latents", row[side])["latents"] for side in ("clip_a", "clip_b")]),
            conditions=self._read("text", row["prompt"]),
            patch_rewards=rewards.view(2, *row["grid"]),
            video_rewards=torch.tensor([row["video_reward_a"], row["video_reward_b"]]),
        )

    def _read(self, kind: str, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self._files[kind, name])
