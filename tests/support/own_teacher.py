"""A teacher of somebody else's, outside the package: it scores clips by their brightness."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halo_fast.teachers import Clip, Label, TeacherRequest


@dataclass
class Brightness:
    """Every score is 1 for black and 5 for white frames, shifted by `bias`."""

    grid: tuple[int, int, int]
    bias: float

    @property
    def name(self) -> str:
        return f"brightness bias={self.bias}"

    def labels(self, clips: Sequence[Clip], compared: Sequence[tuple[Clip, Clip]] = ()) -> Iterator[tuple[int, Label]]:
        """One label after another, the last clip first."""
        f, h, w = self.grid
        for index in reversed(range(len(clips))):
            score = 1 + 4 * clips[index].frames().double().mean().item() / 255 + self.bias
            names = ("visual_quality", "text_alignment", "dynamic_degree")
            yield index, Label(dict.fromkeys(names, score), {"quality": [score] * (f * h * w)})


def brightness(request: TeacherRequest) -> Brightness:
    """The teacher for a run; annotate.options.bias shifts its scores."""
    return Brightness(request.grid, float(request.options.get("bias", 0)))
