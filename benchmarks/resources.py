"""Compile matrix: what the Triton kernels cost on GPUs, found without a GPU.

    python -m benchmarks.resources        # the whole matrix: prints it and writes benchmarks/results/resources*.csv
    python -m benchmarks.resources --targets sm_90 --latents cogvideox --check     # a part of it, writes nothing

The library's own launchers run on CPU tensors under a driver that only compiles, so every kernel is compiled with
exactly the specialisation a user would get. Needs the triton package with its bundled ptxas and cuobjdump, and
TRITON_INTERPRET unset.
"""

import argparse
import csv
import hashlib
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from halo_fast.kernels import triton_patch_dpo as kernels
from triton.backends.compiler import GPUTarget

from benchmarks import LATENTS

RESULTS = Path(__file__).parent / "results"

# Beside the models' latents: no side is even, so nothing is aligned; past 2 GiB AMD pointers lose their 32-bit range.
SHAPES = LATENTS | {"odd": (3, 5, 37, 53), "cogvideox-x1024": (16, 13, 60, 90)}
GRIDS = ((1, 1, 1), (2, 2, 2), (4, 3, 3), (13, 4, 6), None)  # None: one position per patch
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}

# Registers a thread may use, by vendor and kernel. NVIDIA: 80 keep 24 warps on a multiprocessor with its 65,536
# registers; with three 16-byte loads a thread these have 36 KB under way, and an H100 needs 15 (3.35 TB/s times 0.6 us
# over 132). AMD: 160 keep 12 waves of 64 threads on a compute unit, whose file is four times as large. The table kernel
# runs as one program, so only spills would cost it time.
REGISTERS = {
    "cuda": {"forward": 80, "backward": 80, "table": 255},
    "hip": {"forward": 160, "backward": 160, "table": 255},
}
SHARED = 16 * 1024
# Peak memory bandwidth in bytes a second, from the vendors' data sheets.
BANDWIDTH = {"A100": 2.04e12, "H100": 3.35e12, "H200": 4.8e12, "B200": 8.0e12, "MI300X": 5.3e12}


class _CompileOnly:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextmanager
def compile_only(target: GPUTarget) -> Iterator[list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]]:
    """Inside, launches compile for `target` and are recorded as (kernel name, compiled kernel, arguments, options)."""
    launches: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = []
    before = triton.KernelInterface.__getitem__
    jitted = [fn for fn in vars(kernels).values() if isinstance(fn, triton.JITFunction)]

    def launch(kernel: Any, grid: Any) -> Any:
        def record(*args: Any, **options: Any) -> None:
            name = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
            named = dict(zip(kernel.arg_names, args, strict=True)) | options | {"grid": grid}
            launches.append((name, kernel.warmup(*args, grid=grid, **options), args, named))

        return record

    # compiled kernels and plans are kept by device, which is the same for every target
    for fn in jitted:
        fn.device_caches.clear()
    kernels.forget_plans()
    triton.runtime.driver.set_active(_CompileOnly(target))
    triton.KernelInterface.__getitem__ = launch
    try:
        yield launches
    finally:
        kernels.forget_plans()
        triton.KernelInterface.__getitem__ = before
        triton.runtime.driver._active = None


