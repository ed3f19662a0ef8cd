"""Random pipelines of the real diffusers classes, small enough for any test, and run directories made with them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
import transformers
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    Cosmos2_5_PredictBasePipeline,
    CosmosTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotionAdapter,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from halo_fast.families import Family, family_of
from halo_fast.families.sampling import GenerateConfig
from halo_fast.files import hash_file, write_json, write_parquet
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.cache import build_cache
from halo_fast.pipeline.stages.generate import generate
from halo_fast.pipeline.stages.pairs import build_pairs
from halo_fast.train.config import TrainConfig

WORDS = ("a", "red", "green", "ball", "cube", "rolls", "jumps", "left", "right", "slowly", "over", "the", "grass")
CHANNELS = 4


def words(max_words: int, *, end: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of WORDS; what is not among them, and each mark of punctuation, is one unknown token."""
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation()])
    if end:
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_words,
        padding_side="right",
    )  # fmt: skip


def _t5(kind: type = T5EncoderModel, config: type = T5Config) -> Any:
    return kind(config(vocab_size=3 + len(WORDS), d_model=16, d_kv=8, num_heads=2, num_layers=1, d_ff=32)).eval()


def _clip(layers: int = 1) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=3 + len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def _ready(pipeline: Any) -> Any:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_wan(
    seed: int = 0, max_words: int = 12, *, experts: bool = False, expand: bool = False, head: int = 12
) -> WanPipeline:
    """Clips of 4k+1 frames with sides divisible by 16; latents [4, k + 1, H / 8, W / 8], in eval mode."""
    torch.manual_seed(seed)
    tokenizer = words(max_words, end=False)
    text_encoder = _t5(UMT5EncoderModel, UMT5Config)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.7, 1.5, 2.0],
    )  # fmt: skip
    transformer, second = (
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=head, in_channels=CHANNELS,
            out_channels=CHANNELS, text_dim=16, freq_dim=32, ffn_dim=4 * head, num_layers=2, rope_max_seq_len=32,
        ) if wanted else None for wanted in (True, experts)
    )  # fmt: skip
    return _ready(
        WanPipeline(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, transformer_2=second,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), boundary_ratio=0.875 if experts else None,
            expand_timesteps=expand,
        )
    )  # fmt: skip


# without torchvision transformers 5 has this class for it
_PICTURES = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def tiny_wan_image(seed: int = 0, *, kind: str = "2.1") -> WanImageToVideoPipeline:
    """Wan from a picture: "2.1" with an image encoder, "A14B" with two experts, "TI2V" with a time for every token.

    The network of Wan 2.1 takes its text to be 512 tokens.
    """
    parts = tiny_wan(seed, 512 if kind == "2.1" else 12, experts=kind == "A14B").components
    encoder = processor = None
    if kind != "TI2V":
        # four channels of the mark, and the picture's latents
        picture = {"image_dim": 16, "added_kv_proj_dim": 24} if kind == "2.1" else {}
        for name in ("transformer", "transformer_2"):
            if parts[name] is not None:
                config = {key: value for key, value in parts[name].config.items() if not key.startswith("_")}
                parts[name] = WanTransformer3DModel(**config | {"in_channels": 2 * CHANNELS + 4} | picture)
    if kind == "2.1":
        encoder = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                patch_size=8,
            )
        )  # fmt: skip
        size = {"height": 16, "width": 16}
        processor = _PICTURES(size={"shortest_edge": 16}, crop_size=size)
    return _ready(
        WanImageToVideoPipeline(
            **parts | {"image_encoder": encoder, "image_processor": processor},
            boundary_ratio=0.875 if kind == "A14B" else None, expand_timesteps=kind == "TI2V",
        )
    )  # fmt: skip


def tiny_ltx_image(seed: int = 0) -> Any:
    """The parts of `tiny_ltx` in the pipeline that goes on from a picture."""
    return _ready(LTXImageToVideoPipeline(**tiny_ltx(seed).components))


