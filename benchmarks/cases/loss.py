"""The Gran-DPO loss on this CPU: ours, eager PyTorch, torch.compile and a public training loop's arithmetic.

    python -m benchmarks.bench_loss                # the published table: writes benchmarks/results/loss_cpu.csv
    python -m benchmarks.bench_loss --rounds 5 --latents cogvideox --dtypes float32 --threads 2 --check

All providers run in one process, in rounds whose order is drawn anew each time (who runs before one decides which
pages and caches it finds); a ratio is the median over the rounds of the quotient within one round, so a disturbance
that lasts longer than a round falls out. No time is printed before every provider's loss and gradient have been
compared with float64. "floor" is what the memory needs: two streaming additions over tensors as large as those that
the forward and the backward must move, the second into a new tensor, as a gradient is.

Everything is measured twice: with memory "fresh" every large tensor is mapped anew and faulted in page by page, as in a
process that gives freed memory back; with memory "kept" all that was ever freed is at hand again. "floor, no new
memory" writes both times into a tensor that is there already.
"""

import argparse
import csv
import ctypes
import importlib.metadata
import itertools
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks import LATENTS
from halo_fast import gran_dpo
from halo_fast.loss import backends, reference

RESULTS = Path(__file__).parent / "results"
GRID = (4, 3, 3)
VIDEO_BETA, PATCH_BETA = 500.0, 500.0 / 6.0
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(prediction: Tensor, target: Tensor, ref: Tensor, patch_rewards: Tensor, video_rewards: Tensor) -> Tensor:
    """The factored formula in plain differentiable PyTorch, all in float32 (float64 for float64)."""
    o, tau, o_ref = (x.to(reference.accumulate_dtype(x.dtype)) for x in (prediction, target, ref))
    log_ratio = -reference.patch_mean((o - o_ref) * ((o - tau) + (o_ref - tau)), GRID)
    return pair_loss(log_ratio, prediction.shape[1:], patch_rewards, video_rewards)


def pair_loss(log_ratio: Tensor, latent_shape: Any, patch_rewards: Tensor, video_rewards: Tensor) -> Tensor:
    """H1 with the sigmoid link from the log-ratios, differentiable."""
    a, b = log_ratio.chunk(2)
    margin = a - b
    volume = reference.patch_sizes(latent_shape, GRID, margin)
    volume = volume / volume.sum()
    r_a, r_b = patch_rewards.to(margin.dtype).chunk(2)
    weight = (r_a - r_b).abs()
    v_a, v_b = video_rewards.to(margin.dtype).chunk(2)
    video = -logsigmoid(0.5 * VIDEO_BETA * (v_a - v_b).sign() * (volume * margin).flatten(1).sum(1))
    patch = -logsigmoid(0.5 * PATCH_BETA * (r_a - r_b).sign() * margin)
    return (video + (weight * patch).flatten(1).sum(1) / weight.flatten(1).sum(1)).mean()


def training_loop(
    prediction: Tensor, target: Tensor, ref: Tensor, patch_rewards: Tensor, video_rewards: Tensor
) -> Tensor:
    """As published Diffusion-DPO loops do it, by patch: two full error maps in float32, averaged, then subtracted."""
    model_losses = reference.patch_mean((prediction.float() - target.float()).pow(2), GRID)
    with torch.no_grad():
        ref_losses = reference.patch_mean((ref.float() - target.float()).pow(2), GRID)
    return pair_loss(ref_losses - model_losses, prediction.shape[1:], patch_rewards, video_rewards)


def ours(prediction: Tensor, target: Tensor, ref: Tensor, patch_rewards: Tensor, video_rewards: Tensor) -> Tensor:
    """The public call, all checks included."""
    return gran_dpo(prediction, target, ref, patch_rewards, video_rewards).loss


