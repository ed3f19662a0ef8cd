"""All providers of a case by turns in one process: the runner behind published ratios.

    python -m benchmarks.interleaved loss                 # rows go to benchmarks/results/measured.csv
    python -m benchmarks.interleaved loss --only "halo cogvideox" --threads 2 --memory kept --rounds 5 --check

Rounds run in an order that is drawn each time: who runs before one decides which pages and caches it finds. A ratio is
the median over the rounds of the quotient within one round, so a disturbance longer than a round falls out. One thread
is timed by its own CPU time, several by the wall clock.

Memory is a condition of losses, and there is no neutral one, so they are measured under two. "fresh": every large
tensor is mapped and faulted in page by page, as in a process that gives freed memory back. "kept": all that was ever
freed is at hand again. Other modes run in memory "as it comes".
"""

import argparse
import ctypes
import itertools
import platform
import random
import sys
from collections.abc import Sequence

import torch

from benchmarks import harness
from benchmarks.cases import cases
from benchmarks.harness import Bench, Case, Row

ROUNDS = {"loss": 40, "step": 3, "reward": 5, "generate": 5, "memory": 1}
WARMUP = 3
AS_IT_COMES = "as it comes"
MEMORY = ("fresh", "kept")  # in this order: what was kept once is never fresh again


def set_memory(kind: str) -> str:
    """Sets glibc's two thresholds; else each provider pays page faults that depend on who ran before it."""
    if kind == AS_IT_COMES or platform.libc_ver()[0] != "glibc":
        return AS_IT_COMES
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    trim, mmap = (2**17, 2**17) if kind == "fresh" else (2**31 - 1, 2**25)
    return kind if libc.mallopt(trim_threshold, trim) and libc.mallopt(mmap_threshold, mmap) else AS_IT_COMES


def take_turns(bench: Bench, rounds: int, warmup: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of every provider in every round, by metric."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in bench.rounds}
    order = random.Random(0)
    for turn in range(rounds + warmup):
        for name in order.sample(list(taken), len(taken)):
            seconds = harness.timed(bench.rounds[name])
            if turn >= warmup:
                taken[name].append(seconds)
    return taken


def rows_of(case: Case, bench: Bench, rounds: int, setting: str, state: str) -> list[Row]:
    """Rows of one case: errors and counts, then seconds, then ratios to the bases."""
    rows, errors = [], bench.gate()
    for name in bench.rounds:
        counts = ({"error": errors[name]} if name in errors else {}) | bench.count(name)
        rows += [harness.row(case, name, metric, [value], setting, state) for metric, value in counts.items()]
    if not case.timed:
        return rows
    taken = take_turns(bench, rounds, WARMUP if case.mode == "loss" else 0)
    for name, times in taken.items():
        for metric in times[0]:
            values = [one[metric] for one in times]
            rows.append(harness.row(case, name, metric, values, setting, state))
            for base in bench.bases:
                if name != base and metric in taken.get(base, [{}])[0]:
                    ratios = [one / other[metric] for one, other in zip(values, taken[base], strict=True)]
                    rows.append(harness.row(case, name, f"{metric} / {base}", ratios, setting, state))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=harness.MODES)
    parser.add_argument("--only", default="", help="run the cases whose names contain this")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--memory", nargs="+", choices=MEMORY, default=list(MEMORY))
    parser.add_argument("--check", action="store_true", help="print, but leave the committed table alone")
    choice = parser.parse_args(arguments)
    state = harness.joined(harness.conditions())
    print(state.replace("; ", "\n"), flush=True)
    kinds = sorted(choice.memory, key=MEMORY.index) if choice.mode == "loss" else [AS_IT_COMES]
    chosen = [case for case in cases(choice.mode) if choice.only in case.name]
    for kind, case, threads in itertools.product(kinds, chosen, choice.threads):
        torch.set_num_threads(threads)
        setting = harness.joined({"threads": threads, "memory": set_memory(kind)})
        with case.opened() as bench:
            rows = rows_of(case, bench, choice.rounds or ROUNDS[case.mode], setting, state)
        for row in rows:
            print(f"{row['case']:<48}{row['provider']:<36}{row['metric']:<34}{row['p50']:>12}", flush=True)
        if not choice.check:
            harness.write_rows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
