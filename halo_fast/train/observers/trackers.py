"""Trackers of accelerate (tensorboard, wandb); train/log.csv is written whether there are any or not."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from halo_fast.errors import UserError
from halo_fast.train.config import TrainConfig

__all__ = ["check_trackers", "tracked"]

PROJECT = "halo_fast"
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}

Log = Callable[[Sequence[Mapping[str, float | str]]], None]


def check_trackers(names: Sequence[str]) -> None:
    """Hold that every tracker of `report_to` is known and installed; accelerate itself leaves out the others silently.

    Raises:
        UserError: naming the tracker and what to install.
    """
    for name in names:
        if name not in _PACKAGES:
            raise UserError(
                f"train.report_to: expected some of {', '.join(_PACKAGES)}, got {name!r}; log.csv is always on"
            )
        if find_spec(_PACKAGES[name]) is None:
            raise UserError(f"train.report_to: {name} is not installed; pip install {_PACKAGES[name]}, or leave it out")


@contextmanager
def tracked(accelerator: Any, config: TrainConfig, folder: Path | None) -> Iterator[Log]:
    """A function that sends rows of the log to the trackers of the block; does nothing without `config.report_to`.

    Rows carry their step; "loss" becomes "train/loss", names that have a slash stay as TRL has them
    ("rewards/margins"). NaN, a mean over nothing, is not sent.

    Args:
        accelerator: accelerate.Accelerator(log_with=config.report_to, project_dir=folder).
        config: the settings, which the trackers keep as hyper-parameters.
        folder: of the training, where tensorboard writes.

    Raises:
        UserError: tensorboard without a folder.
    """
    if not config.report_to:
        yield lambda rows: None
        return
    if folder is None and "tensorboard" in config.report_to:
        raise UserError("train.report_to: tensorboard needs a folder to write to; train in a run directory")
    accelerator.init_trackers(PROJECT, config=_flat(asdict(config)))

    def log(rows: Sequence[Mapping[str, float | str]]) -> None:
        for row in rows:
            values = {
                name if "/" in name else f"train/{name}": value
                for name, value in row.items()
                if name != "step" and isinstance(value, int | float) and math.isfinite(value)
            }
            accelerator.log(values, step=int(row["step"]))

    try:
        yield log
    finally:
        # accelerate's own end_training would also end the process group, which the export of sharded weights needs.
        for tracker in accelerator.trackers:
            tracker.finish()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as tensorboard takes them: dotted names, numbers and text."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, int | float | str) else str(value)
    return flat
