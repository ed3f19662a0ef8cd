"""Several processes as one run: who is first, who takes which part of the work, and waiting for one another.

A launcher (`accelerate launch`, torchrun, Slurm) starts the same command several times. `join` makes one run of them.
Then `share` divides work, `by_first` has the first process do what must be done once, and `add_up` sums tensors.
Without a launcher there is one process: nothing here waits, and torch.distributed is not imported.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from halo_fast.errors import UserError
from halo_fast.files import progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "add_up",
    "by_first",
    "count",
    "is_first",
    "join",
    "leave",
    "rank",
    "seen",
    "share",
    "shown",
    "speaks",
    "sum_tensors",
    "tensors_by_first",
    "wait",
]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Value = TypeVar("Value")

_PATIENCE = timedelta(days=365)  # a stage of one process may take days, while the others wait
_MESSAGE = 2**24  # numbers in one message
_SIGHT = 60  # seconds until a network file system must show what another machine wrote
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOST = "halo: another process has ended, so this one does too; the same command continues"


@dataclass
class _Launch:
    """What this process knows of the others.

    Args:
        group: over which all wait, by gloo: connections tell when a process has died, and waiting takes no time.
        store: of counters and values, by key.
        rank: of this process.
        count: of all processes.
        turn: how often all have shared work or heard the first, which names the store's keys.
    """

    group: Any
    store: Any
    rank: int
    count: int
    turn: int = 0

    def key(self) -> str:
        """A new key, which is the same on all processes."""
        self.turn += 1
        return f"turn {self.turn}"


_launch: _Launch | None = None


def join() -> None:
    """Become one of the processes that a launcher has started; does nothing where it has started one.

    Raises:
        UserError: more processes than GPUs, or a launcher that does not say which process this is.
    """
    global _launch
    expected = _started()
    if expected < 2:
        # accelerate sets an address where it was asked for several
        if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "LOCAL_RANK" not in os.environ:
            logger.warning(
                "accelerate launch has started one process, for with --cpu it starts no more; several on a CPU: "
                "torchrun --nproc_per_node 2 -m halo_fast ..."
            )
        return
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    devices, local = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Slurm may show each process a GPU of its own, torchrun shows all to all
    if 0 < devices < local and "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(f"launcher: {local} processes were started here for {devices} GPUs; start one for each GPU")
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt:
        # torchrun keeps its store, in which the addresses of the processes before still stand
        accelerator = torch.accelerator.current_accelerator() if devices else None
        again = dist.PrefixStore(f"attempt {attempt}", _launchers_store())
        dist.init_process_group(
            dist.get_default_backend_for_device(accelerator or "cpu"),
            store=again, rank=int(os.environ["RANK"]), world_size=expected,
        )  # fmt: skip
    # on a CPU accelerate needs cpu=True before it initialises the process group
    state = PartialState(cpu=not devices)
    if state.num_processes != expected:
        raise UserError(
            f"launcher: expected {expected} processes, found {state.num_processes}; start them with `accelerate "
            "launch` or torchrun, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    store = dist.PrefixStore(f"halo {attempt}", _launchers_store())
    _launch = _Launch(group, store, state.process_index, state.num_processes)


def device() -> str:
    """Where this process computes: its GPU, or the CPU where there is none."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def leave() -> None:
    """Wait for the others, and take leave of them."""
    global _launch
    if _launch is None:
        return
    wait()
    _launch = None
    import torch.distributed as dist

    dist.destroy_process_group()


def count() -> int:
    """How many processes work together; 1 inside `by_first`."""
    return 1 if _launch is None else _launch.count


def rank() -> int:
    """The number of this process among those that work together, from 0; 0 inside `by_first`."""
    return 0 if _launch is None else _launch.rank


def is_first() -> bool:
    """Whether this process does what is done once, such as writing tables."""
    return _launch is None or _launch.rank == 0


def speaks() -> bool:
    """Whether this process is the first of all to report a failure; the others end in silence."""
    if _launch is None:  # nothing can be agreed upon yet
        return _started() < 2 or os.environ.get("RANK", "0") == "0"
    try:
        return int(_launch.store.add("reports", 1)) == 1
    except RuntimeError:  # the store is gone with a process that failed earlier
        return False


def wait() -> None:
    """Return once all processes have called it; exit if one of them has died."""
    if _launch is None:
        return
    import torch.distributed as dist

    with _others():
        dist.barrier(group=_launch.group)


def by_first(work: Callable[[], Value]) -> Value:
    """What `work()` gives on the first process, which does it alone while the others wait.

    Args:
        work: called on the first process; nothing in it waits for others. It gives what JSON can hold.
    """
    global _launch
    launch = _launch
    if launch is None:
        return work()
    key = launch.key()
    if launch.rank == 0:
        _launch = None
        try:
            value = work()
        finally:
            _launch = launch
        with _others():
            launch.store.set(key, json.dumps(value))
        wait()
        return value
    wait()
    with _others():
        heard: Value = json.loads(launch.store.get(key))
    return heard


