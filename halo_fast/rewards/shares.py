"""Shares of a batch: each process computes the logits of its own clips, and all have the loss of the whole batch.

A loss may compare any two clips of a batch, so it is computed from all logits, which processes exchange first. On each
process only the logits of its own clips have a gradient. So the sum of all processes' gradients is that of the batch,
whatever the loss is and wherever labels are missing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from halo_fast import processes
from halo_fast.errors import UserError
from halo_fast.files import laid_out_like

__all__ = ["Share", "add_up_gradients"]

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


@dataclass(frozen=True)
class Share:
    """The rows of a batch that this process computes.

    Args:
        rows: int64 [n], ascending, at least one.
        total: N, rows of the whole batch.
        counts: False if the batch has fewer rows than there are processes and none is left for this one. It computes
            a row all the same, so that all processes go the same way, and nobody uses the result.
    """

    rows: Tensor
    total: int
    counts: bool = True

    @classmethod
    def of(cls, total: int) -> Share:
        """Every n-th row of `total`, n being the number of processes."""
        return cls._with(torch.arange(total)[processes.rank() :: processes.count()], total)

    def of_first(self, total: int) -> Share:
        """Those rows of this share, its first ones, that are among the first `total` of the batch."""
        return self._with(self.rows[(self.rows < total) & self.counts], total)

    @classmethod
    def _with(cls, rows: Tensor, total: int) -> Share:
        return cls(rows, total) if len(rows) else cls(torch.tensor([0]), total, counts=False)

    def join(self, own: Tensor) -> Tensor:
        """The rows of all processes [N, ...] from those of this one [n, ...], which alone keep their gradient."""
        if processes.count() == 1:
            return own
        rows, whole = self.rows.to(own.device), own.new_zeros(self.total, *own.shape[1:])
        if self.counts:
            whole[rows] = own.detach()
        processes.add_up([whole])
        return whole.index_copy(0, rows, own) if self.counts else whole

    @contextmanager
    def dropout(self) -> Iterator[None]:
        """A context in which dropout draws for the whole batch, so that a row is the same on any process."""
        if processes.count() == 1:
            yield
            return
        with _WholeDropout(self):
            yield


class _WholeDropout(TorchFunctionMode):
    """Takes the rows of a share out of what dropout makes of a whole batch."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self.share = share

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function not in _DROPOUTS:
            return function(*args, **(kwargs or {}))
        bound = inspect.signature(function).bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        given = bound.arguments
        if not given["training"] or not given["p"]:
            return function(**given)
        own = given["input"]
        if len(own) != len(self.share.rows):
            raise UserError(
                f"reward.backbone: on several processes dropout needs a row for each of {len(self.share.rows)} clips, "
                f"got {list(own.shape)}; put the clips first"
            )
        rows = self.share.rows.to(own.device)
        # random numbers come in the order in which a tensor lies in memory, which index_copy would not keep
        whole = laid_out_like(own, self.share.total, own.dtype).to(own.device).index_copy_(0, rows, own)
        return function(**given | {"input": whole}).index_select(0, rows)


def add_up_gradients(parameters: Sequence[Tensor]) -> None:
    """Sum gradients over all processes; what has none on any of them keeps none, so that the optimiser leaves it."""
    if processes.count() == 1:
        return
    known = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    processes.add_up([*(parameter.grad for parameter in parameters if parameter.grad is not None), known])
    for parameter, anywhere in zip(parameters, known.tolist(), strict=True):
        if not anywhere:
            parameter.grad = None
