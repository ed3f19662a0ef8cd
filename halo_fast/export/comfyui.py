"""A LoRA under the names that ComfyUI reads."""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from halo_fast.errors import UserError

__all__ = ["comfyui"]


def comfyui(lora: Mapping[str, Tensor], pipeline: str) -> dict[str, Tensor]:
    """The LoRA under the names that ComfyUI reads: "diffusion_model." and the modules of the model's own repository.

    Where that repository keeps several layers in one matrix, their adapters become one of the summed rank, block by
    block: A stacked, B block-diagonal. HunyuanVideo's file has one rank; smaller ones are padded with zeros. Wan's
    carry `alpha` (equal to the rank, for the scale is in B already); elsewhere ComfyUI takes a missing one as 1, and
    diffusers would refuse it.

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
    fused = {target: _fused(parts, _fused_sizes(target, parts)) for target, parts in groups.items()}
    # diffusers 0.36 takes the largest rank of a HunyuanVideo file for alpha of all its layers
    rank = max(len(down) for down, _ in fused.values()) if pipeline == "HunyuanVideoPipeline" and fused else 0
    converted = {}
    for target, parts in fused.items():
        down, up = _padded(*parts, rank)
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


def _padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of at least this rank and the same product."""
    missing = max(0, rank - len(down))
    return pad(down, (0, 0, 0, missing)), pad(up, (0, missing))


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