def tiny_skyreels(seed: int = 0) -> Any:
    """Latents [4, k + 1, H / 8, W / 8] of 4k+1 frames; the parts of Wan around a network of its own class."""
    parts = tiny_wan(seed).components
    transformer = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=16, freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return _ready(
        SkyReelsV2Pipeline(
            tokenizer=parts["tokenizer"], text_encoder=parts["text_encoder"], vae=parts["vae"],
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
        )
    )  # fmt: skip


def tiny_helios(seed: int = 0, **scheduler: Any) -> Any:
    """Latents [4, 9, H / 8, W / 8] of 33 frames, one chunk; the parts of Wan around a network that sees a history."""
    parts = tiny_wan(seed).components
    transformer = HeliosTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=16, freq_dim=32, ffn_dim=48, num_layers=2, rope_dim=(4, 4, 4),
    )  # fmt: skip
    settings = {"stages": 1, "stage_range": [0, 1], "use_dynamic_shifting": True, "scheduler_type": "euler"}
    return _ready(
        HeliosPipeline(
            tokenizer=parts["tokenizer"], text_encoder=parts["text_encoder"], vae=parts["vae"],
            transformer=transformer, scheduler=HeliosScheduler(**settings | scheduler),
        )
    )  # fmt: skip


def tiny_cogvideox(seed: int = 0, *, rotary: bool = True, patch_size_t: int | None = None) -> Any:
    """Latents [k + 1, 4, H / 8, W / 8] of 8k+1 frames; rotary embeddings as in the 5B, or none as in the 2B."""
    torch.manual_seed(seed)
    vae = AutoencoderKLCogVideoX(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, scaling_factor=0.7,
    )  # fmt: skip
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=CHANNELS, out_channels=CHANNELS, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=4, sample_height=4, sample_frames=9, patch_size=2,
        patch_size_t=patch_size_t, temporal_compression_ratio=4, max_text_seq_length=12,
        use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", snr_shift_scale=1.0, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return _ready(
        CogVideoXPipeline(
            tokenizer=words(12), text_encoder=_t5(), vae=vae, transformer=transformer, scheduler=scheduler
        )
    )


def tiny_ltx(seed: int = 0, *, denoising_decoder: bool = False, head: int = 8) -> Any:
    """Latents [8, k + 1, H / 8, W / 8] of 4k+1 frames; the shift grows with the number of tokens."""
    torch.manual_seed(seed)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=2, patch_size_t=1,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        scaling_factor=0.9, timestep_conditioning=denoising_decoder,
    )  # fmt: skip
    vae.latents_mean.copy_(torch.linspace(-0.3, 0.3, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 2.0, 8))
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=head, cross_attention_dim=2 * head,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=32, max_image_seq_len=96
    )
    return _ready(
        LTXPipeline(tokenizer=words(12), text_encoder=_t5(), vae=vae, transformer=transformer, scheduler=scheduler)
    )


def _ltx2_autoencoder() -> AutoencoderKLLTX2Video:
    vae = AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8, 8), down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8,), layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True, True), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False,) * 2, downsample_type=("spatial", "temporal"), upsample_type=("spatiotemporal",),
        upsample_residual=(True,), upsample_factor=(1,), patch_size=4, spatial_compression_ratio=8,
        temporal_compression_ratio=2,
    )  # fmt: skip
    vae.latents_mean.copy_(torch.linspace(-0.3, 0.3, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 2.0, 8))
    return vae