def launch_all(latent: str, grid: tuple[int, ...], dtype: torch.dtype) -> None:
    """One forward, table and backward, and the forward without a reference, as the library launches them."""
    samples = 2048 if latent == "cogvideox-x1024" else 2
    shape = SHAPES[latent]
    # never written: the pages of these tensors are not even allocated
    policy, reference, target = (torch.empty(samples, *shape, dtype=dtype) for _ in range(3))
    log_ratio = kernels.patch_log_ratio(policy, reference, target, grid)
    kernels.patch_error(policy, target, grid)
    numbers = (0.0, 1.0, 1.0, 500.0, 50.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    kernels.gran_dpo_table(
        log_ratio, log_ratio, log_ratio[:, 0, 0, 0].contiguous(), None, None, None, shape, "sigmoid", numbers
    )
    kernels.gran_dpo_backward(log_ratio[0, 0, 0, 0], log_ratio, policy, target)


def _nvidia_tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _inspect_cubin(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_nvidia_tool("cuobjdump"), "--dump-resource-usage", "-sass", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M)

    def widest(stem: str) -> int:
        found = [name for name in instructions if name.split(".")[0] == stem]
        widths = [
            next((int(part) for part in name.split(".")[1:] if part in ("64", "128", "256")), 32) for name in found
        ]
        narrow = [16 if ".U16" in name or ".S16" in name else 8 if ".U8" in name else 32 for name in found]
        return max((min(w, n) if n < 32 else w for w, n in zip(widths, narrow, strict=True)), default=0)

    return {
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "spills": sum(name.split(".")[0] in ("STL", "LDL") for name in instructions),
        "load_bits": widest("LDG"),
        "store_bits": widest("STG"),
        "instructions": len(instructions),
    }


def _inspect_amdgcn(text: str) -> dict[str, int]:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    def widest(kind: str) -> int:
        found = re.findall(rf"(?:global|buffer|flat)_{kind}_(dwordx?\d*|b\d+|u?short|u16|u?byte|u8)", text)
        sizes = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "short": 16, "ushort": 16, "u16": 16}
        return max(
            (sizes.get(one) or int(one.strip("bu") or 0) if one[:4] != "byte" else 8 for one in found), default=0
        )

    body = [line.strip() for line in text.splitlines()]
    return {
        "registers": field("vgpr_count"),
        "stack_bytes": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "load_bits": widest("load"),
        "store_bits": widest("store"),
        "instructions": sum(bool(re.match(r"(v|s|ds|global|buffer|flat)_", line)) for line in body),
    }


def inspect(kernel: Any) -> dict[str, int]:
    """Registers, stack, spills, widest load and store in bits, shared memory and instructions of a compiled kernel."""
    found = _inspect_cubin(kernel.asm["cubin"]) if "cubin" in kernel.asm else _inspect_amdgcn(kernel.asm["amdgcn"])
    return found | {"shared_bytes": kernel.metadata.shared, "warps": kernel.metadata.num_warps}


def overruns(row: dict[str, Any]) -> list[str]:
    """Which budgets a row of the matrix breaks."""
    broken = []
    for name in ("stack_bytes", "spills"):
        if row[name]:
            broken.append(f"{name} {row[name]}")
    registers = REGISTERS[TARGETS[row["target"]].backend][row["kernel"]]
    if row["registers"] > registers:
        broken.append(f"registers {row['registers']} > {registers}")
    if row["shared_bytes"] > SHARED:
        broken.append(f"shared_bytes {row['shared_bytes']} > {SHARED}")
    if row["kernel"] != "table":
        # a thread never loads more than its own positions, nor more than the planes' common alignment in one go
        possible = min(128, 8 * row["align_bytes"], 8 * row["thread_bytes"])
        if row["load_bits"] < possible:
            broken.append(f"load_bits {row['load_bits']} < {possible}")
        if row["kernel"] == "backward" and row["store_bits"] < possible:
            broken.append(f"store_bits {row['store_bits']} < {possible}")
    return broken


