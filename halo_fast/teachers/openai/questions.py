"""Questions to a model: a JSON text, pictures and a strict schema; the schema alone decides how an answer is read."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from halo_fast.files import hash_text
from halo_fast.patches import PatchGrid
from halo_fast.teachers.openai.pictures import Picture, cut_frame, even_steps, whole_frame
from halo_fast.teachers.rubric import RUBRIC, RUBRIC_DIMENSIONS

__all__ = ["Answer", "Job", "Question", "ask_pair", "ask_patches", "ask_video", "parse", "schema"]

SCORES = tuple(grade / 2 for grade in range(2, 11))
VERDICTS = ("first", "second", "tie")
_MOST_FIELDS = 100  # of a schema; servers bound the size of strict ones


@dataclass(frozen=True)
class Question:
    """One request.

    Args:
        key: hash of everything that the answer depends on.
        text: JSON text beside the pictures.
        pictures: in order.
        fields: names that the answer must have, beside its remarks.
        choices: values that each field may have: SCORES or VERDICTS.
    """

    key: str
    text: str
    pictures: tuple[Picture, ...]
    fields: tuple[str, ...]
    choices: tuple[float | str, ...] = SCORES


Job = Callable[[], list[Question]]  # makes the questions about one clip or pair


@dataclass(frozen=True)
class Answer:
    """The values of a question's fields if status is "ok", and otherwise the reason why there are none."""

    status: str
    values: Mapping[str, float | str] = field(default_factory=dict)
    reason: str = ""


def schema(question: Question) -> dict[str, Any]:
    """The JSON schema of the answer, in the subset that strict structured outputs allow."""
    kind = "string" if isinstance(question.choices[0], str) else "number"
    value = {"$ref": "#/$defs/value"}
    return {
        "type": "object",
        "properties": {"remarks": {"type": "string"}} | dict.fromkeys(question.fields, value),
        "required": ["remarks", *question.fields],
        "additionalProperties": False,
        "$defs": {"value": {"type": kind, "enum": list(question.choices)}},
    }


def parse(question: Question, text: str) -> Answer:
    """Read an answer by the question's schema: "ok", "malformed" or "out_of_range", never a guess."""
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        return Answer("malformed", reason=f"no JSON by the schema: {str(error)[:80]}; it begins {text[:80]!r}"[:200])
    if not isinstance(values, dict):
        return Answer("malformed", reason=f"expected a JSON object, got {type(values).__name__}")
    expected = {"remarks", *question.fields}
    for name in [*question.fields, "remarks", *sorted(values)]:
        if name not in values or name not in expected:
            return Answer("malformed", reason=f"{'missing' if name in expected else 'unknown'} field {name!r}"[:200])
    if not isinstance(values["remarks"], str):
        return Answer("malformed", reason="remarks: expected a string")
    for name in question.fields:
        value = values[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value in question.choices and number == (question.choices is SCORES):
            continue
        if question.choices is SCORES and number and not 1 <= value <= 5:
            return Answer("out_of_range", reason=f"{name}: expected 1 to 5, got {value!r}"[:200])
        return Answer("malformed", reason=f"{name}: not a value of the schema: {value!r}"[:200])
    return Answer("ok", {name: values[name] for name in question.fields})


def ask_video(clip_hash: str, prompt: str, video: np.ndarray, teacher: str, max_frames: int) -> Question:
    """Ask for the scores of a whole video, uint8 [F, H, W, 3], by frames at equal steps."""
    frames = even_steps(0, len(video), max_frames)
    text = _text("video", prompt, len(video), frames, RUBRIC_DIMENSIONS)
    key = _key("video", teacher, prompt, clip_hash)
    return Question(key, text, tuple(whole_frame(video[frame]) for frame in frames), RUBRIC_DIMENSIONS)


def ask_pair(
    clip_hashes: tuple[str, str], prompt: str, videos: Sequence[np.ndarray], teacher: str, max_frames: int
) -> Question:
    """Ask which of two videos of one prompt is the better one; `max_frames` is of both together."""
    frames = [even_steps(0, len(video), max(max_frames // 2, 1)) for video in videos]
    text = _text("pair", prompt, [len(video) for video in videos], frames, RUBRIC_DIMENSIONS)
    pictures = tuple(whole_frame(video[frame]) for video, some in zip(videos, frames, strict=True) for frame in some)
    return Question(_key("pair", teacher, prompt, *clip_hashes), text, pictures, RUBRIC_DIMENSIONS, VERDICTS)


def ask_patches(
    clip_hash: str,
    prompt: str,
    video: np.ndarray,
    teacher: str,
    grid: PatchGrid,
    patches: Sequence[int],
    patch_frames: int,
    max_images: int,
) -> list[Question]:
    """Ask for scores of patches, in as few requests as the bounds on images and on fields allow.

    Args:
        clip_hash: of the clip's file.
        prompt: of the clip.
        video: uint8 [F, H, W, 3].
        teacher: whose name is part of the key.
        grid: patches of the video.
        patches: those that are asked about, ascending f-major numbers from 0.
        patch_frames: frames of each time span.
        max_images: in one request.
    """
    edges = grid.pixel_edges(0)
    frames = [even_steps(edges[span], edges[span + 1], min(patch_frames, max_images)) for span in range(grid.grid[0])]
    questions = []
    for spans, asked in _requests(grid, patches, [len(some) for some in frames], max_images):
        fields = tuple(f"patch_{patch + 1}" for patch in asked)
        chosen = [(frame, span) for span in spans for frame in frames[span]]
        text = _text("patches", prompt, len(video), [frame for frame, _ in chosen], fields)
        pictures = tuple(cut_frame(video[frame], grid, span) for frame, span in chosen)
        key = _key("patches", teacher, prompt, clip_hash, [grid.pixel_edges(axis) for axis in range(3)], fields)
        questions.append(Question(key, text, pictures, fields))
    return questions


def _requests(
    grid: PatchGrid, patches: Sequence[int], images: Sequence[int], max_images: int
) -> list[tuple[list[int], list[int]]]:
    """The time spans and patches of each request; `images` has the number of images of each span."""
    per_span = math.prod(grid.grid[1:])
    requests: list[tuple[list[int], list[int]]] = []
    used = 0  # images of the last request
    for span in range(grid.grid[0]):
        asked = [patch for patch in patches if patch // per_span == span]
        for start in range(0, len(asked), _MOST_FIELDS):
            part = asked[start : start + _MOST_FIELDS]
            fits = requests and used + images[span] <= max_images
            if fits and len(requests[-1][1]) + len(part) <= _MOST_FIELDS:
                requests[-1][0].append(span)
                requests[-1][1].extend(part)
                used += images[span]
            else:
                requests.append(([span], list(part)))
                used = images[span]
    return requests


def _text(
    task: str, prompt: str, num_frames: int | list[int], frames: list[int] | list[list[int]], fields: Sequence[str]
) -> str:
    # whatever the prompt holds, it stays within its JSON string
    question = {"task": task, "prompt": prompt, "num_frames": num_frames, "frames": frames, "fields": list(fields)}
    return json.dumps(question)


def _key(*parts: object) -> str:
    return hash_text(json.dumps([RUBRIC, *parts]))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a field twice")
    return dict(pairs)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