def tiny_ltx2(seed: int = 0) -> Any:
    """Latents [8, k + 1, H / 8, W / 8] of 2k+1 frames, and sound beside them."""
    torch.manual_seed(seed)
    audio = AutoencoderKLLTX2Audio(
        base_channels=16, ch_mult=(1,), num_res_blocks=1, latent_channels=4, mel_bins=16, resolution=32
    )
    transformer = LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        vae_scale_factors=(2, 8, 8), audio_in_channels=16, audio_out_channels=16, audio_num_attention_heads=2,
        audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_type="split",
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=3, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8, video_connector_num_layers=1, video_connector_num_learnable_registers=4,
        audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=4, connector_rope_base_seq_len=32, rope_type="split",
    )  # fmt: skip
    text = {
        "vocab_size": 3 + len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 16,
    }  # fmt: skip
    gemma = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    vocoder = LTX2Vocoder(
        in_channels=32, hidden_channels=8, upsample_kernel_sizes=[4], upsample_factors=[2], resnet_kernel_sizes=[3],
        resnet_dilations=[[1]],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=32, max_image_seq_len=96
    )
    return _ready(
        LTX2Pipeline(
            scheduler=scheduler, vae=_ltx2_autoencoder(), audio_vae=audio, text_encoder=gemma,
            tokenizer=words(12, end=False), connectors=connectors, transformer=transformer, vocoder=vocoder,
        )
    )  # fmt: skip


def tiny_mochi(seed: int = 0) -> Any:
    """Latents [12, k + 1, H / 8, W / 8] of 6k+1 frames."""
    torch.manual_seed(seed)
    vae = AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
        add_attention_block=(False, False, False, False, False),
    )  # fmt: skip
    transformer = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=16, time_embed_dim=4, max_sequence_length=12,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return _ready(
        MochiPipeline(tokenizer=words(12), text_encoder=_t5(), vae=vae, transformer=transformer, scheduler=scheduler)
    )


def tiny_hunyuan(seed: int = 0) -> Any:
    """Latents [4, k + 1, H / 8, W / 8] of 4k+1 frames; Llama's padded states, CLIP's pooled one, guidance embedded."""
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        scaling_factor=0.476986, mid_block_add_attention=False,
    )  # fmt: skip
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=3 + len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip
    return _ready(
        HunyuanVideoPipeline(
            text_encoder=llama, tokenizer=words(512, end=False), text_encoder_2=_clip(), tokenizer_2=words(77),
            transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        )
    )  # fmt: skip


def tiny_hunyuan15(seed: int = 0) -> Any:
    """Latents [4, k + 1, H / 8, W / 8] of 4k+1 frames; Qwen's states and a byte model's of what stands in quotes."""
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )  # fmt: skip
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=2 * CHANNELS + 1, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=16, image_embed_dim=8, rope_axes_dim=(4, 6, 6),
        task_type="t2v",
    )  # fmt: skip
    qwen = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=3 + len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]},
        )
    )  # fmt: skip
    tokenizer = words(2048, end=False)
    # The prompt must begin after the 108 tokens that the pipeline cuts off.
    tokenizer.chat_template = "{% for m in messages %}" + "a " * 30 + "{{ m['content'] }} {% endfor %}"
    byte_model = T5EncoderModel(T5Config(vocab_size=384, d_model=16, d_kv=8, num_heads=2, num_layers=1, d_ff=32))
    return _ready(
        HunyuanVideo15Pipeline(
            text_encoder=qwen, tokenizer=tokenizer, text_encoder_2=byte_model, tokenizer_2=ByT5Tokenizer(),
            transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            guider=ClassifierFreeGuidance(guidance_scale=4.0),
        )
    )  # fmt: skip


def _qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": 3 + len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def tiny_kandinsky5(seed: int = 0, *, picture: bool = True) -> Any:
    """Latents [4, k + 1, H / 8, W / 8] of 4k+1 frames; with channels for a picture to start from, or without."""
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        scaling_factor=0.476986, mid_block_add_attention=False,
    )  # fmt: skip
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=CHANNELS, out_visual_dim=CHANNELS, in_text_dim=16, in_text_dim2=16, time_dim=16, model_dim=32,
        ff_dim=64, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=picture,
    )  # fmt: skip
    for name, value in transformer.named_parameters():
        if "modulation" in name:  # zero in a new network, which lets no block act
            torch.nn.init.normal_(value, std=0.1)
    return _ready(
        Kandinsky5T2VPipeline(
            transformer=transformer, vae=vae, text_encoder=_qwen_vl(), tokenizer=words(2048, end=False),
            text_encoder_2=_clip(), tokenizer_2=words(77), scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        )
    )  # fmt: skip


