"""Teachers score videos and patches by the rubric; their labels are what the reward model learns from."""

from halo_fast.teachers.base import PATCH_DIMENSIONS, RUBRIC, RUBRIC_DIMENSIONS, VIDEO_DIMENSIONS, Label, Teacher
from halo_fast.teachers.demo import DemoTeacher
from halo_fast.teachers.openai import Clip, OpenAITeacher
from halo_fast.teachers.stage import annotate, load_teacher
from halo_fast.teachers.store import LabelStore, label_key

__all__ = [
    "PATCH_DIMENSIONS",
    "RUBRIC",
    "RUBRIC_DIMENSIONS",
    "VIDEO_DIMENSIONS",
    "Clip",
    "DemoTeacher",
    "Label",
    "LabelStore",
    "OpenAITeacher",
    "Teacher",
    "annotate",
    "label_key",
    "load_teacher",
]
