"""Ten minutes on a GPU: correctness first, then times that are compared with what was predicted.

    python -m benchmarks.device_check          # needs torch and triton alone; prints a report, exit code 1 on a fault
    python -m benchmarks.device_check --quick  # the correctness part only

Order: values and gradients against float64 (mixed dtypes, fine grids, four pairs, tokens), torch.compile in its modes,
streams, devices. Then kernel times by graph replays over rotated inputs, larger than the second-level cache,
beside a copy. Last the host's time for a call. Nothing here tunes anything.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import LATENTS
from halo_fast import GranDPO, gran_dpo, patch_error, using_backend
from halo_fast.loss import backends, reference

GRID = (4, 3, 3)

ROTATED_BYTES = 256 * 2**20
REPLAYS, CALLS = 20, 20
Inputs = tuple[Tensor, ...]


def inputs(shape: tuple[int, ...], grid: tuple[int, ...], device: str, pairs: int = 1, seed: int = 0) -> Inputs:
    """(prediction, target, reference, patch_rewards, video_rewards), latents in bf16; the two are near each other."""
    generator = torch.Generator().manual_seed(seed)
    prediction, step, target = torch.randn(3, 2 * pairs, *shape, generator=generator)
    rewards = torch.randn(2 * pairs, *grid, generator=generator), torch.randn(2 * pairs, generator=generator)
    latents = prediction.bfloat16(), target.bfloat16(), (prediction + 0.1 * step).bfloat16()
    moved = [x.to(device) for x in (*latents, *rewards)]
    return moved[0].requires_grad_(), *moved[1:]


def step(data: Inputs, **options: object) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one call."""
    prediction, target, ref, *rewards = data
    loss = gran_dpo(prediction, target, ref, *rewards, **options).loss
    return loss.detach(), torch.autograd.grad(loss, prediction)[0]


def difference(data: Inputs, **options: object) -> float:
    """Relative distance of the gradient from float64 on the same inputs, or of the loss where that is larger."""
    loss, gradient = step(data, **options)
    wide = tuple(x.detach().double() for x in data)
    with using_backend("reference"):
        truth, expected = step((wide[0].requires_grad_(), *wide[1:]), **options)
    distance = (gradient.double() - expected).norm() / expected.norm()
    return max(distance.item(), (loss.double() - truth).abs().item() / (1e-3 + truth.abs().item()))


def check_values(shape: tuple[int, ...], device: str) -> Iterator[tuple[str, float]]:
    """What the sums must be, over the paths that differ in code."""
    yield "bf16, one pair", difference(inputs(shape, GRID, device))
    yield "bf16, four pairs", difference(inputs(shape, GRID, device, pairs=4))
    fine = shape[1:]
    yield "one position a patch", difference(inputs(shape, fine, device))
    prediction, target, ref, *rewards = inputs(shape, GRID, device)
    yield "float32 target", difference((prediction, target.float(), ref, *rewards))
    last = torch.channels_last_3d
    tokens = [x.detach().contiguous(memory_format=last) for x in (prediction, target, ref)]
    yield "channels last", difference((tokens[0].requires_grad_(), *tokens[1:], *rewards))
    cached = patch_error(ref, target, GRID)
    loss, gradient = step((prediction, target, ref, *rewards))
    same, other = step((prediction, target, None, *rewards), reference_error=cached)
    yield "cached errors", ((gradient - other).float().norm() / gradient.float().norm()).item()
    supervised = GranDPO(patch_sft_weight=0.5, sft_weight=0.1)
    yield "supervised", difference((prediction, target, ref, *rewards), objective=supervised)


def check_compiled(shape: tuple[int, ...], device: str) -> Iterator[tuple[str, float]]:
    """torch.compile around the loss, three calls in each mode: a state that is kept between calls would show."""
    data = inputs(shape, GRID, device)
    loss, gradient = step(data)
    for mode in ("default", "reduce-overhead", "max-autotune"):
        torch.compiler.reset()

        @torch.compile(fullgraph=True, mode=mode)
        def compiled(prediction: Tensor) -> Tensor:
            return gran_dpo(prediction, *data[1:]).loss

        worst = 0.0
        for _ in range(3):
            value = compiled(data[0])
            (found,) = torch.autograd.grad(value, data[0])
            worst = max(worst, (value.detach() - loss).abs().item(), (found - gradient).abs().max().item())
        yield f"torch.compile, {mode}", worst


