"""Tiny vision-language models of the real classes, and reward models on them."""

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from halo_fast.rewards import RewardModel, RewardModelConfig

WORDS = ("a", "red", "green", "disc", "moves", "left", "<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>", "/", *"1234")

TEXT = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# for formats that take layers with a multiple of 64 inputs
WIDE = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4,
}  # fmt: skip

ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}

SIGLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


def tiny_config(family: str, wide: bool = False) -> Any:
    """The smallest config of a family that has all of its parts."""
    base = TEXT | (WIDE if wide else {})
    width = base["hidden_size"]
    if family.startswith("qwen"):
        vision = {
            "qwen2_vl": {"embed_dim": 16, "hidden_size": width, "depth": 2, "mlp_ratio": 2},
            "qwen2_5_vl": {"hidden_size": 16, "out_hidden_size": width, "intermediate_size": 24, "depth": 2,
                           "fullatt_block_indexes": [1], "window_size": 32},
            "qwen3_vl": {"hidden_size": 16, "out_hidden_size": width, "intermediate_size": 24, "depth": 2,
                         "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        }[family]  # fmt: skip
        vision |= {"num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
        text = base | {"rope_parameters": ROPE} | ({"head_dim": 8} if family == "qwen3_vl" else {})
        name = {"qwen2_vl": "Qwen2VLConfig", "qwen2_5_vl": "Qwen2_5_VLConfig", "qwen3_vl": "Qwen3VLConfig"}[family]
        return getattr(transformers, name)(text_config=text, vision_config=vision)
    if family == "llava_onevision":
        return transformers.LlavaOnevisionConfig(
            text_config={"model_type": "qwen2"} | base,
            vision_config={"model_type": "siglip_vision_model", "image_size": 32} | SIGLIP,
        )
    if family == "idefics2":
        return transformers.Idefics2Config(
            text_config={"model_type": "mistral"} | base,
            vision_config={"image_size": 32} | SIGLIP,
            perceiver_config={"hidden_size": width, "resampler_n_latents": 3, "resampler_depth": 1,
                              "resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 2},
        )  # fmt: skip
    name = {"idefics3": "Idefics3Config", "smolvlm": "SmolVLMConfig"}[family]
    return getattr(transformers, name)(
        text_config={"model_type": "llama"} | base, vision_config={"image_size": 32} | SIGLIP, scale_factor=2
    )


FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics2", "idefics3", "smolvlm", "llava_onevision")


def tiny_model(folder: Path, family: str, wide: bool = False) -> Path:
    """A random model of the real classes with a tokenizer, saved as a transformers folder."""
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(tiny_config(family, wide)).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: n for n, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=list(WORDS[6:9])
    ).save_pretrained(folder)
    return folder


def reward_model(
    folder: Path,
    dimensions: tuple[str, ...] = ("visual_quality", "text_alignment"),
    rank: int | None = 0,
    quantization: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
):
    torch.manual_seed(1)
    config = RewardModelConfig(
        dimensions, ("quality", "sharpness"), backbone=str(folder), lora_rank=rank, quantization=quantization,
        precision=precision,
    )  # fmt: skip
    return RewardModel(config).eval()
