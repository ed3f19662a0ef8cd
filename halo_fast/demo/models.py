"""The demo's base models under their registered names."""

from functools import partial

from halo_fast.demo import WEIGHTS, load_pipeline
from halo_fast.families import RegisteredModel

__all__ = ["GRADED", "PATCHY"]

GRADED = RegisteredModel(partial(load_pipeline, "graded"), WEIGHTS / "graded")
PATCHY = RegisteredModel(partial(load_pipeline, "patchy"), WEIGHTS / "patchy")