def tiny_sana(seed: int = 0, *, large: bool = False) -> Any:
    """Latents [C, F, H / 8, W / 8] on Wan's autoencoder, or LTX-2's if large; Gemma's states after an instruction."""
    vae = tiny_wan(seed).vae
    channels = vae.config.z_dim
    if large:
        vae, channels = _ltx2_autoencoder(), 8
    transformer = SanaVideoTransformer3DModel(
        in_channels=channels, out_channels=channels, num_attention_heads=2, attention_head_dim=12,
        num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=16, rope_max_seq_len=32,
    )  # fmt: skip
    gemma = Gemma2Config(
        vocab_size=3 + len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return _ready(
        SanaVideoPipeline(
            tokenizer=words(2048, end=False), text_encoder=Gemma2Model(gemma), vae=vae, transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
        )
    )  # fmt: skip


class Guardrail(SchedulerMixin, ConfigMixin):
    """In the place of Cosmos' guardrail, a package with models of its own; saved and loaded like a scheduler."""

    @register_to_config
    def __init__(self, unsafe: str = "blood") -> None:
        self.unsafe = unsafe

    def to(self, device: Any) -> "Guardrail":
        return self

    def check_text_safety(self, text: str) -> bool:
        return self.unsafe not in text

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def tiny_cosmos(seed: int = 0) -> Any:
    """Latents [4, k + 1, H / 8, W / 8] of 4k+1 frames; states of all layers of Qwen, and no channel of padding."""
    vae = tiny_wan(seed).vae
    transformer = CosmosTransformer3DModel(
        in_channels=CHANNELS + 1, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=8, max_size=(16, 32, 32), concat_padding_mask=False,
        extra_pos_embed_type=None, use_crossattn_projection=True, crossattn_proj_in_channels=32,
        encoder_hidden_states_channels=16,
    )  # fmt: skip
    tokenizer = words(512, end=False)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'][0]['text'] }} {% endfor %}"
    return _ready(
        Cosmos2_5_PredictBasePipeline(
            text_encoder=_qwen_vl(), tokenizer=tokenizer, transformer=transformer, vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), safety_checker=Guardrail(),
        )
    )  # fmt: skip


def _image_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=CHANNELS,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2, scaling_factor=0.18215,
    )  # fmt: skip


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def tiny_text_to_video_sd(seed: int = 0) -> Any:
    """Latents [4, F, H / 8, W / 8] of any number of frames; a UNet with layers over time."""
    torch.manual_seed(seed)
    unet = UNet3DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=4, norm_num_groups=2, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=16,
    )  # fmt: skip
    return _ready(
        TextToVideoSDPipeline(
            vae=_image_autoencoder(), text_encoder=_clip(), tokenizer=words(16), unet=unet, scheduler=_ddim()
        )
    )


def tiny_animatediff(seed: int = 0) -> Any:
    """Latents [4, F, H / 8, W / 8] of up to 16 frames; an image model's UNet with motion modules."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=4, norm_num_groups=2, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=16,
    )  # fmt: skip
    adapter = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2,
        motion_max_seq_length=16,
    )  # fmt: skip
    return _ready(
        AnimateDiffPipeline(
            vae=_image_autoencoder(), text_encoder=_clip(), tokenizer=words(16), unet=unet, motion_adapter=adapter,
            scheduler=_ddim(),
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline, the clip it is tried on (frames, height, width) and the network that is trained."""

    build: Callable[..., Any]
    size: tuple[int, int, int] = (9, 32, 32)
    network: str | None = None


