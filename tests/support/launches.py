"""Two processes of one thread each, started on the CPU by torchrun or accelerate as users start them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2")
ACCELERATE = (
    "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no",
)  # fmt: skip


def launch(launcher: tuple[str, ...], *words: str | Path, folder: Path | None = None) -> subprocess.Popen:
    """Start a launcher, with its options and what it starts; output is kept."""
    port_option = "--main_process_port" if launcher[0].startswith("accelerate") else "--master_port"
    return start([sys.executable, "-m", *launcher, port_option, str(free_port()), *words], {}, folder)


def start(
    command: Sequence[str | Path], environment: Mapping[str, str], folder: Path | None = None
) -> subprocess.Popen:
    """Start a command with one thread and no GPU; output is kept."""
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [str(word) for word in command], env=os.environ | own | environment, cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ended(process: subprocess.Popen, timeout: float = 900) -> subprocess.CompletedProcess:
    """The launch once it is over; one that hangs is ended with all its processes, and fails."""
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def kill_worker(process: subprocess.Popen, rank: int, ready: Callable[[], object]) -> None:
    """Send SIGKILL to one process of a launch as soon as `ready()`; the launch must not be over by then."""
    worker = None
    while worker is None or not ready():
        assert process.poll() is None, process.communicate()[1][-4000:]
        worker = worker or _worker(process, rank)
        time.sleep(0.002)
    os.kill(worker, signal.SIGKILL)


def _worker(process: subprocess.Popen, rank: int) -> int | None:
    """The process's number, once it is started; a process that is just being started has no environment yet."""
    for one in psutil.Process(process.pid).children():
        with suppress(psutil.Error):
            if one.environ().get("RANK") == str(rank):
                return one.pid
    return None
