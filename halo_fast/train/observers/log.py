"""log.csv: a row for every step, of all processes' pairs."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.files import write_csv
from halo_fast.loss.figures import PairFigures
from halo_fast.train.job import Job
from halo_fast.train.observers.base import Observer
from halo_fast.train.parallel import gather_rows
from halo_fast.train.steps import learning_rate

__all__ = ["Log", "read_rows"]

_FILE = "log.csv"
_INTEGERS, _TEXTS = ("step", "count"), ("split", "label", "group", "bucket")


@dataclass(frozen=True)
class _Step:
    """A step's figures on the device."""

    figures: Sequence[PairFigures]
    norm: Tensor
    beta: dict[str, Tensor]

    def values(self, one_bucket: bool) -> dict[str, Tensor]:
        """What the row holds, over the pairs of all processes, which must all call."""
        if one_bucket:
            metrics = PairFigures.join(self.figures, gather_rows).metrics()
        else:
            metrics = PairFigures.joined_metrics(self.figures, gather_rows)
        return {"loss": metrics["loss"], "grad_norm": self.norm, **metrics, **self.beta}


class Log(Observer):
    """Keeps a row for every step; figures wait on the device and are read together.

    Args:
        job: the training.
    """

    name = "log"

    def __init__(self, job: Job) -> None:
        self.rows: list[dict[str, float]] = []
        self.first_new = 0
        self._job = job
        self._waiting: list[_Step] = []

    @property
    def new_rows(self) -> list[dict[str, float]]:
        """Rows of the last report."""
        return self.rows[self.first_new :]

    def after_step(self, step: int, figures: Sequence[PairFigures], norm: Tensor) -> None:
        beta = {} if self._job.auto_beta is None else {"beta": self._job.auto_beta.beta}
        self._waiting.append(_Step(figures, norm, beta))

    def due(self, done: int) -> bool:
        config = self._job.config
        return done % config.logging_steps == 0 or done == config.max_train_steps

    def report(self, done: int) -> None:
        self.first_new = len(self.rows)
        if not self._waiting:
            return
        rows = [step.values(self._job.one_bucket) for step in self._waiting]
        table = torch.stack([torch.stack([value.detach().float() for value in row.values()]) for row in rows])
        for step, values in enumerate(table.tolist(), start=len(self.rows)):
            rate = learning_rate(step, self._job.config)
            self.rows.append({"step": step + 1, "learning_rate": rate, **dict(zip(rows[-1], values, strict=True))})
        self._waiting.clear()

    def write(self, folder: Path) -> None:
        write_csv(folder / _FILE, self.rows)

    def restore(self, folder: Path, step: int, state: dict[str, Tensor]) -> None:
        path = folder / _FILE
        self.rows = read_rows(path, step)
        if [row["step"] for row in self.rows] != list(range(1, step + 1)):
            raise UserError(
                f"{path}: expected a row for each of the steps 1 to {step} that the checkpoint has seen, got "
                f"{len(self.rows)}; put the file back, or start in another folder"
            )


def read_rows(path: Path, last: int) -> list[dict[str, float]]:
    """Rows of log.csv or diagnostics.csv up to a step; none if there is no file."""

    def value(name: str, text: str) -> float | int | str:
        if name in _TEXTS:
            return text
        return int(text) if name in _INTEGERS else float(text)

    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = [
            # an empty cell is a figure that this row has not, but for the bucket of the group "all"
            {name: value(name, text) for name, text in row.items() if text != "" or name == "bucket"}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row["step"] <= last]  # type: ignore[operator, misc]
