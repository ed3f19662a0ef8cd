"""Batches that another process reads and draws ahead of the step, through torch's DataLoader."""

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from halo_fast.data import Pair
from halo_fast.errors import UserError, first_line
from halo_fast.train.draws import Drawn

__all__ = ["drawn_ahead", "workers_for"]

_AHEAD = 2  # batches that wait for the step, which reads them faster than it computes
_DIES_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def workers_for(pairs: Sequence[Pair], device: torch.device) -> int:
    """Processes that read ahead: one, which fills a batch in less time than a step of any real model takes.

    None for pairs in a CPU's memory, where only noise is left to draw; for tensors of a GPU, which no other process may
    touch; in a daemonic process, which may have none; and where forking is not safe, which is everywhere but on Linux.

    Args:
        pairs: to train on.
        device: of the training.
    """
    first = pairs[0]
    on_cpu = all(value.device.type == "cpu" for value in (first.latents, *first.conditions.values()))
    in_memory = isinstance(pairs, list | tuple) and device.type == "cpu"
    possible = sys.platform == "linux" and not multiprocessing.current_process().daemon
    return int(possible and on_cpu and not in_memory)


class _Draws(Dataset[Drawn | UserError]):
    """What a worker makes of a number; a user's mistake travels as it is, not as the text of a traceback."""

    def __init__(self, draw: Callable[[int], Drawn]) -> None:
        self._draw = draw

    def __getitem__(self, number: int) -> Drawn | UserError:
        try:
            return self._draw(number)
        except UserError as error:
            return error


@contextmanager
def drawn_ahead(
    draw: Callable[[int], Drawn], numbers: range, workers: int, device: torch.device
) -> Iterator[Iterator[Drawn]]:
    """The batches of some numbers in their order, made ahead while earlier ones are used.

    Args:
        draw: makes a batch from its number alone.
        numbers: of the batches.
        workers: processes that make them; 0 makes each when it is asked for.
        device: they go to; for CUDA they are put into pinned memory.

    Raises:
        UserError: what `draw` raises, in its place in the order; a worker that has died.
    """
    loader = DataLoader(
        _Draws(draw), batch_size=None, sampler=numbers, num_workers=workers, collate_fn=_as_it_is,
        pin_memory=device.type == "cuda", worker_init_fn=_prepare_worker,
        multiprocessing_context="fork" if workers else None, prefetch_factor=_AHEAD if workers else None,
        generator=torch.Generator(),  # the loader draws a seed, which must not be taken from the global generator
    )  # fmt: skip
    batches = _given(iter(loader))
    try:
        yield batches
    except RuntimeError as error:
        # from the loader's queue, or from its handler of SIGCHLD at any place of the step
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"train: the process that reads pairs ahead has died ({first_line(error)}); run the same command again, "
            "and give it more memory, or more shared memory (/dev/shm), if that happens twice"
        ) from None
    finally:
        batches.close()  # ends the workers


def _given(batches: Iterator[Drawn | UserError]) -> Generator[Drawn, None, None]:
    for drawn in batches:
        if isinstance(drawn, UserError):
            del batches  # a traceback would keep them, and with them their process
            raise drawn
        yield drawn


def _as_it_is(drawn: Any) -> Any:
    return drawn


def _prepare_worker(number: int) -> None:
    """Leave signals to the training, which may save after SIGTERM and needs its batches until then; die with it.

    A worker that outlived a killed training would hold the locks of its stage for some seconds.
    """
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
