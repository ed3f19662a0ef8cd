"""What every judge shares: the call, the table that it gives, and how a judge is found by its name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from halo_fast.data.clips import read_clip
from halo_fast.errors import UserError
from halo_fast.registry import register, require, resolve, user_errors
from halo_fast.settings import validate_arguments

__all__ = ["ClipJudge", "JudgeTable", "Video", "hash_video", "judge_clips", "load_judge", "read_video"]

register(
    "judge",
    {
        "frames": "halo_fast.judges.dimensions:frames",
        "vbench": "halo_fast.judges.vbench:vbench",
        "vbench2": "halo_fast.judges.vbench:vbench2",
        "videoscore": "halo_fast.judges.videoscore:videoscore",
        "videoscore2": "halo_fast.judges.videoscore2:videoscore2",
        "videoreward": "halo_fast.judges.videoreward:videoreward",
        "reward_model": "halo_fast.judges.models:reward_model",
        "openai": "halo_fast.judges.comparison:openai",
    },
)

Video = Path | Tensor
"""A clip: its file, or its frames as uint8 [F, H, W, 3]."""

Totals = Callable[[Mapping[str, float]], Mapping[str, float]]
_CALL = ("clips", "prompts", "fps", "device")


@dataclass(frozen=True)
class JudgeTable:
    """What a judge says of clips.

    Args:
        name: of the judge, with whatever tells it from others.
        scores: for each clip, a score of each dimension; higher is better, NaN where the judge says nothing.
        optimised: whether training optimised this judge itself; a gain on it is no evidence then.
        amounts: whether the scores are amounts, such as of motion, of which more is no better by itself. They are
            shown, but neither confirm a gain nor speak of reward hacking.
        totals: makes further figures of the mean scores of one model's clips, such as a benchmark's total.
    """

    name: str
    scores: Sequence[Mapping[str, float]]
    optimised: bool = False
    amounts: bool = False
    totals: Totals | None = None


class ClipJudge(Protocol):
    """Scores clips. Registered, or named by "package.module:attribute", as a function.

    Its keyword arguments are its options. `folder`, `store`, `grid` and `seed` are given by `halo evaluate` to a judge
    that has arguments of these names: a folder for work in progress, the file of paid answers, the patches (f, h, w)
    and the seed of whatever is drawn.
    """

    def __call__(
        self, clips: Sequence[Video], prompts: Sequence[str], fps: float, device: str, **options: Any
    ) -> JudgeTable:
        """Score clips, which are read one at a time.

        Args:
            clips: two for each prompt, next to each other, from the same noise: the base model's, the aligned one's.
            prompts: of each clip.
            fps: frames a second of the clips.
            device: such as "cuda:0" or "cpu".
            options: what only this judge has.
        """


def load_judge(
    name: str, options: Mapping[str, Any], given: Mapping[str, Any], setting: str = "evaluate.judge_options"
) -> Callable[..., JudgeTable]:
    """A judge with its options.

    Args:
        name: registered or dotted.
        options: of the user.
        given: arguments for a judge that has them and was given no option of the name.
        setting: place of the options in messages.

    Raises:
        UserError: no such judge, an option that it does not have, one of another type or out of bounds, a missing one.
    """
    found, place = resolve("judge", name, "evaluate.judges"), f"{setting}.{name}"
    if not callable(found):
        raise UserError(f"evaluate.judges: expected {name!r} to be a function, got {type(found).__name__}")
    parameters = inspect.signature(found).parameters
    missing = [one for one in _CALL if one not in parameters]
    if missing:
        raise UserError(f"evaluate.judges: expected {name!r} to take {', '.join(_CALL)}; it has no {missing[0]}")
    own = {one: value for one, value in parameters.items() if one not in _CALL}
    free = any(value.kind is value.VAR_KEYWORD for value in own.values())
    unknown = sorted(set(options) - set(own))
    if unknown and not free:
        raise UserError(f"{place}: expected some of {', '.join(own) or 'none'}, got {unknown[0]!r}; remove it")
    arguments = {one: value for one, value in given.items() if one in own} | dict(options)
    for one, value in own.items():
        if value.kind is value.KEYWORD_ONLY and value.default is value.empty and one not in arguments:
            raise UserError(f"{place}.{one}: required; set it")
    _check_types(found, options, place)
    return partial(found, **arguments)


def _check_types(judge: Any, options: Mapping[str, Any], place: str) -> None:
    """Check options by the annotations of the judge, if it has some."""
    annotated = {one: value for one, value in options.items() if one in getattr(judge, "__annotations__", {})}
    for name, value in annotated.items():
        try:
            validate_arguments(judge, {name: value})
        except UserError as error:
            raise UserError(f"{place}.{error}") from error


def judge_clips(
    name: str, judge: Callable[..., JudgeTable], clips: Sequence[Video], prompts: Sequence[str], fps: float, device: str
) -> JudgeTable:
    """Call a judge and check its table.

    Args:
        name: under which the judge was found.
        judge: as `load_judge` gives it.
        clips: as in `ClipJudge`, likewise the others.
        prompts: of each clip.
        fps: frames a second.
        device: of the computation.

    Raises:
        UserError: a judge of the user's own that fails, or a table that does not fit the clips.
    """
    place = f"evaluate.judges: {name!r}"
    with user_errors("judge", name, "evaluate.judges"):
        table: JudgeTable = judge(clips, prompts, fps, device)
    require(table, ("name", "scores", "optimised", "amounts", "totals"), name, "evaluate.judges")
    if len(table.scores) != len(clips):
        raise UserError(f"{place}: expected scores of {len(clips)} clips, got {len(table.scores)}")
    dimensions = set(table.scores[0]) if table.scores else set()
    for index, row in enumerate(table.scores):
        if set(row) != dimensions or not dimensions:
            raise UserError(f"{place}: expected the same dimensions for every clip, got {sorted(row)} for clip {index}")
        given: dict[str, Any] = dict(row)  # whatever a judge of the user's own put there
        wrong = [one for one, value in given.items() if not isinstance(value, Real) or math.isinf(value)]
        if wrong:
            raise UserError(f"{place}: expected a number or NaN for clip {index}, {wrong[0]}, got {row[wrong[0]]!r}")
    return replace(table, scores=[{one: float(value) for one, value in row.items()} for row in table.scores])


def read_video(clip: Video) -> Tensor:
    """The frames of a clip, uint8 [F, H, W, 3].

    Raises:
        UserError: an unreadable file.
        ValueError: a tensor of another shape or dtype.
    """
    if not isinstance(clip, Tensor):
        return read_clip(clip)
    if str(clip.dtype) != "torch.uint8" or clip.ndim != 4 or clip.shape[-1] != 3:
        raise ValueError(f"clips: expected uint8 [F, H, W, 3], got {clip.dtype} {list(clip.shape)}")
    return clip


def hash_video(clip: Video) -> str:
    """SHA-256 of a clip's file, or of its frames."""
    from halo_fast.files import hash_file, hash_tensors

    return hash_tensors({"clip": clip}) if isinstance(clip, Tensor) else hash_file(clip)
