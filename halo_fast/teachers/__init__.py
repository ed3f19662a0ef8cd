"""Teachers score videos and patches by the rubric; their labels are what the reward model learns from."""

from halo_fast.teachers.base import PATCH_DIMENSIONS, RUBRIC, RUBRIC_DIMENSIONS, VIDEO_DIMENSIONS, Label, Teacher
from halo_fast.teachers.store import LabelStore, label_key

__all__ = [
    "PATCH_DIMENSIONS",
    "RUBRIC",
    "RUBRIC_DIMENSIONS",
    "VIDEO_DIMENSIONS",
    "Label",
    "LabelStore",
    "Teacher",
    "label_key",
]
