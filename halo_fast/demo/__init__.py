"""The demo: a small world with local defects, its meters, its base models and the comparison of methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from halo_fast.runs import UserError

if TYPE_CHECKING:
    from diffusers import WanPipeline

__all__ = ["BASES", "WEIGHTS", "load_pipeline"]

WEIGHTS = Path(__file__).parent / "weights"
BASES = ("graded", "patchy")


def load_pipeline(name: str) -> WanPipeline:
    """A shipped base model, float32 on the CPU.

    Args:
        name: "graded" (most patches a little defective) or "patchy" (patches sound or ruined).

    Raises:
        UserError: no such base.
    """
    if name not in BASES:
        raise UserError(f'demo: expected "demo:graded" or "demo:patchy", got "demo:{name}"')
    return read_pipeline(WEIGHTS / name)


def read_pipeline(folder: Path) -> WanPipeline:
    """A pipeline that halo demo pretrain wrote: a diffusers folder with the autoencoder of this package."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    from halo_fast.demo.autoencoder import BlockAutoencoder

    # part by part: from_pretrained would complain that the autoencoder is not Wan's own
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval(),
        vae=BlockAutoencoder.from_pretrained(folder / "vae"),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer").float(),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    )