def inputs(latent: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One pair: prediction, target, reference near the prediction, and rewards."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 2, *LATENTS[latent], generator=generator)
    prediction, target = noise[0].to(dtype), noise[1].to(dtype)
    ref = (prediction.float() + 0.02 * noise[2]).to(dtype)
    rewards = torch.rand(2, *GRID, generator=generator), torch.rand(2, generator=generator)
    return prediction.requires_grad_(), target, ref, *rewards


def gate(providers: dict[str, Loss], data: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative L2 error of each provider's gradient against float64; raises where a provider is wrong."""
    prediction = data[0]
    wide = prediction.detach().double().requires_grad_()
    truth_loss = eager(wide, data[1].double(), data[2].double(), *data[3:])
    (truth,) = torch.autograd.grad(truth_loss, wide)
    errors = {}
    for name, loss in providers.items():
        value = loss(*data)
        (gradient,) = torch.autograd.grad(value, prediction)
        errors[name] = ((gradient.double() - truth).norm() / truth.norm()).item()
        limit = 1e-3 if prediction.dtype == torch.float32 else 2**-7
        if not (abs(value.item() - truth_loss.item()) < 1e-3 and errors[name] < limit):
            raise SystemExit(f"{name} is wrong by {errors[name]:.1e} in its gradient, no time is reported")
    return errors


def saved_bytes(loss: Loss, data: tuple[Tensor, ...]) -> int:
    """Bytes of storage that the graph keeps for backward beside the inputs, each storage once."""
    known = {x.untyped_storage().data_ptr() for x in data}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss(*data)
    return sum(kept.values())


def peak_bytes(loss: Loss, data: tuple[Tensor, ...]) -> int:
    """Most bytes the allocator had handed out at once in forward and backward, beyond those before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(loss(*data), data[0])
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def now() -> float:
    """With one thread its own CPU time, to which other programs on the machine add nothing; else the wall clock."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def one_round(loss: Loss, data: tuple[Tensor, ...]) -> dict[str, float]:
    start = now()
    value = loss(*data)
    middle = now()
    gradient = torch.autograd.grad(value, data[0])
    end = now()
    del gradient
    return {"forward": middle - start, "backward": end - middle, "both": end - start}


def floor_round(data: tuple[Tensor, ...], out: Tensor, gradient: Tensor | None) -> dict[str, float]:
    prediction, target, ref = (x.detach() for x in data[:3])
    start = now()
    torch.add(prediction, ref, out=out)
    middle = now()
    gradient = torch.add(prediction, target, out=gradient)
    end = now()
    del gradient
    return {"forward": middle - start, "backward": end - middle, "both": end - start}


def measure(latent: str, dtype: torch.dtype, threads: int, memory: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of one latent shape, dtype, number of threads and kind of memory (which is set already)."""
    torch.set_num_threads(threads)
    data = inputs(latent, dtype)
    torch.compiler.reset()
    providers: dict[str, Loss] = {
        "eager": eager,
        "torch.compile": torch.compile(eager),
        "training loop": training_loop,
        "ours": ours,
    }
    errors = gate(providers, data)
    needs = {name: (saved_bytes(loss, data), peak_bytes(loss, data)) for name, loss in providers.items()}
    out = torch.empty_like(data[1])
    floors = {"floor": None, "floor, no new memory": out}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in [*providers, *floors]}
    order = random.Random(0)
    for turn in range(rounds + 3):
        for name in order.sample(list(times), len(times)):
            took = floor_round(data, out, floors[name]) if name in floors else one_round(providers[name], data)
            if turn >= 3:
                times[name].append(took)
    rows = []
    for name, taken in times.items():
        for mode in ("forward", "backward", "both"):
            low, middle, high = _quantiles([one[mode] for one in taken])
            row: dict[str, Any] = {
                "latent": latent,
                "dtype": str(dtype).removeprefix("torch."),
                "threads": threads,
                "memory": memory,
                "provider": name,
                "mode": mode,
            }
            row |= {"p50_ms": f"{middle:.3f}", "p20_ms": f"{low:.3f}", "p80_ms": f"{high:.3f}"}
            quotients = [one[mode] / ours[mode] for one, ours in zip(taken, times["ours"], strict=True)]
            row["ours_is_faster_by"] = f"{statistics.median(quotients):.2f}"
            row["saved_bytes"], row["peak_bytes"] = needs.get(name, ("", ""))
            row["gradient_error"] = f"{errors[name]:.1e}" if name in errors else ""
            rows.append(row)
    return rows


def _quantiles(seconds: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles([1e3 * one for one in seconds], n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


MEMORY = ("fresh", "kept")  # in this order: what was kept once is never fresh again


def set_memory(kind: str) -> str:
    """Sets glibc's two thresholds; else each provider pays page faults that depend on who ran before it."""
    if platform.libc_ver()[0] != "glibc":
        return "as the system does"
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    trim, mmap = (2**17, 2**17) if kind == "fresh" else (2**31 - 1, 2**25)
    return kind if libc.mallopt(trim_threshold, trim) and libc.mallopt(mmap_threshold, mmap) else "as the system does"


def conditions() -> dict[str, str]:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model
        )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": f"{model}, {os.cpu_count()} cores",
        "backend": backends.select(torch.device("cpu"), torch.float32).describe(),
        "torch": torch.__version__,
        "halo_fast": importlib.metadata.version("halo_fast"),
        "commit": commit,
        "load": f"{os.getloadavg()[0]:.2f}",
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--latents", nargs="+", choices=LATENTS, default=["cogvideox", "wan", "wan-720p", "ltx", "videocrafter2"]
    )
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--memory", nargs="+", choices=MEMORY, default=list(MEMORY))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--check", action="store_true", help="print, but leave the committed CSV alone")
    choice = parser.parse_args()
    state = conditions()
    print(*(f"{key}: {value}" for key, value in state.items()), sep="\n")
    print(f"grid {GRID}, one pair, {choice.rounds} interleaved rounds; ms are medians\n")
    rows = []
    for kind in sorted(choice.memory, key=MEMORY.index):
        memory = set_memory(kind)
        for latent, dtype, threads in itertools.product(choice.latents, choice.dtypes, choice.threads):
            part = measure(latent, getattr(torch, dtype), threads, memory, choice.rounds)
            rows += part
            for row in part:
                if row["mode"] == "both":
                    _print_row(row)
    if not choice.check:
        with (RESULTS / "loss_cpu.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *state])
            writer.writeheader()
            writer.writerows(row | state for row in rows)
    return 0


def _print_row(row: dict[str, Any]) -> None:
    spread = f"{row['p50_ms']:>9} ms ({row['p20_ms']} .. {row['p80_ms']})"
    memory = f"saved {row['saved_bytes']:,} B, peak {row['peak_bytes']:,} B" if row["saved_bytes"] != "" else ""
    name = f"{row['latent']:<14}{row['dtype']:<9}{row['threads']} threads {row['memory']:<6}{row['provider']:<21}"
    print(f"{name}{spread:<32} {row['ours_is_faster_by']:>7}x ours  {row['gradient_error']:<8} {memory}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