def _describe(target: str, dtype: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    if name == "table":
        variant = f"PAIRS {options['PAIRS']} PATCHES {options['PATCHES']}"
        return {"kernel": name, "variant": variant, "align_bytes": "", "thread_bytes": ""}
    flags = [flag for flag in ("POSITIONS", "SINGLE", "WIDE", "HAS_REFERENCE") if options.get(flag)]
    itemsize, threads = DTYPES[dtype].itemsize, TARGETS[target].warp_size * options["num_warps"]
    return {
        "kernel": name,
        "variant": " ".join([f"BLOCK {options['BLOCK']} ALIGN {options['ALIGN']}", *flags]),
        "align_bytes": options["ALIGN"] * itemsize,
        "thread_bytes": max(1, options["BLOCK"] // threads) * itemsize,
    }


def matrix(targets: list[str], latents: list[str], dtypes: list[str]) -> list[dict[str, Any]]:
    """One row for each target, latent, grid, dtype and kernel; equal specialisations are compiled and read once."""
    rows: list[dict[str, Any]] = []
    for target in targets:
        found: list[tuple[dict[str, Any], Any]] = []
        with compile_only(TARGETS[target]) as launches:
            for latent, cut, dtype in itertools.product(latents, GRIDS, dtypes):
                sides = SHAPES[latent][1:]
                grid = sides if cut is None else tuple(min(n, side) for n, side in zip(cut, sides, strict=True))
                launches.clear()
                launch_all(latent, grid, DTYPES[dtype])
                key = {"target": target, "latent": latent, "grid": "x".join(map(str, grid)), "dtype": dtype}
                found += [
                    (key | _describe(target, dtype, name, options), kernel) for name, kernel, _, options in launches
                ]
        unique = {id(kernel): kernel for _, kernel in found}
        with ThreadPoolExecutor() as pool:
            inspected = dict(zip(unique, pool.map(inspect, unique.values()), strict=True))
        rows += [row | inspected[id(kernel)] for row, kernel in found]
        print(f"{target}: {len(found)} launches, {len(unique)} different kernels", file=sys.stderr)
    return rows


def source_hash() -> str:
    """Of the kernels' source, so that a test can tell whether the committed matrix is of these kernels."""
    return hashlib.sha256(Path(kernels.__file__).read_bytes()).hexdigest()[:16]


def predictions(latents: list[str]) -> list[dict[str, Any]]:
    """Bytes moved and the time that the memory alone would need: predicted, never measured."""
    rows = []
    for latent in latents:
        for name in ("bf16", "fp32"):
            shape, itemsize = (2, *SHAPES[latent]), DTYPES[name].itemsize
            for grid in ((1, 1, 1), (4, 3, 3)):
                forward, backward = (
                    kernels.forward_bytes(shape, grid, itemsize),
                    kernels.backward_bytes(shape, grid, itemsize),
                )
                row: dict[str, Any] = {"latent": latent, "dtype": name, "grid": "x".join(map(str, grid))}
                row |= {"forward_bytes": forward, "backward_bytes": backward}
                row |= {
                    f"{gpu}_predicted_us": round(1e6 * (forward + backward) / rate, 1)
                    for gpu, rate in BANDWIDTH.items()
                }
                rows.append(row)
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    texts = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(text[column]) for text in texts) for column in range(len(texts[0]))]
    for text in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(text, widths, strict=True)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--latents", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--check", action="store_true", help="print and judge, but leave the committed CSV alone")
    choice = parser.parse_args()
    rows = matrix(choice.targets, choice.latents, choice.dtypes)
    # one line for each different kernel; the CSV has every launch
    short = {tuple(row[key] for key in ("target", "kernel", "dtype", "variant")): row for row in rows}
    hidden = ("latent", "grid", "align_bytes", "thread_bytes")
    _print([{key: value for key, value in row.items() if key not in hidden} for row in short.values()])
    model = predictions(choice.latents)
    print("\npredicted: bytes moved over peak bandwidth, nothing was measured on a GPU")
    _print(model)
    if not choice.check:
        stamp = {"source": source_hash(), "triton": triton.__version__}
        path = RESULTS / "resources.csv"
        before = list(csv.DictReader(path.open())) if path.exists() else []
        # targets that were compiled earlier from the same source stay, so that the matrix can be made target by target
        kept = [row for row in before if row["source"] == stamp["source"] and row["target"] not in choice.targets]
        _write(path, [*kept, *(row | stamp for row in rows)])
        _write(RESULTS / "resources_predicted.csv", model)
    broken = {key: overruns(row) for key, row in short.items() if overruns(row)}
    for key, reasons in broken.items():
        print("over budget:", *key, "-", "; ".join(reasons), file=sys.stderr)
    print(f"\n{len(rows)} launches, {len(short)} kernels, {len(broken)} over budget")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
