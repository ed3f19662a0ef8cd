"""Teachers score videos and patches by the rubric; their labels are what the reward model learns from."""

from halo_fast.teachers.base import Clip, Judge, Teacher, TeacherRequest, label_in_batches, read_options, teacher_of
from halo_fast.teachers.rubric import PATCH_DIMENSIONS, RUBRIC, RUBRIC_DIMENSIONS, VIDEO_DIMENSIONS, Label
from halo_fast.teachers.store import LabelStore, label_key

__all__ = [
    "PATCH_DIMENSIONS",
    "RUBRIC",
    "RUBRIC_DIMENSIONS",
    "VIDEO_DIMENSIONS",
    "Clip",
    "Judge",
    "Label",
    "LabelStore",
    "Teacher",
    "TeacherRequest",
    "label_in_batches",
    "label_key",
    "read_options",
    "teacher_of",
]
