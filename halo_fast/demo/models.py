"""The demo's base models under their registered names, and how clips are sampled from them."""

from functools import partial

from halo_fast.demo import WEIGHTS, load_pipeline, world
from halo_fast.families import RegisteredModel
from halo_fast.families.sampling import GenerateConfig

__all__ = ["CLIPS", "GRADED", "PATCHY"]

GRADED = RegisteredModel(partial(load_pipeline, "graded"), WEIGHTS / "graded")
PATCHY = RegisteredModel(partial(load_pipeline, "patchy"), WEIGHTS / "patchy")

# the values of recipe.yaml
CLIPS = GenerateConfig(
    num_prompts=192,
    batch_size=32,
    num_inference_steps=16,
    guidance_scale=1.0,
    num_frames=world.NUM_FRAMES,
    height=world.SIZE,
    width=world.SIZE,
    fps=8,
    crf=None,
)
