"""What was trained under the names that other programs read, and what a file says about itself."""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halo_fast.config import TrainConfig
from halo_fast.families import Family
from halo_fast.runs import UserError, versions, write_json, write_safetensors
from halo_fast.train.adapters import ADAPTER

__all__ = ["comfyui", "export", "export_run", "load_trained", "metadata", "save_network"]

FORMATS = ("diffusers", "comfyui")
_FILE = "pytorch_lora_weights.safetensors"


def export(family: Family, parameters: Mapping[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """The LoRA as diffusers names it; alpha / rank goes into B, so that no loader needs to know it."""
    scale = config.lora_alpha / config.rank
    return {
        f"{family.lora_prefix}.{name.replace(f'.{ADAPTER}.', '.')}": (
            value.detach().cpu() * (scale if ".lora_B." in name else 1.0)
        )
        for name, value in parameters.items()
    }


def metadata(family: Family, base_model: str, config: TrainConfig, steps: int) -> dict[str, str]:
    """What a trained file says about itself, for `write_safetensors`: text alone, equal for equal trainings.

    Args:
        family: what was trained; its pipeline's class decides how the layers are called elsewhere.
        base_model: config.pretrained_model_name_or_path.
        config: the settings; `alpha` is told though it is folded into the weights already.
        steps: optimiser steps done.
    """
    return {
        "format": "pt",
        "base_model": base_model,
        "pipeline": type(family.pipeline or family).__name__,
        "network": family.network,
        "objective": json.dumps(asdict(config.objective), sort_keys=True),
        "rank": str(config.rank),
        "alpha": str(config.lora_alpha),
        "alpha_folded": "true",
        "steps": str(steps),
        "halo_fast": versions()["halo_fast"],
    }


def save_network(folder: Path, family: Family, weights: Mapping[str, Tensor], told: Mapping[str, str]) -> None:
    """Write a network trained at rank 0 as diffusers does, for `from_pretrained`, with `metadata` in halo_fast.json.

    Args:
        weights: its whole state dict; nothing of it is copied.
    """
    from accelerate import init_empty_weights

    model: Any = family.transformer
    # FSDP2 puts a class of its own in front of the model's
    network: Any = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
    with init_empty_weights():
        empty: Any = network.from_config(model.config)
    empty.load_state_dict(weights, assign=True)
    empty.save_pretrained(folder)
    write_json(folder / "halo_fast.json", dict(told))


def load_trained(family: Family, folder: Path) -> None:
    """Put what `halo train` left on the family's network: its folder train/lora, or train/model."""
    from safetensors.torch import load_file

    if (folder / _FILE).exists():
        family.load_lora(load_file(folder / _FILE))
    else:
        model: Any = family.transformer
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())


def export_run(run: Path, format: str = "diffusers", output: Path | None = None) -> Path:
    """Write the LoRA of a run directory in a format of other programs, or the network trained at rank 0.

    The file written, or the network's folder.

    Args:
        run: the run directory; its `train` must have finished.
        format: "diffusers", for `pipeline.load_lora_weights`, or "comfyui".
        output: folder of the file; None for export/<format> in the run directory.

    Raises:
        UserError: an unknown format, a run in which nothing was trained, or a model whose names in ComfyUI are not
            known.
    """
    from safetensors import safe_open

    if format not in FORMATS:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    folder = Path(output) if output is not None else Path(run) / "export" / format
    network = Path(run) / "train" / "model"
    if (network / "halo_fast.json").is_file():
        if format != "diffusers":
            raise UserError(f"format: this run trained the whole network, which {format} has no LoRA of; use diffusers")
        told = json.loads((network / "halo_fast.json").read_text())
        return Path(shutil.copytree(network, folder / told["network"], dirs_exist_ok=True))
    source = Path(run) / "train" / "lora" / _FILE
    if not source.is_file():
        raise UserError(f"{source}: not there; run `halo train` with --output_dir {run} first")
    with safe_open(source, framework="pt") as file:
        known, lora = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if format == "diffusers":
        write_safetensors(folder / _FILE, lora, known)
        return folder / _FILE
    # each expert of Wan 2.2 is trained by itself, and a model of its own in ComfyUI
    file = folder / f"lora_{known.get('network', 'transformer')}.safetensors"
    bare = {name.split(".", 1)[1]: value for name, value in lora.items()}
    write_safetensors(file, comfyui(bare, known.get("pipeline", "")), known)
    return file


def comfyui(lora: Mapping[str, Tensor], pipeline: str) -> dict[str, Tensor]:
    """The LoRA under the names that ComfyUI reads: "diffusion_model." and the modules of the model's own repository.

    Where that repository keeps several layers in one matrix, their adapters become one of the summed rank, block by
    block: A stacked, B block-diagonal. Wan's files carry `alpha` (equal to the rank, for the scale is in B already);
    elsewhere ComfyUI takes a missing one as 1, and diffusers would refuse it.

    Args:
        lora: names as in the diffusers model, without a prefix: "<module>.lora_A.weight" [r, in], lora_B [out, r].
        pipeline: name of the diffusers pipeline class.

    Raises:
        UserError: no conversion is known for this model or one of its layers.
    """
    if pipeline not in _LAYERS:
        raise UserError(
            f"export: ComfyUI's names are known for {', '.join(_LAYERS)}, not for {pipeline or 'this model'}; "
            "use --format diffusers"
        )
    groups: dict[str, dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)
    for name, down in lora.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            target, part = _target(module, pipeline)
            groups[target][part] = down, lora[f"{module}.lora_B.weight"]
    converted = {}
    for target, parts in groups.items():
        down, up = _fused(parts, _fused_sizes(target, parts))
        converted[f"diffusion_model.{target}.lora_A.weight"] = down
        converted[f"diffusion_model.{target}.lora_B.weight"] = up
        if pipeline == "WanPipeline" and target.startswith("blocks."):
            converted[f"diffusion_model.{target}.alpha"] = torch.tensor(float(len(down)))
    return converted


def _target(module: str, pipeline: str) -> tuple[str, int]:
    """Name of the module in the original repository, and which part of it this layer is."""
    for pattern, (target, part) in _LAYERS[pipeline].items():
        match = re.fullmatch(pattern, module)
        if match:
            return match.expand(target), "qkv".find(match[2]) if part == _QKV else part
    raise UserError(
        f"export: no name in ComfyUI is known for layer {module} of {pipeline}; leave it out of target_modules or use "
        "--format diffusers"
    )


def _fused_sizes(target: str, parts: Mapping[int, tuple[Tensor, Tensor]]) -> list[int]:
    """Rows of every part of the fused matrix, also of those that have no adapter."""
    part, (_, up) = next(iter(parts.items()))
    if target.endswith("qkv"):
        return [len(up)] * 3
    if target.endswith("linear1"):
        # HunyuanVideo's single blocks: the feed-forward layer is four times as wide as q, k and v
        width = len(up) // 4 if part == 3 else len(up)
        return [width, width, width, 4 * width]
    return [len(up)]


def _fused(parts: Mapping[int, tuple[Tensor, Tensor]], sizes: list[int]) -> tuple[Tensor, Tensor]:
    """A and B of one adapter whose product holds every part's product in that part's rows, and zeros elsewhere."""
    ranks = {part: len(down) for part, (down, _) in parts.items()}
    up = next(iter(parts.values()))[1].new_zeros(sum(sizes), sum(ranks.values()))
    column = 0
    for part, (_, values) in parts.items():
        row = sum(sizes[:part])
        up[row : row + sizes[part], column : column + ranks[part]] = values
        column += ranks[part]
    return torch.cat([down for down, _ in parts.values()]), up


_QKV = -1
# diffusers layer -> (module of the original repository, part of a fused matrix). Text-to-video models only.
_LAYERS: dict[str, dict[str, tuple[str, int]]] = {
    "WanPipeline": {
        r"blocks\.(\d+)\.attn1\.to_([qkv])": (r"blocks.\1.self_attn.\2", 0),
        r"blocks\.(\d+)\.attn1\.to_out\.0": (r"blocks.\1.self_attn.o", 0),
        r"blocks\.(\d+)\.attn2\.to_([qkv])": (r"blocks.\1.cross_attn.\2", 0),
        r"blocks\.(\d+)\.attn2\.to_out\.0": (r"blocks.\1.cross_attn.o", 0),
        r"blocks\.(\d+)\.ffn\.net\.0\.proj": (r"blocks.\1.ffn.0", 0),
        r"blocks\.(\d+)\.ffn\.net\.2": (r"blocks.\1.ffn.2", 0),
        r"condition_embedder\.time_proj": ("time_projection.1", 0),
        r"condition_embedder\.(text|time)_embedder\.linear_1": (r"\1_embedding.0", 0),
        r"condition_embedder\.(text|time)_embedder\.linear_2": (r"\1_embedding.2", 0),
        r"proj_out": ("head.head", 0),
    },
    # The blocks alone have the same names in both; diffusers renames the layers around them.
    "LTXPipeline": {
        r"transformer_blocks\.\d+\.attn[12]\.to_([qkv]|out\.0)": (r"\g<0>", 0),
        r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)": (r"\g<0>", 0),
    },
    "HunyuanVideoPipeline": {
        r"transformer_blocks\.(\d+)\.attn\.to_([qkv])": (r"double_blocks.\1.img_attn_qkv", _QKV),
        r"transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj": (r"double_blocks.\1.txt_attn_qkv", _QKV),
        r"transformer_blocks\.(\d+)\.attn\.to_out\.0": (r"double_blocks.\1.img_attn_proj", 0),
        r"transformer_blocks\.(\d+)\.attn\.to_add_out": (r"double_blocks.\1.txt_attn_proj", 0),
        r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": (r"double_blocks.\1.img_mlp.fc1", 0),
        r"transformer_blocks\.(\d+)\.ff\.net\.2": (r"double_blocks.\1.img_mlp.fc2", 0),
        r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj": (r"double_blocks.\1.txt_mlp.fc1", 0),
        r"transformer_blocks\.(\d+)\.ff_context\.net\.2": (r"double_blocks.\1.txt_mlp.fc2", 0),
        r"single_transformer_blocks\.(\d+)\.attn\.to_([qkv])": (r"single_blocks.\1.linear1", _QKV),
        r"single_transformer_blocks\.(\d+)\.proj_mlp": (r"single_blocks.\1.linear1", 3),
        r"single_transformer_blocks\.(\d+)\.proj_out": (r"single_blocks.\1.linear2", 0),
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_([qkv])": (
            r"txt_in.individual_token_refiner.blocks.\1.self_attn_qkv", _QKV,
        ),
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.attn\.to_out\.0": (
            r"txt_in.individual_token_refiner.blocks.\1.self_attn_proj", 0,
        ),
    },
}  # fmt: skip
