"""What was trained, under diffusers' names, with metadata that says what it is."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.families import Denoiser, Family, family_of
from halo_fast.files import versions, write_json

if TYPE_CHECKING:
    from halo_fast.train.config import TrainConfig

__all__ = [
    "LORA_FILE",
    "METADATA_FILE",
    "export_lora",
    "load_all_trained",
    "load_trained",
    "metadata",
    "read_trained",
    "save_network",
    "trained_network",
    "trained_values",
]

LORA_FILE, METADATA_FILE = "pytorch_lora_weights.safetensors", "halo_fast.json"


def export_lora(family: Denoiser, parameters: Mapping[str, Tensor], config: "TrainConfig") -> dict[str, Tensor]:
    """The LoRA under diffusers' names, on the CPU; alpha / rank is multiplied into B, so that no loader needs it.

    Args:
        family: gives the prefix of its network.
        parameters: of the adapter, under peft's names.
        config: gives rank and alpha.
    """
    return {
        _diffusers_name(family, name): value.detach().cpu() * _scale(name, config) for name, value in parameters.items()
    }


def trained_values(
    family: Denoiser, parameters: Mapping[str, Tensor], trained: Mapping[str, Tensor], config: "TrainConfig"
) -> dict[str, Tensor]:
    """The values that parameters have in a trained LoRA, or at rank 0 in a network's weights.

    For a LoRA this is the inverse of `export_lora`, up to rounding where alpha / rank is no power of 2.

    Args:
        family: gives the prefix of its network.
        parameters: of an adapter, under peft's names, or of the network.
        trained: under diffusers' names, or under those of the network.
        config: gives rank and alpha.

    Raises:
        UserError: a LoRA of other layers or of another rank, or another network.
    """
    names = {name: _diffusers_name(family, name) if config.rank else name for name in parameters}
    found = {name: list(value.shape) for name, value in trained.items()}
    expected = {names[name]: list(value.shape) for name, value in parameters.items()}
    wrong = [name for name, size in expected.items() if found.get(name) != size]
    wrong += [name for name in found if config.rank and name not in expected]
    if wrong:
        raise UserError(
            f"train: expected a start with {wrong[0]} of {expected.get(wrong[0], 'no size')}, got "
            f"{found.get(wrong[0], 'none')}; start from a training with the same train.rank and train.target_modules"
        )
    return {name: trained[key] / _scale(name, config) for name, key in names.items()}


def _diffusers_name(family: Denoiser, name: str) -> str:
    # training imports this module
    from halo_fast.train.adapters import ADAPTER

    return f"{family.lora_prefix}.{name.replace(f'.{ADAPTER}.', '.')}"


def _scale(name: str, config: "TrainConfig") -> float:
    return config.lora_alpha / config.rank if ".lora_B." in name else 1.0


def metadata(family: Denoiser, base_model: str, config: "TrainConfig", steps: int) -> dict[str, str]:
    """What a trained file says about itself, for `write_safetensors`: text alone, equal for equal trainings.

    Args:
        family: what was trained; its pipeline's class decides how the layers are called elsewhere.
        base_model: config.pretrained_model_name_or_path.
        config: the settings; `alpha` is included though it is folded into the weights already.
        steps: optimiser steps done.
    """
    return {
        "format": "pt",
        "base_model": base_model,
        "pipeline": type(family.pipeline or family).__name__,
        "network": family.network,
        "objective": json.dumps(config.objective, sort_keys=True),
        "rank": str(config.rank),
        "alpha": str(config.lora_alpha),
        "alpha_folded": "true",
        "steps": str(steps),
        "halo_fast": versions()["halo_fast"],
    }


def save_network(folder: Path, family: Denoiser, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a network trained at rank 0 as diffusers does, for `from_pretrained`, with `metadata` in halo_fast.json.

    Args:
        folder: where config, weights and metadata go.
        family: gives the network's class and configuration.
        weights: its whole state dict; nothing of it is copied.
        metadata: from the function of that name.
    """
    from accelerate import init_empty_weights

    model: Any = family.transformer
    # FSDP2 puts a class of its own in front of the model's
    network: Any = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
    with init_empty_weights():
        empty: Any = network.from_config(model.config)
    empty.load_state_dict(weights, assign=True)
    empty.save_pretrained(folder)
    write_json(folder / METADATA_FILE, dict(metadata))


def trained_network(folder: Path) -> str:
    """The part of the pipeline that was trained.

    Args:
        folder: with pytorch_lora_weights.safetensors, or a network that `save_network` wrote.
    """
    from safetensors import safe_open

    if not (folder / LORA_FILE).exists():
        return str(json.loads((folder / METADATA_FILE).read_text())["network"])
    with safe_open(folder / LORA_FILE, framework="pt") as file:
        return str(file.metadata()["network"])


def load_trained(family: Family, folder: Path) -> None:
    """Load a trained LoRA or network into the family's network.

    Args:
        family: the base.
        folder: with pytorch_lora_weights.safetensors, or a network that `save_network` wrote.
    """
    weights = read_trained(family, folder)
    if (folder / LORA_FILE).exists():
        family.load_lora(weights)
    else:
        family.transformer.load_state_dict(weights)


def read_trained(family: Family, folder: Path) -> dict[str, Tensor]:
    """A trained LoRA under diffusers' names, or the weights of a trained network.

    Args:
        family: gives the network's class.
        folder: as for `load_trained`.
    """
    from safetensors.torch import load_file

    if (folder / LORA_FILE).exists():
        return load_file(folder / LORA_FILE)
    model: Any = family.transformer
    weights: dict[str, Tensor] = type(model).from_pretrained(folder).state_dict()
    return weights


def load_all_trained(family: Family, folders: Sequence[Path]) -> None:
    """Load what was trained into the networks that it belongs to.

    Args:
        family: the base; a single result was made for its network.
        folders: of each result, as for `load_trained`.
    """
    for folder in folders:
        part = family if len(folders) == 1 else family_of(family.pipeline, trained_network(folder))
        load_trained(part, folder)
