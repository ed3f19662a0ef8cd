"""What training reads instead of running the autoencoder and the text encoder: latents and text embeddings.

In image-to-video also what the network sees of first frames. A file is named by the hash of what it was made from: clip
and autoencoder, or prompt and text encoder. So a file is never out of date, and each is made once.
"""

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TypeVar, overload

import torch
from torch import Tensor

from halo_fast.data.clips import first_frame, read_clip
from halo_fast.data.pairs import Pair
from halo_fast.data.tables import CacheRow, ClipRow, PairRow, read_rows
from halo_fast.errors import UserError, check_finite, first_line
from halo_fast.families.base import Family
from halo_fast.families.fingerprint import fingerprint
from halo_fast.files import hash_file, hash_tensors, hash_text, replacing, write_safetensors

__all__ = ["CachedPairs", "images_cache", "latents_cache", "prompts_cache"]

_SAME_PICTURE = 8.0  # of 255, root mean square: what a lossy file changes is less, another moment of a scene is more

Read = TypeVar("Read")


def latents_cache(family: Family, source: Path, folder: Path) -> Callable[[Sequence[ClipRow]], list[CacheRow]]:
    """A function that keeps the latents of clips, rows of clips.parquet, and gives a row for each.

    Latents that generation has left are taken, others are encoded from the video. The function raises UserError for a
    clip that cannot be read, or whose latents are not finite.

    Args:
        family: the model.
        source: the folder of clips.parquet.
        folder: where latents/HASH.safetensors are written, each with "latents" float32 [*latent_shape].
    """
    from safetensors.torch import load_file

    vae = fingerprint([family.vae])

    def keep(clip: ClipRow) -> CacheRow:
        video, latents = source / clip.video, source / clip.latents if clip.latents else None
        key = hash_text(f"latents {hash_file(latents)}" if latents else f"clip {hash_file(video)} vae {vae}")
        row = CacheRow("latents", clip.clip_id, f"latents/{key}.safetensors", key)
        file = folder / row.file
        if not file.exists():
            if latents is None:
                encoded = family.encode(read_clip(video)[None]).cpu()
                check_finite(encoded, [f"clip {clip.clip_id}"], "latents of the autoencoder", "use another precision")
                write_safetensors(file, {"latents": encoded[0]})
            else:
                kept = load_file(latents)["latents"]
                check_finite(kept[None], [f"clip {clip.clip_id} ({latents})"], "latents", "generate it again")
                with replacing(file) as temporary:
                    _link(latents, temporary)
        return row

    return lambda clips: [keep(clip) for clip in clips]


def prompts_cache(family: Family, folder: Path) -> Callable[[Sequence[str]], list[CacheRow]]:
    """A function that keeps the conditions of prompts, and gives a row for each.

    Args:
        family: the model.
        folder: where text/HASH.safetensors are written.
    """
    text = fingerprint(family.text_parts)

    def keep(prompt: str) -> CacheRow:
        key = hash_text(f"prompt {prompt} text {text}")
        row = CacheRow("text", prompt, f"text/{key}.safetensors", key)
        if not (folder / row.file).exists():
            write_safetensors(folder / row.file, family.encode_prompts([prompt])[0])
        return row

    return lambda prompts: [keep(prompt) for prompt in prompts]


def images_cache(
    family: Family, videos: Mapping[str, Path], folder: Path, num_frames: int | None
) -> Callable[[Sequence[PairRow]], list[CacheRow]]:
    """A function that keeps the conditions of the first frames of pairs, and gives a row for each pair.

    It raises UserError for a pair whose clips begin with different frames.

    Args:
        family: an image-to-video model.
        videos: file of each clip.
        folder: where image/HASH.safetensors are written.
        num_frames: of the clips; None where they have lengths of their own.
    """
    parts = fingerprint(family.image_parts)

    def keep(pair: PairRow) -> CacheRow:
        picture, other = (first_frame(videos[clip]) for clip in (pair.clip_a, pair.clip_b))
        _check_same(picture, other, pair)
        content = hash_tensors({"picture": picture})
        length = num_frames or len(read_clip(videos[pair.clip_a]))
        key = hash_text(f"image {content} frames {length} parts {parts}")
        row = CacheRow("image", pair.pair_id, f"image/{key}.safetensors", key)
        if not (folder / row.file).exists():
            write_safetensors(folder / row.file, family.encode_images(picture[None], length)[0])
        return row

    return lambda pairs: [keep(pair) for pair in pairs]


