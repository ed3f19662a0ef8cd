"""Teachers score videos and patches by the rubric; their labels are what the reward model learns from."""

from halo_fast.teachers.base import PATCH_DIMENSIONS, RUBRIC, VIDEO_DIMENSIONS, Label, Teacher
from halo_fast.teachers.demo import DemoTeacher
from halo_fast.teachers.stage import annotate, load_teacher
from halo_fast.teachers.store import LabelStore, label_key

__all__ = [
    "PATCH_DIMENSIONS",
    "RUBRIC",
    "VIDEO_DIMENSIONS",
    "DemoTeacher",
    "Label",
    "LabelStore",
    "Teacher",
    "annotate",
    "label_key",
    "load_teacher",
]
