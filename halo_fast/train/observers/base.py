"""What watches a training: an observer keeps the statistics of each step, and reports when it is due."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from halo_fast.loss.figures import PairFigures

__all__ = ["Observer"]


class Observer:
    """Watches a training; a subclass overrides what it needs.

    Whenever one observer is due, and before every checkpoint, all of them report in their order, and then write their
    files. So a guard that stops the training keeps everything after it from being written.
    """

    name: ClassVar[str]

    def after_step(self, step: int, figures: Sequence[PairFigures], norm: Tensor) -> None:
        """Keep the statistics of a step; must not wait for the device.

        Args:
            step: from 0.
            figures: of this process's batches.
            norm: 0-d, of the gradient before clipping.
        """

    def due(self, done: int) -> bool:
        """Whether to report after this many optimiser steps; the same in every process."""
        return False

    def report(self, done: int) -> None:
        """Read from the device, check and write messages; every process calls it, also when another observer is due."""

    def write(self, folder: Path) -> None:
        """Write this observer's file into the training's folder; the main process alone calls it."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold: tensors, and values for JSON."""
        return {}

    def restore(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            folder: of the training, with this observer's file.
            step: optimiser steps done.
            state: what `state` gave, tensors on the CPU.
        """
