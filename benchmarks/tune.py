"""Times the Triton kernels on a GPU for several launch sizes, beside the rate of a plain copy on the same GPU.

    python -m benchmarks.tune        # a table for each latent: the library's own sizes first, then the others

The library never tunes at run time: sums are cut by the launch sizes, so a change of `launch_config` changes last
bits. Put what wins on several GPUs into that table, then commit the new compile matrix (python -m
benchmarks.resources).
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
from halo_fast.kernels import triton_patch_dpo as kernels

from benchmarks import LATENTS

GRID = (4, 3, 3)


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Median time of a call; on a GPU with a cold second-level cache."""
    if device != "cpu":
        return float(triton.testing.do_bench(run, return_mode="median"))
    took = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        took.append(1e3 * (time.perf_counter() - start))
    return statistics.median(took)


@contextmanager
def launch_sizes(config: kernels.LaunchConfig | None) -> Iterator[None]:
    """Inside, every kernel is launched with these sizes; None leaves the library's own."""
    own = kernels.launch_config
    if config is not None:
        kernels.launch_config = lambda *_: config
    kernels.forget_plans()
    try:
        yield
    finally:
        kernels.launch_config = own
        kernels.forget_plans()


def table(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, configs: list[kernels.LaunchConfig | None]
) -> list[str]:
    """One line for each launch size: forward and backward in microseconds, GB/s, share of a plain copy's rate."""
    policy, reference, target = (torch.randn(2, *shape, device=device).to(dtype) for _ in range(3))
    grad = torch.randn(2, *GRID, device=device)
    copy_ms = milliseconds(lambda: target.clone(), device)
    copy_rate = 2 * target.numel() * target.element_size() / copy_ms
    lines = []
    for config in configs:
        with launch_sizes(config):
            forward = milliseconds(lambda: kernels.patch_log_ratio(policy, reference, target, GRID), device)
            backward = milliseconds(lambda: kernels.patch_error_backward(grad, policy, target), device)
        sizes = 3 * (dtype.itemsize,)
        moved = kernels.forward_bytes(policy.shape, GRID, *sizes)
        moved += kernels.backward_bytes(policy.shape, GRID, *sizes[1:])
        rate = moved / (forward + backward)
        name = (
            "library's own" if config is None else f"block {config.block} lines {config.lines} warps {config.num_warps}"
        )
        lines.append(
            f"{name:<32} forward {1e3 * forward:9.1f} us  backward {1e3 * backward:9.1f} us  {rate / 1e6:8.1f} GB/s  "
            f"{rate / copy_rate:5.0%} of copy"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", nargs="+", choices=LATENTS, default=list(LATENTS))
    choice = parser.parse_args()
    if kernels.INTERPRETED or not torch.accelerator.is_available():
        print("tune: needs a GPU that torch can use, and TRITON_INTERPRET unset; nothing was timed", file=sys.stderr)
        return 2
    device = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    sizes = itertools.product((512, 1024, 2048), (4, 8, 16, 32), (2, 4, 8))
    configs = [None, *(kernels.LaunchConfig(*one) for one in sizes)]
    for latent in choice.latents:
        for dtype in (torch.bfloat16, torch.float32):
            print(f"\n{latent} {LATENTS[latent]} {dtype}, grid {GRID}, one pair")
            print(*table(LATENTS[latent], dtype, device, configs), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
