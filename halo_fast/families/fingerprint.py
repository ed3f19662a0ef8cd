"""What identifies a model: its weights, settings and vocabularies."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["fingerprint"]


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
