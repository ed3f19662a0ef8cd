"""Trackers of accelerate (tensorboard, wandb), which get the rows of the log; log.csv is written in any case."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from halo_fast.errors import UserError
from halo_fast.train.config import TrainConfig
from halo_fast.train.observers.base import Observer
from halo_fast.train.observers.log import Log

__all__ = ["Trackers", "open_trackers"]

PROJECT = "halo_fast"


class Trackers(Observer):
    """Sends new rows of the log to accelerate's trackers.

    Rows carry their step. "loss" becomes "train/loss"; names that have a slash stay as TRL has them
    ("rewards/margins"). NaN, a mean over nothing, is not sent.

    Args:
        accelerator: accelerate's, with its trackers initialised.
        log: whose new rows are sent; it must report first.
    """

    name = "trackers"

    def __init__(self, accelerator: Any, log: Log) -> None:
        self._accelerator, self._log = accelerator, log

    def report(self, done: int) -> None:
        for row in self._log.new_rows:
            values = {
                name if "/" in name else f"train/{name}": value
                for name, value in row.items()
                if name != "step" and math.isfinite(value)
            }
            self._accelerator.log(values, step=int(row["step"]))


@contextmanager
def open_trackers(accelerator: Any, config: TrainConfig, folder: Path | None, log: Log) -> Iterator[list[Observer]]:
    """The observer of the trackers in `config.report_to`, which are closed after the block; none without any.

    Args:
        accelerator: accelerate.Accelerator(log_with=config.report_to, project_dir=folder).
        config: the settings, which the trackers keep as hyper-parameters.
        folder: of the training, where tensorboard writes.
        log: whose rows are sent.

    Raises:
        UserError: tensorboard without a folder.
    """
    if not config.report_to:
        yield []
        return
    if folder is None and "tensorboard" in config.report_to:
        raise UserError("train.report_to: tensorboard needs a folder to write to; train in a run directory")
    accelerator.init_trackers(PROJECT, config=_flatten(asdict(config)))
    try:
        yield [Trackers(accelerator, log)]
    finally:
        # accelerate's own end_training would also end the process group, which the export of sharded weights needs.
        for tracker in accelerator.trackers:
            tracker.finish()


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as tensorboard takes them: dotted names, numbers and text."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | str) else str(value)
    return flat
