"""The protocol of teachers, and how a teacher is made from its name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.patches import PIXELS, LatentFactors
from halo_fast.registry import create, known, register
from halo_fast.settings import validate
from halo_fast.teachers.rubric import Label
from halo_fast.teachers.store import LabelStore

__all__ = ["Clip", "Judge", "Paid", "Teacher", "TeacherRequest", "build_teacher", "label_in_batches", "read_options"]

Options = TypeVar("Options")

register(
    "teacher",
    {"openai": "halo_fast.teachers.openai.teacher:load_openai", "human": "halo_fast.teachers.human:load_person"},
)


@dataclass(frozen=True)
class Clip:
    """A clip to be scored.

    Args:
        hash: SHA-256 of the clip's bytes.
        prompt: the text that the clip was made from.
        frames: reads the frames, uint8 [F, H, W, 3].
    """

    hash: str
    prompt: str
    frames: Callable[[], Tensor]


class Teacher(Protocol):
    """Scores clips and their patches by the rubric; one that also compares clips is a `Judge`.

    Attributes:
        name: the teacher and all that changes its answers (model, version, settings); answers are stored under it.
        grid: patches along time, height and width that the teacher scores.
    """

    name: str
    grid: tuple[int, int, int]

    def labels(self, clips: Sequence[Clip], compared: Sequence[tuple[Clip, Clip]] = ()) -> Iterator[tuple[int, Label]]:
        """Score clips, in any order.

        Args:
            clips: to be scored.
            compared: pairs that `judge` will get afterwards, for an estimate of the whole cost.

        Yields:
            The index of a clip and its label; a label without scores says why.
        """
        ...


@runtime_checkable
class Judge(Teacher, Protocol):
    """A teacher that also compares clips."""

    def judge(self, pairs: Sequence[tuple[Clip, Clip]]) -> Iterator[tuple[int, Mapping[str, str]]]:
        """Compare the clips a and b of each pair, in any order.

        Yields:
            The index of a pair and its judgement: "status", "reason" and, if the status is "ok", one of "a", "b", "tie"
            and "inconsistent" for each of RUBRIC_DIMENSIONS.
        """
        ...


@runtime_checkable
class Paid(Teacher, Protocol):
    """A teacher that costs money."""

    def check_budget(self, clips: Sequence[Clip], compared: Sequence[tuple[Clip, Clip]] = ()) -> None:
        """Raise UserError if the budget cannot hold the questions about these clips and pairs; nothing is asked.

        There may be no clips, where they are not known yet; then only what is needed to ask at all is checked.
        """
        ...


@dataclass(frozen=True)
class TeacherRequest:
    """Everything that a teacher may be made from.

    Args:
        name: registered name, perhaps with more after a colon ("human:anna"), or "package.module:attribute".
        grid: patches along time, height and width.
        store: labels, requests and spending of this run; a paid teacher keeps its requests there.
        options: what only this teacher has: fields of OpenAIConfig for "openai", whatever it reads for your own.
        video_size: frames, height and width of the clips, if they are known.
        prompts: of the clips.
        seed: of random choices.
        factors: how latents lie on the clips, by which the grid divides them.
    """

    name: str
    grid: tuple[int, int, int]
    store: LabelStore
    options: Mapping[str, Any] = field(default_factory=dict)
    video_size: tuple[int, int, int] | None = None
    prompts: Sequence[str] = ()
    seed: int = 0
    factors: LatentFactors = PIXELS


def build_teacher(request: TeacherRequest, setting: str = "teacher") -> Teacher:
    """The teacher that a request names: what the registered or dotted callable makes of the request.

    Args:
        request: whose `name` is resolved.
        setting: under which an unknown name is reported.

    Raises:
        UserError: no name, an unknown one, or a request that the teacher cannot serve.
    """
    family = request.name.partition(":")[0]
    name = family if family in known("teacher") else request.name
    if not name:
        names = ", ".join(map(repr, known("teacher")))
        raise UserError(f'{setting}: expected one of {names}, or your own as "package.module:attribute"; set it')
    teacher: Teacher = create("teacher", name, setting, request, requires=("name", "grid", "labels"))
    return teacher


def read_options(kind: type[Options], options: Mapping[str, Any], place: str) -> Options:
    """Options as a dataclass.

    Args:
        kind: the dataclass.
        options: values of its fields.
        place: under which a mistake is reported.

    Raises:
        UserError: an option that the dataclass does not have, or a value out of its bounds.
    """
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise UserError(f"{place}: expected some of {', '.join(names)}, got {unknown[0]!r}; remove it")
    read = kind(**options)
    validate(read, place)
    return read


def label_in_batches(
    label: Callable[[Tensor, list[str]], Sequence[Label]], clips: Sequence[Clip], batch_size: int
) -> Iterator[tuple[int, Label]]:
    """Score clips of one size with a function of whole batches.

    Args:
        label: videos uint8 [N, F, H, W, 3] and prompts -> N labels.
        clips: to be scored; only one batch of them is in memory.
        batch_size: N, less in the last batch.

    Yields:
        The index of a clip and its label, in order.
    """
    for start in range(0, len(clips), batch_size):
        batch = clips[start : start + batch_size]
        labels = label(torch.stack([clip.frames() for clip in batch]), [clip.prompt for clip in batch])
        yield from zip(range(start, start + len(batch)), labels, strict=True)
