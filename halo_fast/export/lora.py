"""What was trained, under diffusers' names, with metadata that says what it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from halo_fast.families import Denoiser, Family
from halo_fast.files import versions, write_json

if TYPE_CHECKING:
    from halo_fast.train.config import TrainConfig

__all__ = ["LORA_FILE", "METADATA_FILE", "export_lora", "load_trained", "metadata", "save_network", "trained_network"]

LORA_FILE, METADATA_FILE = "pytorch_lora_weights.safetensors", "halo_fast.json"


def export_lora(family: Denoiser, parameters: Mapping[str, Tensor], config: "TrainConfig") -> dict[str, Tensor]:
    """The LoRA under diffusers' names, on the CPU; alpha / rank is multiplied into B, so that no loader needs it.

    Args:
        family: gives the prefix of its network.
        parameters: of the adapter, under peft's names.
        config: gives rank and alpha.
    """
    # training imports this module
    from halo_fast.train.adapters import ADAPTER

    scale = config.lora_alpha / config.rank
    return {
        f"{family.lora_prefix}.{name.replace(f'.{ADAPTER}.', '.')}": (
            value.detach().cpu() * (scale if ".lora_B." in name else 1.0)
        )
        for name, value in parameters.items()
    }


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
    from safetensors.torch import load_file

    if (folder / LORA_FILE).exists():
        family.load_lora(load_file(folder / LORA_FILE))
    else:
        model: Any = family.transformer
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())
