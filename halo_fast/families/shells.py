"""Pipelines of published models without weights and tokenizers, from their configurations: for predictions of memory.

The numbers are those of the models' own configurations: diffusers' conversion scripts and defaults, and for text
encoders those of their authors. tests/families/test_shells.py compares parameter counts with published ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch

from halo_fast.errors import UserError
from halo_fast.families import Family, family_of

__all__ = ["PUBLISHED", "Shell", "find_shell", "load_shell", "network_of"]

Part = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Shell:
    """What is known of a published model.

    Args:
        pipeline: diffusers' class; "" where the network alone is known.
        network: class and configuration of the network that is trained.
        autoencoder: likewise.
        text: text encoders by the pipeline's name for them, classes of transformers.
        scheduler: class and configuration.
        tokens: tokens of each tokenizer by its name, "model_max_length".
        stored: precision of the network's file.
        clip: frames, height and width of the model's usual clip, multiples of which its recipe is made.
        others: further arguments of the pipeline, and further parts as class and configuration in a tuple.
    """

    pipeline: str
    network: Part
    autoencoder: Part | None = None
    text: Mapping[str, Part] = field(default_factory=dict)
    scheduler: Part = ("FlowMatchEulerDiscreteScheduler", {})
    tokens: Mapping[str, int] = field(default_factory=dict)
    stored: torch.dtype = torch.bfloat16
    clip: tuple[int, int, int] = (81, 480, 832)
    others: Mapping[str, Any] = field(default_factory=dict)


_T5 = ("T5EncoderModel", {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False,
})  # fmt: skip
_UMT5 = ("UMT5EncoderModel", {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False,
})  # fmt: skip
_LLAMA = ("LlamaModel", {
    "vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
})  # fmt: skip
_CLIP = ("CLIPTextModel", {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768,
})  # fmt: skip
_QWEN = ("Qwen2_5_VLTextModel", {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
})  # fmt: skip
_QWEN_VL: Part = ("Qwen2_5_VLForConditionalGeneration", {
    "text_config": _QWEN[1], "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "intermediate_size": 3420},
})  # fmt: skip
_GEMMA: Part = ("Gemma3ForConditionalGeneration", {
    "text_config": {
        "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    },
    "vision_config": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 896, "patch_size": 14,
    },
})  # fmt: skip
_BYT5 = ("T5EncoderModel", {
    "vocab_size": 1510, "d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6,
    "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False,
})  # fmt: skip
_WAN_VAE: Part = ("AutoencoderKLWan", {})
_COG_SCHEDULER: Part = ("CogVideoXDDIMScheduler", {
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
})  # fmt: skip
_LTX_SHIFT = {
    "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
    "max_image_seq_len": 4096, "shift_terminal": 0.1,
}  # fmt: skip
_LTX_13B_VAE: Part = ("AutoencoderKLLTXVideo", {
    "block_out_channels": (128, 256, 512, 1024, 2048), "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "decoder_block_out_channels": (256, 512, 1024), "layers_per_block": (4, 6, 6, 2, 2),
    "decoder_layers_per_block": (5, 5, 5, 5), "spatio_temporal_scaling": (True,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3, "decoder_inject_noise": (False,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"), "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3, "timestep_conditioning": True, "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
})  # fmt: skip


def _wan(**network: Any) -> Shell:
    return Shell(
        "WanPipeline", ("WanTransformer3DModel", network), _WAN_VAE, {"text_encoder": _UMT5},
        tokens={"tokenizer": 512}, scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}), stored=torch.float32,
    )  # fmt: skip


def _cogvideox(stored: torch.dtype, **network: Any) -> Shell:
    return Shell(
        "CogVideoXPipeline", ("CogVideoXTransformer3DModel", network), ("AutoencoderKLCogVideoX", {}),
        {"text_encoder": _T5}, _COG_SCHEDULER, {"tokenizer": 226}, stored, (49, 480, 720),
    )  # fmt: skip


def _ltx(autoencoder: Part, stored: torch.dtype, scheduler: Mapping[str, Any], **network: Any) -> Shell:
    return Shell(
        "LTXPipeline", ("LTXVideoTransformer3DModel", network), autoencoder, {"text_encoder": _T5},
        ("FlowMatchEulerDiscreteScheduler", scheduler), {"tokenizer": 128}, stored, (161, 480, 704),
    )  # fmt: skip


PUBLISHED: dict[str, Shell] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan(),
    "zai-org/CogVideoX-2b": _cogvideox(torch.float16),
    "zai-org/CogVideoX-5b": _cogvideox(
        torch.bfloat16, num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True
    ),
    "Lightricks/LTX-Video": _ltx(("AutoencoderKLLTXVideo", {}), torch.float32, _LTX_SHIFT),
    "Lightricks/LTX-Video-0.9.7-dev": _ltx(
        _LTX_13B_VAE, torch.bfloat16, {}, num_layers=48, attention_head_dim=128, cross_attention_dim=4096
    ),
    "Lightricks/LTX-2": Shell(
        "LTX2Pipeline", ("LTX2VideoTransformer3DModel", {"rope_type": "split"}),
        ("AutoencoderKLLTX2Video", {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}),
        {"text_encoder": _GEMMA}, ("FlowMatchEulerDiscreteScheduler", _LTX_SHIFT), {"tokenizer": 1024},
        clip=(121, 512, 768), others={
            "audio_vae": ("AutoencoderKLLTX2Audio", {}), "vocoder": ("pipelines.ltx2.LTX2Vocoder", {}),
            "connectors": ("pipelines.ltx2.LTX2TextConnectors", {"rope_type": "split"}),
        },
    ),
    "hunyuanvideo-community/HunyuanVideo": Shell(
        "HunyuanVideoPipeline", ("HunyuanVideoTransformer3DModel", {}), ("AutoencoderKLHunyuanVideo", {}),
        {"text_encoder": _LLAMA, "text_encoder_2": _CLIP}, ("FlowMatchEulerDiscreteScheduler", {"shift": 7.0}),
        {"tokenizer": 256, "tokenizer_2": 77}, clip=(61, 544, 960),
    ),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": Shell(
        "HunyuanVideo15Pipeline", ("HunyuanVideo15Transformer3DModel", {"task_type": "t2v"}),
        ("AutoencoderKLHunyuanVideo15", {}), {"text_encoder": _QWEN, "text_encoder_2": _BYT5},
        ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}), {"tokenizer": 1000, "tokenizer_2": 256},
        clip=(121, 480, 848),
    ),
    "genmo/mochi-1-preview": Shell(
        "MochiPipeline", ("MochiTransformer3DModel", {}), ("AutoencoderKLMochi", {}), {"text_encoder": _T5},
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}), {"tokenizer": 256}, torch.float32, (85, 480, 848),
    ),
    "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers": Shell(
        "Kandinsky5T2VPipeline", ("Kandinsky5Transformer3DModel", {
            "in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 1792, "ff_dim": 7168, "num_text_blocks": 2,
            "num_visual_blocks": 32, "axes_dims": (16, 24, 24), "visual_cond": True,
        }), ("AutoencoderKLHunyuanVideo", {}), {"text_encoder": _QWEN_VL, "text_encoder_2": _CLIP},
        ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}), {"tokenizer": 640, "tokenizer_2": 77},
        clip=(121, 512, 768),
    ),
    "nvidia/Cosmos-Predict2.5-2B": Shell(
        "", ("CosmosTransformer3DModel", {
            # 16 of the latents, one that marks given frames, and one of padding, which the network would append itself
            "in_channels": 18, "concat_padding_mask": False, "num_attention_heads": 16, "rope_scale": (1.0, 3.0, 3.0),
            "extra_pos_embed_type": None, "use_crossattn_projection": True, "crossattn_proj_in_channels": 100352,
        }), clip=(93, 480, 832),
    ),
}  # fmt: skip
_FORMER_NAMES = {"THUDM/CogVideoX-2b": "zai-org/CogVideoX-2b", "THUDM/CogVideoX-5b": "zai-org/CogVideoX-5b"}


def find_shell(name: str) -> Shell | None:
    """What is known of a model on the hub; None for any other."""
    return PUBLISHED.get(_FORMER_NAMES.get(name, name))


class _Tokenizer:
    """In the place of a tokenizer: how many tokens it gives at most."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length