def check_places(shape: tuple[int, ...], device: str) -> Iterator[tuple[str, float]]:
    """Equal bits again and again, on several streams, and on every device whatever the current one is."""
    data = inputs(shape, GRID, device)
    loss, gradient = step(data)

    def distance(other: tuple[Tensor, Tensor]) -> float:
        return float(not (torch.equal(other[0].cpu(), loss.cpu()) and torch.equal(other[1].cpu(), gradient.cpu())))

    yield "the same bits on every run", max(distance(step(data)) for _ in range(10))
    if device == "cpu":
        return
    worst, results = 0.0, []
    for _ in range(4):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results += [step(data) for _ in range(10)]
    torch.cuda.synchronize()
    yield "on several streams", max(map(distance, results))
    for index in range(1, torch.cuda.device_count()):
        worst = max(worst, distance(step(inputs(shape, GRID, f"cuda:{index}"))))
    yield "on every device", worst


def seconds(run: Callable[[int], object], device: str, sets: int) -> float:
    """Seconds of run(k), k over the rotated inputs: by graph replays on a GPU, so that no host time is in it."""
    if device == "cpu":
        start = time.perf_counter()
        run(0)
        return time.perf_counter() - start
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for k in range(sets):
            run(k)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(CALLS):
            run(call % sets)
    took = []
    for _ in range(REPLAYS):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        torch.cuda.synchronize()
        took.append(1e-3 * before.elapsed_time(after) / CALLS)
    return statistics.median(took)


def times(name: str, shape: tuple[int, ...], pairs: int, device: str) -> list[str]:
    """One line a kernel: microseconds, bytes a second, and the share of a plain copy of as many bytes."""
    kernels = backends.select(torch.device(device), torch.float32, "triton")
    one = 2 * pairs * shape[0] * shape[1] * shape[2] * shape[3] * 2
    sets = 1 if device == "cpu" else max(2, -(-ROTATED_BYTES // (3 * one)))
    data = [tuple(x.detach() for x in inputs(shape, GRID, device, pairs, seed)) for seed in range(sets)]
    grad, factor = torch.randn(2 * pairs, *GRID, device=device), torch.ones((), device=device)
    numbers = reference.TableNumbers(0.0, 1.0, 1.0, 500.0, 83.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    full = 2 * pairs, *shape
    runs: dict[str, tuple[Callable[[int], object], int]] = {
        "forward and table": (
            lambda k: kernels.gran_dpo(
                data[k][0], data[k][2], data[k][1], None, *data[k][3:], None, GRID, "sigmoid", numbers
            ),
            kernels.forward_bytes(full, GRID, 2, 2, 2),
        ),
        "backward": (
            lambda k: kernels.gran_dpo_backward(factor, grad, data[k][0], data[k][1]),
            kernels.backward_bytes(full, GRID, 2, 2),
        ),
    }
    room = torch.empty_like(data[0][0])
    lines = []
    for kernel, (run, moved) in runs.items():
        took = seconds(run, device, sets)
        copied = seconds(lambda k: room.copy_(data[k][0]), device, sets)
        rate, copy_rate = moved / took, 2 * one / copied
        lines.append(
            f"{name:<14} {pairs} pairs  {kernel:<18} {1e6 * took:9.1f} us  {rate / 1e9:7.0f} GB/s  "
            f"{rate / copy_rate:4.0%} of copy"
        )
    return lines


def host_microseconds(shape: tuple[int, ...], device: str, calls: int = 100) -> float:
    """The host's time for a call, forward and backward, while the device lags behind."""
    data = inputs(shape, GRID, device)
    for _ in range(3):
        step(data)
    start = time.perf_counter()
    for _ in range(calls):
        step(data)
    return 1e6 * (time.perf_counter() - start) / calls


def report(shape: tuple[int, ...], device: str, quick: bool) -> Iterator[tuple[bool, str]]:
    """(whether it is a fault, a line) for every check."""
    for check, bound in ((check_values, 2**-7), (check_compiled, 1e-5), (check_places, 0.0)):
        for name, found in check(shape, device):
            yield not found <= bound, f"{name:<32} {found:.2e} (at most {bound:.2e})"
    if quick:
        return
    models = {"cogvideox": LATENTS["cogvideox"], "wan": LATENTS["wan"]} if device != "cpu" else {"small": shape}
    for name, latent in models.items():
        for pairs in (1, 4):
            yield from ((False, line) for line in times(name, latent, pairs, device))
    yield False, f"host time of a call {host_microseconds(shape, device, 100 if device != 'cpu' else 1):.0f} us"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="correctness only")
    choice = parser.parse_args()
    if not torch.cuda.is_available():
        print("device_check: needs a GPU that torch can use; nothing was checked", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    faults = 0
    for fault, line in report(LATENTS["cogvideox"], "cuda", choice.quick):
        faults += fault
        print("FAULT" if fault else "ok   ", line, flush=True)
    print(f"{faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
