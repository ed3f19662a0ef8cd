"""What identifies a model: its weights, settings and vocabularies."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from halo_fast.files import hash_tensors

__all__ = ["fingerprint"]

# where a model was loaded from and by what, which does not change what it computes
_ORIGIN = ("transformers_version", "dtype", "torch_dtype", "architectures")


def fingerprint(parts: Sequence[Any]) -> str:
    """SHA-256 over the weights and settings of modules and the vocabularies of tokenizers, in hexadecimal.

    Args:
        parts: modules, tokenizers, and None for a part that a pipeline does without.
    """
    described: list[str | Mapping[str, Tensor]] = []
    for part in parts:
        if isinstance(part, nn.Module):
            # the normalisation of latents and the number of heads are settings that no weight shows
            described.append(json.dumps(_settings(part), sort_keys=True, default=str))
            described.append(_tensors(sorted(part.state_dict().items())))
        elif part is not None:
            described.append(json.dumps([sorted(part.get_vocab().items()), part.model_max_length]))
    return hash_tensors(*described)


def _tensors(state: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a state by name; of a quantised one, those that it consists of."""
    found: dict[str, Tensor] = {}
    for name, value in state:
        inside = getattr(value, "__tensor_flatten__", None)
        found |= {f"{name}.{inner}": getattr(value, inner) for inner in inside()[0]} if inside else {name: value}
    return found


def _settings(module: Any) -> dict[str, Any]:
    """The configuration of a diffusers or transformers model, without its origin."""
    config: Any = getattr(module, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else config if isinstance(config, Mapping) else {}
    return {name: value for name, value in settings.items() if not name.startswith("_") and name not in _ORIGIN}
