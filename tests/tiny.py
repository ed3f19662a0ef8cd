"""A random WanPipeline of the real diffusers classes, small enough for any test, and run directories made with it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from halo_fast.config import Config, GenerateConfig, TrainConfig
from halo_fast.runs import Run, hash_file, write_parquet

WORDS = ("a", "red", "green", "ball", "cube", "rolls", "jumps", "left", "right", "slowly", "over", "the", "grass")
CHANNELS = 4


def tiny_wan(seed: int = 0, max_words: int = 12) -> WanPipeline:
    """Clips of 4k+1 frames with sides divisible by 16; latents [4, k + 1, H / 8, W / 8], in eval mode."""
    torch.manual_seed(seed)
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_words
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, num_heads=2, num_layers=1, d_ff=32)
    )
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.7, 1.5, 2.0],
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=16, freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    pipeline = WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder.eval(), vae=vae.eval(), transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
        generate=GenerateConfig(num_prompts=4, batch_size=2, num_inference_steps=4),
        train=TrainConfig(**{"max_train_steps": 6, "train_batch_size": 4, "rank": 4, "checkpointing_steps": 2} | train),
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