TINY = {
    "Wan 2.1": Tiny(tiny_wan),
    "Wan 2.2 A14B, high noise": Tiny(partial(tiny_wan, experts=True)),
    "Wan 2.2 A14B, low noise": Tiny(partial(tiny_wan, experts=True), network="transformer_2"),
    "Wan 2.2 TI2V-5B": Tiny(partial(tiny_wan, expand=True)),
    "SkyReels-V2": Tiny(tiny_skyreels),
    "Helios": Tiny(tiny_helios, size=(33, 32, 32)),
    "CogVideoX 2B": Tiny(partial(tiny_cogvideox, rotary=False)),
    "CogVideoX 5B": Tiny(tiny_cogvideox),
    "CogVideoX 1.5": Tiny(partial(tiny_cogvideox, patch_size_t=2)),
    "LTX-Video": Tiny(tiny_ltx),
    "LTX-Video 0.9.1": Tiny(partial(tiny_ltx, denoising_decoder=True)),
    "LTX-2": Tiny(tiny_ltx2),
    "Mochi": Tiny(tiny_mochi, size=(7, 32, 32)),
    "HunyuanVideo": Tiny(tiny_hunyuan),
    "HunyuanVideo 1.5": Tiny(tiny_hunyuan15),
    "Kandinsky 5": Tiny(tiny_kandinsky5),
    "Kandinsky 5, no picture": Tiny(partial(tiny_kandinsky5, picture=False)),
    "SANA-Video 480p": Tiny(tiny_sana),
    "SANA-Video 720p": Tiny(partial(tiny_sana, large=True)),
    "Cosmos-Predict 2.5": Tiny(tiny_cosmos),
    "TextToVideoSD": Tiny(tiny_text_to_video_sd, size=(3, 32, 32)),
    "AnimateDiff": Tiny(tiny_animatediff, size=(3, 32, 32)),
}


# from a picture; apart, for what they need beside prompts
TINY_IMAGE = {
    "Wan 2.1, from an image": Tiny(tiny_wan_image),
    "Wan 2.2 A14B, from an image": Tiny(partial(tiny_wan_image, kind="A14B")),
    "Wan 2.2 TI2V-5B, from an image": Tiny(partial(tiny_wan_image, kind="TI2V")),
    "LTX-Video, from an image": Tiny(tiny_ltx_image),
}


