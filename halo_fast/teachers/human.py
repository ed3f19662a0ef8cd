"""People as teachers: their scores are in the label store before anybody is asked."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halo_fast.errors import UserError
from halo_fast.teachers.base import Clip, TeacherRequest
from halo_fast.teachers.rubric import Label

__all__ = ["Person", "load_person", "person_name"]


@dataclass
class Person:
    """Someone who scores on the page of `halo label`.

    Args:
        name: "human:" and the name given to `halo label`.
        grid: patches along time, height and width.
    """

    name: str
    grid: tuple[int, int, int]

    def labels(self, clips: Sequence[Clip], compared: Sequence[tuple[Clip, Clip]] = ()) -> Iterator[tuple[int, Label]]:
        """No scores: only clips that the store has no label of come here."""
        missing = Label(status="unlabelled", reason="not scored on the page of halo label yet")
        return ((index, missing) for index in range(len(clips)))


def load_person(request: TeacherRequest) -> Person:
    """The person that a request names as "human:NAME"; UserError where the name is missing or is no name."""
    return Person(person_name(request.name.partition(":")[2], "annotate.teacher"), request.grid)


def person_name(name: str, setting: str = "name") -> str:
    """The teacher's name of a person.

    Args:
        name: of the person alone.
        setting: under which a mistake is reported.

    Raises:
        UserError: anything but letters, digits, "." "_" and "-".
    """
    if not re.fullmatch(r"[\w.-]{1,64}", name):
        raise UserError(f'{setting}: expected letters, digits, . _ or - (as in "human:anna"), got {name!r}')
    return f"human:{name}"