def network_of(shell: Shell) -> Any:
    """The network that is trained, on the meta device."""
    import diffusers

    return _empty(diffusers, shell.network)


def load_shell(name: str, network: str | None = None) -> Family:
    """The family of a published model whose parts have no weights and whose tokenizers only know their length.

    Args:
        name: on the hub, one of `PUBLISHED`.
        network: the part that is trained, as for `family_of`.

    Raises:
        UserError: a model that is not known, or for which there is no family.
    """
    import diffusers
    import transformers

    shell = find_shell(name)
    if shell is None or not shell.pipeline or shell.autoencoder is None:
        known = ", ".join(other for other, of in PUBLISHED.items() if of.pipeline)
        raise UserError(f"pretrained_model_name_or_path: nothing is known of {name!r}; expected one of {known}")
    parts: dict[str, Any] = {"transformer": network_of(shell), "vae": _empty(diffusers, shell.autoencoder)}
    for part, text in shell.text.items():
        parts[part] = _empty(transformers, text)
    kind, settings = shell.scheduler
    parts["scheduler"] = getattr(diffusers, kind)(**settings)
    if shell.pipeline == "HunyuanVideo15Pipeline":
        from diffusers.guiders import ClassifierFreeGuidance

        parts["guider"] = ClassifierFreeGuidance()
    parts |= {part: _Tokenizer(length) for part, length in shell.tokens.items()}
    for name, other in shell.others.items():
        parts[name] = _empty(diffusers, other) if isinstance(other, tuple) else other
    pipeline = getattr(diffusers, shell.pipeline)(**parts)
    return family_of(pipeline, network)


def _empty(library: Any, part: Part) -> Any:
    """A network of diffusers or transformers without weights."""
    from accelerate import init_empty_weights

    try:
        kind: Any = attrgetter(part[0])(library)
    except AttributeError:
        raise UserError(
            f"model: the installed {library.__name__} {library.__version__} has no {part[0]}; upgrade it"
        ) from None
    with init_empty_weights():
        config = getattr(kind, "config_class", None)
        network = kind(config(**part[1])) if config is not None else kind(**part[1])
    if hasattr(network, "tie_weights"):  # made without weights, shared ones are two
        network.tie_weights()
    return network.eval()
