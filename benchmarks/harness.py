"""What a benchmark case is, how its rounds are timed, and the table that its figures go to.

A case opens a bench: several providers of the same work, and a gate that compares each with float64. No time is taken
before the gate has passed. Two runners use the same cases: `pytest benchmarks` (pytest-benchmark, one provider after
the other) and `python -m benchmarks.interleaved` (all providers by turns, for published ratios).
"""

import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
TABLE = RESULTS / "measured.csv"
COLUMNS = ("mode", "case", "provider", "metric", "p20", "p50", "p80", "setting", "conditions")
KEY = ("mode", "case", "provider", "metric", "setting")
MODES = ("loss", "step", "reward", "generate", "memory")
PEERS = {"TRL": "trl", "Liger": "liger_kernel", "diffusers": "diffusers"}

Row = dict[str, Any]
Round = Callable[[], Mapping[str, float] | None]


class GateError(AssertionError):
    """A provider computes something else than the others; no time is reported."""


@dataclass
class Bench:
    """A case that is ready to run.

    Args:
        rounds: one round of each provider. A round that times itself returns its seconds by metric.
        gate: returns the error of each provider relative to the truth, or raises GateError.
        count: figures of a provider that are counted, not timed, by metric: bytes, operations, kernel launches.
        bases: providers to which ratios are published.
    """

    rounds: dict[str, Round]
    gate: Callable[[], dict[str, float]]
    count: Callable[[str], dict[str, float]] = field(default=lambda provider: {})
    bases: Sequence[str] = ()


@dataclass(frozen=True)
class Case:
    """One comparison: the same work by several providers.

    Args:
        mode: one of MODES; with the name it makes the group in pytest-benchmark's tables.
        name: model or latent, dtype, setting.
        providers: names, known before anything is built.
        opened: a context that yields the bench.
        slow: left out of `make bench`.
        timed: whether seconds are the point; else the counts are.
    """

    mode: str
    name: str
    providers: tuple[str, ...]
    opened: Callable[[], AbstractContextManager[Bench]]
    slow: bool = False
    timed: bool = True

    @property
    def group(self) -> str:
        return f"{self.mode}: {self.name}"


def missing(provider: str) -> str | None:
    """Why a provider cannot run here: the package that is not installed, or None."""
    package = next((package for peer, package in PEERS.items() if provider.startswith(peer)), None)
    if package is None or importlib.util.find_spec(package):
        return None
    return f"{package} is not installed: pip install 'halo_fast[bench]'"


def device() -> torch.device:
    """Where loss cases run: the GPU if there is one."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def check_errors(errors: Mapping[str, float], limit: float) -> dict[str, float]:
    """The errors as they came, or GateError if one is above the limit or not finite."""
    for provider, error in errors.items():
        if not error < limit:
            raise GateError(f"{provider}: expected an error below {limit:.1e}, got {error:.1e}; no time is reported")
    return dict(errors)


def now() -> float:
    """Seconds: with one thread its own CPU time, which other programs on the machine do not add to; else the wall's."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(run: Round) -> dict[str, float]:
    """Seconds of one round, with the parts that it reports itself; a round's own "seconds" take precedence."""
    start = now()
    parts = run()
    return {"seconds": now() - start} | dict(parts or {})


class Clock:
    """The timer given to pytest-benchmark: it advances by what a round says it took.

    So a round may measure itself, by CUDA events around a graph's replay for instance, and both runners time alike.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def read(self) -> float:
        return self.seconds

    def advance(self, run: Round) -> None:
        self.seconds += timed(run)["seconds"]


def num_inputs(input_bytes: int) -> int:
    """How many sets of inputs to rotate so that none is found in a GPU's L2 cache: twice its size in all."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, math.ceil(2 * cache / input_bytes))


def graph_round(calls: Sequence[Callable[[], object]]) -> Round:
    """A round that replays one CUDA graph of all calls and reports the seconds of one, without launch gaps.

    Args:
        calls: the same work, each on inputs of its own (see `num_inputs`).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls]:  # compiles, allocates
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> dict[str, float]:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return {"seconds": start.elapsed_time(end) / 1e3 / len(calls)}

    return replay


def launches(run: Callable[[], object]) -> int:
    """Kernels that one call launches on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.accelerator.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def conditions() -> dict[str, str]:
    """What the numbers depend on: machine, backend, versions, commit, load, date."""
    from halo_fast.loss import backends

    where = device()
    state = {"machine": _processor()}
    if where.type == "cuda":
        state["machine"] = torch.cuda.get_device_name()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    return state | {
        "backend": backends.select(where, torch.float32).describe(),
        "torch": torch.__version__,
        "halo_fast": importlib.metadata.version("halo_fast"),
        "commit": commit.stdout.strip(),
        "load": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "",
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20 %, 50 % and 80 % quantiles."""
    if len(values) == 1:
        return (values[0],) * 3
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return low, statistics.median(values), high


def row(case: Case, provider: str, metric: str, values: Sequence[float], setting: str, state: str) -> Row:
    """One row of the table. Counted figures have one value, and three equal quantiles."""
    cells = (case.mode, case.name, provider, metric, *(f"{value:.6g}" for value in quantiles(values)), setting, state)
    return dict(zip(COLUMNS, cells, strict=True))


def joined(facts: Mapping[str, object]) -> str:
    """Facts in one cell: "threads=1; memory=fresh"."""
    return "; ".join(f"{name}={value}" for name, value in facts.items())


def split(cell: str) -> dict[str, str]:
    """The facts of one cell, as `joined` wrote them."""
    pairs = (part.split("=", 1) for part in cell.split("; ") if part)
    return dict(pairs)


def read_rows(path: Path = TABLE) -> list[Row]:
    """Rows of a table, or of pytest-benchmark's JSON."""
    if path.suffix == ".json":
        return rows_of_json(json.loads(path.read_text()))
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Put rows into the table in place of those with the same key; the others stay, with their own run's conditions."""
    table = {tuple(one[name] for name in KEY): one for one in (read_rows(path) if path.exists() else [])}
    table |= {tuple(one[name] for name in KEY): one for one in rows}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())


def rows_of_json(report: Mapping[str, Any]) -> list[Row]:
    """Rows of a report that `pytest benchmarks --benchmark-json` wrote."""
    state = joined(report["machine_info"]["conditions"])
    rows = []
    for one in report["benchmarks"]:
        info = one["extra_info"]
        case = Case(info["mode"], info["case"], (), opened=None)  # type: ignore[arg-type]
        if info["mode"] != "memory":
            values = one["stats"]["data"]
            rows.append(row(case, info["provider"], "seconds", values, info["setting"], state))
        for metric, value in info["counts"].items():
            rows.append(row(case, info["provider"], metric, [value], info["setting"], state))
    return rows
