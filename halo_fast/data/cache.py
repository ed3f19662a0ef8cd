"""What training reads instead of running the autoencoder and the text encoder: latents and trimmed text embeddings.

A file's name is the hash of what it was made from (clip and autoencoder, or prompt and text encoder), so none is ever
stale and each is made once.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from halo_fast.config import Config
from halo_fast.data.clips import read_clip
from halo_fast.data.pairs import Pair
from halo_fast.families import Family, load, source
from halo_fast.runs import Run, hash_file, hash_text, progress, read_table, replacing, write_parquet, write_safetensors

__all__ = ["CachedPairs", "build_cache", "fingerprint"]


def build_cache(config: Config, run: Run) -> None:
    """Latents of every paired clip and conditions of every paired prompt, as files named by content, and their index.

    Latents that generation left behind are taken as they are; a clip without is encoded from its mp4.

    Raises:
        UserError: a clip that cannot be read, named.
    """
    import pyarrow

    clips_folder, pairs_file = run.require("generate"), run.require("pairs/pairs.parquet")
    name = config.pretrained_model_name_or_path
    inputs = {"clips": clips_folder, "pairs": pairs_file, "pretrained_model_name_or_path": source(name)}
    with run.stage("cache", config.cache, inputs) as stage:
        if stage.done:
            return
        pairs = read_table(pairs_file).to_pylist()
        paired = {pair[side] for pair in pairs for side in ("clip_a", "clip_b")}
        clips = read_table(clips_folder / "clips.parquet").to_pylist()
        clips = [clip for clip in clips if clip["clip_id"] in paired]
        prompts = list(dict.fromkeys(pair["prompt"] for pair in pairs))
        family = load(name)
        vae, text = fingerprint([family.vae]), fingerprint(family.text_parts)
        rows = []
        for clip in progress(clips, len(clips), "cache: latents"):
            file = _cache_latents(family, vae, clips_folder, clip, stage.folder)
            rows.append({"kind": "latents", "id": clip["clip_id"], "file": file, "content_hash": Path(file).stem})
        for prompt in progress(prompts, len(prompts), "cache: text"):
            key = hash_text(f"prompt {prompt} text {text}")
            file = f"text/{key}.safetensors"
            if not (stage.folder / file).exists():
                write_safetensors(stage.folder / file, family.encode_prompts([prompt])[0])
            rows.append({"kind": "text", "id": prompt, "file": file, "content_hash": key})
        write_parquet(stage.folder / "index.parquet", pyarrow.Table.from_pylist(rows))
        stage.finish({"clips": len(clips), "prompts": len(prompts)})


def _cache_latents(family: Family, vae: str, clips_folder: Path, clip: dict[str, Any], folder: Path) -> str:
    video = clips_folder / clip["video"]
    latents = clips_folder / clip["latents"] if clip["latents"] else None
    key = hash_text(f"latents {hash_file(latents)}" if latents else f"clip {hash_file(video)} vae {vae}")
    file = folder / "latents" / f"{key}.safetensors"
    if not file.exists():
        if latents is None:
            write_safetensors(file, {"latents": family.encode(read_clip(video)[None])[0].cpu()})
        else:
            with replacing(file) as temporary:
                _link(latents, temporary)
    return file.relative_to(folder).as_posix()


def _link(source_file: Path, target: Path) -> None:
    try:
        os.link(source_file, target)
    except OSError:
        # Not every file system has hard links.
        shutil.copyfile(source_file, target)


def fingerprint(parts: Sequence[Any]) -> str:
    """SHA-256 over the weights and settings of modules and the vocabularies of tokenizers, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            # Wan's normalisation of latents, or the number of heads, is nowhere in the weights.
            digest.update(json.dumps(_settings(part), sort_keys=True, default=str).encode())
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif part is not None:
            digest.update(json.dumps([sorted(part.get_vocab().items()), part.model_max_length]).encode())
    return digest.hexdigest()


def _settings(module: Any) -> dict[str, Any]:
    """The configuration of a diffusers or transformers model, without where it was loaded from and by what."""
    config: Any = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else config if isinstance(config, Mapping) else {}
    told = ("transformers_version", "dtype", "torch_dtype", "architectures")
    return {name: value for name, value in settings.items() if not name.startswith("_") and name not in told}


class CachedPairs(Sequence[Pair]):
    """The pairs of a run directory, read from its cache one at a time.

    Args:
        run: whose stages `pairs` and `cache` have finished.
    """

    def __init__(self, run: Run) -> None:

        self._rows: list[dict[str, Any]] = read_table(run.require("pairs/pairs.parquet")).to_pylist()
        folder = run.require("cache")
        index = read_table(folder / "index.parquet").to_pylist()
        self._files = {(row["kind"], row["id"]): folder / row["file"] for row in index}

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