def tensors_by_first(
    work: Callable[[], tuple[Mapping[str, "Tensor"], Value]], into: Mapping[str, "Tensor"] | None = None
) -> tuple[dict[str, "Tensor"], Value]:
    """As `by_first`, of work that gives tensors by name as well.

    Args:
        work: gives tensors on the CPU, and what JSON can hold.
        into: tensors that other processes have already; those are filled where they have the name of one that is given.

    Returns:
        On the first process what `work()` gave, and the same values on the others; without gradients.
    """
    own: dict[str, Tensor] = {}

    def noted() -> tuple[list[tuple[str, list[int], str]], Value]:
        tensors, rest = work()
        own.update({name: tensor.detach() for name, tensor in tensors.items()})
        return [(name, list(one.shape), str(one.dtype).removeprefix("torch.")) for name, one in own.items()], rest

    forms, rest = by_first(noted)
    if _launch is None:
        return own, rest
    import torch
    import torch.distributed as dist

    known = own or {name: tensor.detach() for name, tensor in (into or {}).items()}
    given = {}
    for name, shape, dtype in forms:
        given[name] = known[name] if name in known else torch.empty(shape, dtype=getattr(torch, dtype))
        message = given[name].contiguous()
        with _others():
            dist.broadcast(message, 0, group=_launch.group)
        given[name].copy_(message)
    return given, rest


def add_up(tensors: Sequence["Tensor"]) -> None:
    """Replace tensors by their sums over all processes, in place; every process must call.

    Args:
        tensors: of any shapes, the same on all processes. They travel in the dtype and on the device of the first one.
    """
    if _launch is not None:
        # the launcher's own group knows GPUs alone, where there are any
        group = _launch.group if tensors[0].device.type == "cpu" else None
        with _others():
            sum_tensors(tensors, group)


def sum_tensors(tensors: Sequence["Tensor"], group: Any = None) -> None:
    """Sum tensors of any shapes over a process group in place, many in one message.

    A LoRA's fit into one message or two, a whole model's do not.

    Args:
        tensors: the same shapes on all processes; the dtype and device of the first one are those of the messages.
        group: of torch.distributed; None for the default one.
    """
    import torch
    import torch.distributed as dist

    messages: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if messages[-1] and sum(one.numel() for one in messages[-1]) + tensor.numel() > _MESSAGE:
            messages.append([])
        messages[-1].append(tensor)
    for message in messages:
        together = torch.cat([part.flatten().to(tensors[0]) for part in message])
        if together.numel():
            dist.all_reduce(together, group=group)
        for part, total in zip(message, together.split([part.numel() for part in message]), strict=True):
            part.copy_(total.view_as(part))


def shown(items: Sequence[Item], label: str) -> Iterable[Item]:
    """The items, with progress that the first process shows under a label."""
    return progress(items, len(items), label) if is_first() else items


def share(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yield the items that fall to this process, in order; ends when all processes have finished theirs.

    Whoever is free takes the next one, so that no process waits for a slower one until the end.

    Args:
        items: the same on all processes.
        label: of the progress, which the first process shows.
    """
    launch = _launch
    if launch is None:
        yield from shown(items, label)
        return
    key = launch.key()
    own = _next(launch, key)
    for index, item in enumerate(shown(items, label)):
        if index == own:
            yield item
            own = _next(launch, key)
    wait()


def seen(path: Path) -> Path:
    """The path, as soon as this process sees it: a network file system shows late what another machine wrote.

    Raises:
        UserError: it does not within a minute.
    """
    if _launch is None:
        return path
    end = time.monotonic() + _SIGHT
    while not path.exists():
        if time.monotonic() > end:
            raise UserError(
                f"{path}: not there for process {_launch.rank} on {socket.gethostname()}; output_dir must be on a "
                "disk that all machines share"
            )
        time.sleep(0.1)
    return path


def _launchers_store() -> Any:
    """A connection to the store that the launcher, or the first process, serves."""
    import torch.distributed as dist

    return dist.TCPStore(os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"]), is_master=False)


def _started() -> int:
    """How many processes the launcher says that there are."""
    return max(int(os.environ.get(name) or "1") for name in _COUNTS)


def _next(launch: _Launch, key: str) -> int:
    """The number of an item that no process has taken yet."""
    with _others():
        return int(launch.store.add(key, 1)) - 1


@contextmanager
def _others() -> Iterator[None]:
    """A context in which a lost connection ends this process, with one line from the first to notice."""
    try:
        yield
    except RuntimeError as error:  # of which torch derives whatever befalls a connection
        raise SystemExit(_LOST if speaks() else 1) from error