def _check_same(picture: Tensor, other: Tensor, pair: PairRow) -> None:
    """Raise unless both clips of a pair begin with one picture, up to what a file loses."""
    off = (picture.float() - other.float()).square().mean().sqrt().item() if picture.shape == other.shape else 255.0
    if off > _SAME_PICTURE:
        raise UserError(
            f"pairs: clips {pair.clip_a} and {pair.clip_b} begin with different frames, {off:.0f} of 255 apart, "
            f"expected at most {_SAME_PICTURE:.0f}; image-to-video compares clips of one picture: pair others, or "
            "train a text-to-video model"
        )


def _copies(row: PairRow) -> int:
    """The weight, rounded up for as large a share of all names as its fraction is."""
    whole = math.floor(row.weight)
    return whole + (int(hash_text(row.pair_id)[:8], 16) < (row.weight - whole) * 2**32)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # not every file system has hard links
        shutil.copyfile(source, target)


class CachedPairs(Sequence[Pair]):
    """Preference pairs on disk, read one at a time.

    Args:
        pairs: parquet table of the pairs. One of weight 2 is there twice; of a fraction the pair's name decides.
        cache: folder of their latents and text embeddings, with index.parquet.
        seeds: of clips, by clip_id, whose noise is known.
    """

    def __init__(self, pairs: Path | str, cache: Path | str, seeds: Mapping[str, int] | None = None) -> None:
        pairs, cache = Path(pairs), Path(cache)
        rows = read_rows(pairs, PairRow)
        self._seeds = seeds or {}
        self._rows = [row for row in rows for _ in range(_copies(row))]
        self._files = {(row.kind, row.id): cache / row.file for row in read_rows(cache / "index.parquet", CacheRow)}
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def prompts(self) -> list[str]:
        """The prompt of each pair."""
        return [row.prompt for row in self._rows]

    @property
    def clips(self) -> list[tuple[str, str]]:
        """The clip_ids of each pair."""
        return [(row.clip_a, row.clip_b) for row in self._rows]

    def where(self, mask: Sequence[bool]) -> "CachedPairs":
        """The pairs at which the mask is true."""
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
        rewards = torch.tensor([row.patch_rewards_a, row.patch_rewards_b])
        a, b = (self._seeds.get(clip) for clip in (row.clip_a, row.clip_b))
        latents = [self._read("latents", clip)["latents"] for clip in (row.clip_a, row.clip_b)]
        _check_one_size(row, [tuple(one.shape) for one in latents])
        return Pair(
            latents=torch.stack(latents),
            conditions=self._read("text", row.prompt) | self._image(row),
            patch_rewards=rewards.view(2, *row.grid),
            video_rewards=torch.tensor([row.video_reward_a, row.video_reward_b]),
            seeds=None if a is None or b is None else (a, b),
        )

    def _image(self, row: PairRow) -> dict[str, Tensor]:
        """Conditions of the pair's first frame; none in text-to-video."""
        return self._read("image", row.pair_id) if ("image", row.pair_id) in self._files else {}

    def size(self, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape of the latents of a pair's clips, and its grid; only headers of files are read.

        Raises:
            UserError: a file that cannot be read, or clips of two sizes.
        """
        row = self._rows[index]
        clips = (row.clip_a, row.clip_b)
        for clip in clips:
            if clip not in self._shapes:
                self._shapes[clip] = self._opened("latents", clip, _latents_shape)
        _check_one_size(row, [self._shapes[clip] for clip in clips])
        return self._shapes[row.clip_a], tuple(row.grid)

    def _read(self, kind: str, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return self._opened(kind, name, load_file)

    def _opened(self, kind: str, name: str, read: Callable[[Path], Read]) -> Read:
        from safetensors import SafetensorError

        if (kind, name) not in self._files:
            raise UserError(f"cache: holds no {kind} of {name!r}; run `halo cache` with this config again")
        file = self._files[kind, name]
        try:
            return read(file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{file}: missing or damaged ({first_line(error)}); delete it and run `halo cache` again"
            ) from error


def _latents_shape(file: Path) -> tuple[int, ...]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return tuple(opened.get_slice("latents").get_shape())


def _check_one_size(row: PairRow, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise unless both clips of a pair have latents of one shape."""
    if shapes[0] != shapes[1]:
        raise UserError(
            f"pairs: clips {row.clip_a} and {row.clip_b} of pair {row.pair_id} have latents {list(shapes[0])} and "
            f"{list(shapes[1])}, expected one size; bring both to it (imports.size crop), or leave the pair out"
        )