def tiny_images(prompts: list[str], size: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """A picture of noise for each prompt, uint8 [H, W, 3] in the size of a clip."""
    draw = torch.Generator().manual_seed(0)
    return {prompt: torch.randint(256, (*size[1:], 3), generator=draw, dtype=torch.uint8) for prompt in prompts}


def tiny_conditions(family: Family, prompts: list[str], size: tuple[int, int, int]) -> list[dict[str, torch.Tensor]]:
    """The conditions of prompts and, where the family goes on from them, of their `tiny_images`."""
    images = tiny_images(prompts, size)
    return [
        conditions | family.encode_images(images[prompt][None], size[0])[0]
        for prompt, conditions in zip(prompts, family.encode_prompts(prompts), strict=True)
    ]


def begun(latents: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    """Random latents of a pair that begin with the given first frame, if there is one."""
    if "first_frame" in conditions:
        latents[:, :, :1] = conditions["first_frame"]
    return latents


def merged(tiny: Tiny, lora: dict[str, torch.Tensor]) -> Family:
    """A fresh pipeline's trained network with B A added to its weights by hand."""
    family = family_of(tiny.build(), tiny.network)
    weights = family.transformer.state_dict()
    for name, up in lora.items():
        if ".lora_B." in name:
            down = lora[name.replace(".lora_B.", ".lora_A.")]
            layer = name.removeprefix(f"{family.lora_prefix}.").replace(".lora_B", "")
            weights[layer] += up @ down
    return family


def tiny_clips(**changes: Any) -> GenerateConfig:
    """Clips of 9 x 32 x 32 pixels in 4 unguided steps, with changes."""
    settings = {"num_frames": 9, "height": 32, "width": 32, "fps": 8, "batch_size": 2}
    return GenerateConfig(**{"num_inference_steps": 4, "guidance_scale": 1.0} | settings | changes)


# Settings for models without attention worth keeping and clips of a few tokens.
OBJECTIVE = {
    "preset": "halo_sft", "video_weight": 0.05, "video_beta": 100.0, "patch_beta": 10.0, "patch_gamma": 0.0,
    "patch_delta": 0.4,
}  # fmt: skip
TINY_TRAIN = {
    "objective": OBJECTIVE, "learning_rate": 2e-3, "lr_warmup_steps": 10, "max_train_steps": 6, "train_batch_size": 4,
    "gradient_accumulation_steps": 1, "rank": 4, "lora_alpha": 16, "gradient_checkpointing": "none",
    "mixed_precision": "no", "checkpointing_steps": 2, "checkpoints_total_limit": None, "diagnostics_steps": 20,
}  # fmt: skip


def tiny_config(folder: Path, **train: Any) -> Config:
    """A run of 4 prompts with 2 candidates on a tiny Wan pipeline, which is saved in `folder` if not there yet."""
    model, prompts = folder / "model", folder / "prompts.txt"
    if not model.exists():
        tiny_wan().save_pretrained(model)
        prompts.write_text(
            "a red ball rolls left\na cube jumps\ngreen ball over the grass\na cube rolls slowly right\n"
        )
    return Config(
        output_dir=str(folder / "run"),
        pretrained_model_name_or_path=str(model),
        prompts=str(prompts),
        grid=(3, 2, 2),
        generate=tiny_clips(num_prompts=4),
        train=TrainConfig(**TINY_TRAIN | train),
    )


def write_scores(run: Run) -> None:
    """Random rewards of every candidate, in the place and form of the stage `score`."""
    clips = pyarrow.parquet.read_table(run.require("generate/clips.parquet")).to_pylist()
    patches = math.prod(run.config.grid)
    generator = torch.Generator().manual_seed(0)
    with run.stage("score", {}, {"clips": run.require("generate")}) as stage:
        if stage.done:
            return
        rows = []
        for clip in clips:
            video, patch = torch.rand(3, generator=generator) * 4 + 1, torch.rand(patches, generator=generator) * 4 + 1
            names = ("visual_quality", "text_alignment", "dynamic_degree")
            scores = {f"video_{name}": value for name, value in zip(names, video.tolist(), strict=True)}
            rows.append({"clip_id": clip["clip_id"], **scores, "patch_quality": patch.tolist()})
        write_parquet(stage.folder / "scores.parquet", pyarrow.Table.from_pylist(rows))
        stage.finish({"clips": len(rows)})


def run_to_cache(config: Config) -> Run:
    """A run whose stages are done up to cache, with random rewards."""
    run = Run(config)
    generate(config, run)
    write_scores(run)
    build_pairs(config, run)
    build_cache(config, run)
    return run


def finish_again(folder: Path) -> None:
    """Let a stage's manifest hold what its files are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for file, output in manifest["outputs"].items():
        output |= {"sha256": hash_file(folder / file), "bytes": (folder / file).stat().st_size}
    write_json(folder / "manifest.json", manifest)


def output_hashes(folder: Path) -> dict[str, str]:
    """What a finished stage wrote: file -> SHA-256 of its content, read afresh."""
    outputs = json.loads((folder / "manifest.json").read_text())["outputs"]
    return {file: hash_file(folder / file) for file in outputs}


def kill_when(code: str, ready: Callable[[], bool]) -> None:
    """Run Python code in a process of its own and send it SIGKILL as soon as `ready()`; it must not end by itself."""
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        while not ready():
            assert process.poll() is None, f"ended by itself with {process.returncode}"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
