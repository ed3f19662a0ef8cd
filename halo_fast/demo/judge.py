"""The demo's detectors as a judge of two stages: a detector for each dimension, then a total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from halo_fast.demo.defects import KINDS
from halo_fast.demo.meters import DefectMeter, FidelityMeter
from halo_fast.files import progress
from halo_fast.judges.base import JudgeTable, Video, read_video

__all__ = ["detectors"]


@torch.no_grad()
def detectors(clips: Sequence[Video], prompts: Sequence[str], fps: float, device: str) -> JudgeTable:
    """Freedom from each kind of defect, 1 less its mean severity, and whether a clip shows its prompt.

    Neither detector is the reward that was optimised. The total of a model is the mean of its dimensions.

    Args:
        clips: as in ClipJudge, likewise the next three.
        prompts: of the demo's world.
        fps: not read.
        device: not read; the detectors are small.
    """
    defects, fidelity = DefectMeter.load(), FidelityMeter.load()
    rows = []
    for clip, prompt in progress(zip(clips, prompts, strict=True), len(clips), "judge demo"):
        video = read_video(clip)[None]
        _, by_kind = defects(video, [prompt])
        row = {f"no_{kind}": 1 - float(by_kind[0, index].mean()) for index, kind in enumerate(KINDS)}
        rows.append(row | {"fidelity": float(fidelity(video, [prompt])["fidelity_correct"][0])})
    return JudgeTable("demo", rows, totals=_total)


def _total(means: Mapping[str, float]) -> dict[str, float]:
    return {"total": sum(means.values()) / len(means)}
