"""A model behind an OpenAI-compatible server that compares the base model's clip with the aligned one's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from halo_fast.errors import UserError
from halo_fast.judges.base import JudgeTable, Video, hash_video, read_video
from halo_fast.teachers.base import Clip, read_options
from halo_fast.teachers.labelling import judge_pairs
from halo_fast.teachers.openai.config import OpenAIConfig
from halo_fast.teachers.openai.teacher import OpenAIJudge
from halo_fast.teachers.rubric import RUBRIC_DIMENSIONS
from halo_fast.teachers.store import LabelStore

__all__ = ["openai"]

_PLACE = "evaluate.judge_options.openai"
# of the first clip of a pair; both orders must agree for a win
_SCORES = {"a": 1.0, "tie": 0.5, "inconsistent": 0.5, "b": 0.0}


def openai(
    clips: Sequence[Video],
    prompts: Sequence[str],
    fps: float,
    device: str,
    *,
    store: Path,
    seed: int = 0,
    **options: Any,
) -> JudgeTable:
    """Wins of clips over the other clip of their prompt, asked in both orders: 1, or 0.5 for a tie, or 0.

    A model that prefers whichever clip comes first contradicts itself, which counts as a tie. A pair without a usable
    answer is NaN. Every answer is kept in `store` and paid once; the key is read from OPENAI_API_KEY.

    Args:
        clips: as in ClipJudge, likewise the next three.
        prompts: of each clip.
        fps: not read.
        device: not read.
        store: file of answers and spending; in a run labels.sqlite, so that the budget is that of the run.
        seed: of delays.
        options: fields of OpenAIConfig, such as model, base_url, api, budget.

    Raises:
        UserError: an option that there is not, the budget used up, a server that refuses; what was paid is kept.
        ValueError: clips 2k and 2k + 1 that have not the same prompt.
    """
    if len(clips) % 2 or prompts[::2] != prompts[1::2]:
        raise ValueError("clips: expected two of each prompt next to each other, base and aligned")
    if "pairwise" in options:
        raise UserError(f"{_PLACE}: expected no option 'pairwise'; a judge always compares, remove it")
    config = read_options(OpenAIConfig, options | {"pairwise": True}, _PLACE)
    read = [Clip(hash_video(clip), text, partial(read_video, clip)) for clip, text in zip(clips, prompts, strict=True)]
    pairs = list(zip(read[::2], read[1::2], strict=True))
    # a LoRA that changes nothing gives equal clips, about which nothing needs to be asked
    asked = [pair for pair in pairs if pair[0].hash != pair[1].hash]
    try:
        with LabelStore(store) as answers:
            judge = OpenAIJudge(config, (1, 1, 1), answers, seed=seed)
            found = iter(judge_pairs(asked, judge, answers))
    except UserError as error:
        raise UserError(str(error).replace("annotate.openai", _PLACE)) from error
    equal = dict.fromkeys(RUBRIC_DIMENSIONS, "tie") | {"status": "ok"}
    rows = [row for a, b in pairs for row in _scores(next(found) if a.hash != b.hash else equal)]
    return JudgeTable(judge.name, rows)


def _scores(judgement: Mapping[str, str]) -> list[dict[str, float]]:
    """Scores of both clips of a pair."""
    if judgement["status"] != "ok":
        return [dict.fromkeys(RUBRIC_DIMENSIONS, math.nan)] * 2
    first = {name: _SCORES[judgement[name]] for name in RUBRIC_DIMENSIONS}
    return [first, {name: 1 - score for name, score in first.items()}]
