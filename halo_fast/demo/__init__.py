"""The demo: a small world with local defects, its meters, its base models and the comparison of methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from halo_fast.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import WanPipeline

__all__ = ["BASES", "PRETRAIN_HELP", "RECIPE", "WEIGHTS", "check_clips", "load_pipeline"]

RECIPE = Path(__file__).parent / "recipe.yaml"
WEIGHTS = Path(__file__).parent / "weights"
BASES = ("graded", "patchy")
PRETRAIN_HELP = "train the demo's meters and both of its base models from nothing"


def check_clips(
    reader: str, grid: Sequence[int], video_size: Sequence[int] | None, prompts: Sequence[str], setting: str
) -> None:
    """Check that a teacher or meter of the demo can read such clips.

    Args:
        reader: which one, for messages.
        grid: patches (f, h, w).
        video_size: frames, height, width; None where it is not known yet.
        prompts: of the clips.
        setting: name under which a prompt of another world is reported.

    Raises:
        UserError: another grid or clip size than the demo's, or a prompt that its world does not have.
    """
    from halo_fast.demo import world
    from halo_fast.demo.defects import GRID

    for name, what, wanted, given in (
        ("grid", "patches", GRID, grid),
        ("generate", "num_frames, height and width", (world.NUM_FRAMES, world.SIZE, world.SIZE), video_size),
    ):
        if given is not None and tuple(given) != wanted:
            raise UserError(f"{name}: the demo's {reader} reads {what} {wanted}, got {tuple(given)}; set it to that")
    for prompt in prompts:
        try:
            world.parse(prompt)
        except ValueError as error:
            raise UserError(f"{setting}: {error}; use another {reader} for other prompts") from error


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
    from halo_fast.files import no_loading_bars

    # part by part: from_pretrained would complain that the autoencoder is not Wan's own
    with no_loading_bars("diffusers", "transformers"):
        return WanPipeline(
            tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
            text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval(),
            vae=BlockAutoencoder.from_pretrained(folder / "vae"),
            transformer=WanTransformer3DModel.from_pretrained(folder / "transformer").float(),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        )
