"""Compile matrix: what the Triton kernels cost on GPUs, found without a GPU.

    python -m benchmarks.resources        # the whole matrix: prints it and writes benchmarks/results/resources*.csv
    python -m benchmarks.resources --targets sm_90 --latents cogvideox --check     # a part of it, writes nothing
    python -m benchmarks.resources --beside f062473    # real models beside the kernels of another revision: a table

The library's own launchers run on CPU tensors under a driver that only compiles, so every kernel is compiled with
exactly the specialisation a user would get. Needs the triton package with its bundled ptxas and cuobjdump, and
TRITON_INTERPRET unset.
"""

import argparse
import csv
import importlib.util
import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from halo_fast.kernels import triton_patch_dpo as kernels
from triton.backends.compiler import GPUTarget

from benchmarks import LATENTS, code_hash
from halo_fast.loss.reference import TableNumbers

RESULTS = Path(__file__).parent / "results"

# Beside the models' latents: packed tokens, whose channels lie together; no side even, so nothing is aligned; past
# 2 GiB AMD pointers lose their 32-bit range.
SHAPES = LATENTS | {"ltx-tokens": LATENTS["ltx"], "odd": (3, 5, 37, 53), "cogvideox-x1024": (16, 13, 60, 90)}
GRIDS = ((1, 1, 1), (2, 2, 2), (4, 3, 3), (13, 4, 6), None)  # None: one position per patch
# The table's own matrix: pairs, grids (the last needs several programs), and the options in use.
PAIRS = (1, 2, 4, 8, 16)
TABLE_GRIDS = ((4, 3, 3), (13, 30, 45))
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What is set beside another revision's kernels: real models in bf16 on an H100.
MODELS = ("cogvideox", "wan", "wan-720p", "hunyuanvideo", "ltx")
MODEL_PAIRS, MODEL_GRID, MODEL_TARGET = (1, 4), (4, 3, 3), "sm_90"
MODELS_CSV = RESULTS / "resources_models.csv"
# Multiprocessors (compute units) of A100, RTX 4090, H100, B200, RTX 5090, MI250X (one die) and MI300X.
MULTIPROCESSORS = dict(zip(TARGETS, (108, 128, 132, 148, 170, 110, 304), strict=True))
# Dtypes of the prediction (and its reference) and of the target.
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64),
}

# Registers a thread may use, by vendor and kernel. NVIDIA: 128 keep four programs of 128 threads on a multiprocessor
# with its 65,536 registers. With six 16-byte loads a thread these have 49 KB under way; an H100 needs some 17
# (3.0 TB/s times 0.75 us over 132). AMD: 256 keep two waves on a SIMD, whose file is larger.
REGISTERS = {
    "cuda": {"forward": 128, "backward": 128, "sum": 128, "table": 255},
    "hip": {"forward": 256, "backward": 256, "sum": 256, "table": 256},
}
# A small table is one program that waits for memory, not for issue slots: what it keeps over its loops in local memory
# costs a few of its hundreds of accesses. The kernels that run over latents may not spill, but for those below.
SPILLS = {"forward": 0, "backward": 0, "sum": 0, "table": 24}
# What is over budget, by target and variant of the forward kernel, with the budget it has instead.
# sm_89 and sm_100, tokens: one to three values are stored before the loop and loaded after it, none inside.
# sm_120, tokens in fp32: 132 registers, so three programs fit on a multiprocessor and not four.
NAMED = {
    ("sm_89", "BLOCK 8 LANES 128 ALIGN 8"): {"spills": 2},
    ("sm_100", "BLOCK 8 LANES 128 ALIGN 8"): {"spills": 6},
    ("sm_100", "BLOCK 8 LANES 128 ALIGN 8 POSITIONS HAS_REFERENCE"): {"spills": 2},
    ("sm_120", "BLOCK 8 LANES 128 ALIGN 4 HAS_REFERENCE"): {"registers": 132},
}
SHARED = 16 * 1024
# Bytes a second of a plain copy, assumed from what others measured; microseconds to start a launch.
COPY = {"A100": 1.75e12, "H100": 3.0e12, "H200": 4.3e12, "B200": 6.8e12, "RTX 4090": 0.93e12, "MI300X": 4.2e12}
START_US, SHARE_OF_COPY = 2.5, 0.9


PREDICTED_PAIRS = (1, 4, 8)


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
def compile_only(
    target: GPUTarget, module: ModuleType = kernels
) -> Iterator[list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]]:
    """Inside, launches compile for `target` and are recorded as (kernel name, compiled kernel, arguments, options)."""
    launches: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = []
    before = triton.KernelInterface.__getitem__
    jitted = [fn for fn in vars(module).values() if isinstance(fn, triton.JITFunction)]

    def launch(kernel: Any, grid: Any) -> Any:
        def record(*args: Any, **options: Any) -> None:
            name = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
            named = dict(zip(kernel.arg_names, args, strict=False)) | options | {"grid": grid}
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


def _latents(latent: str, dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # never written: the pages of these tensors are not even allocated
    shape = (2048 if latent == "cogvideox-x1024" else 2, *SHAPES[latent])
    format = torch.channels_last_3d if latent.endswith("-tokens") else torch.contiguous_format
    own, other = DTYPES[dtype]
    policy, reference, target = (torch.empty(shape, dtype=one, memory_format=format) for one in (own, own, other))
    return policy, reference, target


def launch_all(latent: str, grid: tuple[int, ...], dtype: str) -> None:
    """One forward, table and backward, and the forward without a reference, as the library launches them."""
    policy, reference, target = _latents(latent, dtype)
    log_ratio = kernels.patch_log_ratio(policy, reference, target, grid)
    kernels.patch_error(policy, target, grid)
    kernels.gran_dpo_backward(log_ratio[0, 0, 0, 0], log_ratio, policy, target)
    if latent != "cogvideox-x1024":
        launch_table(1, grid, "sigmoid", False, log_ratio.dtype, SHAPES[latent])


def launch_table(
    pairs: int,
    grid: tuple[int, ...],
    link: str,
    everything: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    bounded: bool = False,
) -> None:
    """The table's launches; with `everything` every optional argument is there, `bounded` has caps and pair weights."""
    sizes = (2 * pairs, *grid), (2 * pairs,), (3 if bounded else 2, pairs)
    table, videos, scale = (torch.empty(size, dtype=dtype) for size in sizes)
    caps = (2.0, 1.0) if bounded else ()
    numbers = TableNumbers(0.1, 1.0, 1.0, 500.0, 50.0, 0.0, 0.0, 1.0, 0.0, 0.1, 0.1, *caps)
    optional = (scale, table, table) if everything else (None, None, None)
    kernels.gran_dpo_table(table, table, videos, *optional, shape, link, numbers)


def _nvidia_tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _loop_costs(code: list[tuple[str, str]], load: str, branch: str, lines: int | None) -> dict[str, int | str]:
    """What the loop over latents costs, from (label or address, instruction) pairs.

    Instructions before the first of the widest loads, instructions a line, and how many loads are issued before the
    first of their values is used. The loop is the one with most loads. It has `lines` lines, or by default as many as
    it has more loads than the compiler's loop of one line for what is left over after unrolling.
    """
    place: dict[str, int] = {}
    for index, (label, _) in enumerate(code):
        place.setdefault(label, index)
    loads = [bool(re.search(load, text)) for _, text in code]
    loops = []
    for index, (_, text) in enumerate(code):
        jump = re.search(branch, text)
        if jump and place.get(jump[1], index) < index and any(loads[place[jump[1]] : index]):
            loops.append((sum(loads[place[jump[1]] : index]), place[jump[1]], index + 1))
    if not loops:
        return {"before_loads": "", "line_instructions": "", "batch": ""}
    most, first, last = max(loops, key=lambda loop: (loop[0], loop[1] - loop[2]))
    lines = lines or most // min(count for count, *_ in loops)
    pending: set[str] = set()
    batch = 0
    for _, text in code[first:last]:
        registers = _registers(text)
        if pending & set(registers[1:] if re.search(load, text) else registers):
            break
        if re.search(load, text):
            batch += 1
            pending.add(registers[0])
    return {"before_loads": loads.index(True), "line_instructions": (last - first) // lines, "batch": batch}


def _registers(text: str) -> list[str]:
    """The registers that an instruction names, of a range the first, in order."""
    return [one or other for one, other in re.findall(r"\b(R\d+)\b|\b(v(?:\d+|\[\d+))", text)]


def _inspect_cubin(cubin: bytes, lines: int | None) -> dict[str, int | str]:
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
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", text, re.M)
    code = [(address.lstrip("0") or "0", instruction) for address, instruction in code]
    instructions = [instruction.split()[0] for _, instruction in code]

    def widest(stem: str) -> int:
        found = [name for name in instructions if name.split(".")[0] == stem]
        widths = [
            next((int(part) for part in name.split(".")[1:] if part in ("64", "128", "256")), 32) for name in found
        ]
        narrow = [16 if ".U16" in name or ".S16" in name else 8 if ".U8" in name else 32 for name in found]
        return max((min(w, n) if n < 32 else w for w, n in zip(widths, narrow, strict=True)), default=0)

    width = widest("LDG")
    load = rf"^LDG\S*\.{width}" if width > 32 else r"^LDG"
    return {
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "spills": sum(name.split(".")[0] in ("STL", "LDL") for name in instructions),
        "load_bits": width,
        "store_bits": widest("STG"),
        "instructions": len(instructions),
    } | _loop_costs(code, load, r"^BRA\S*\s.*?0x0*([0-9a-f]+)", lines)


def _inspect_amdgcn(text: str, lines: int | None) -> dict[str, int | str]:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    def widest(kind: str) -> int:
        found = re.findall(rf"(?:global|buffer|flat)_{kind}_(dwordx?\d*|b\d+|u?short|u16|u?byte|u8)", text)
        sizes = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "short": 16, "ushort": 16, "u16": 16}
        return max(
            (sizes.get(one) or int(one.strip("bu") or 0) if one[:4] != "byte" else 8 for one in found), default=0
        )

    code, label = [], ""
    for line in map(str.strip, text.splitlines()):
        if named := re.match(r"(\.LBB\w+):", line):
            label = named[1]
        elif re.match(r"(v|s|ds|global|buffer|flat)_", line):
            code.append((label, line))
    width = widest("load")
    suffix = {128: "dwordx4", 64: "dwordx2", 32: "dword"}.get(width, "")
    return {
        "registers": field("vgpr_count"),
        "stack_bytes": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "load_bits": width,
        "store_bits": widest("store"),
        "instructions": sum(not line.startswith("s_") for _, line in code),
    } | _loop_costs(code, rf"^(global|buffer|flat)_load_{suffix}", r"^s_c?branch\w*\s+(\.LBB\w+)", lines)


def inspect(kernel: Any, lines: int | None = None) -> dict[str, Any]:
    """Registers, stack, spills, widest load and store in bits, shared memory, instructions and its loop's costs.

    `lines` is how many lines of latents a pass of its loop reads, where the source says so and not the compiler.
    """
    if "cubin" in kernel.asm:
        found = _inspect_cubin(kernel.asm["cubin"], lines)
    else:
        found = _inspect_amdgcn(kernel.asm["amdgcn"], lines)
    return found | {"shared_bytes": kernel.metadata.shared, "warps": kernel.metadata.num_warps}


def _lines(name: str, module: ModuleType) -> int | None:
    return module.BATCH.value if name == "backward" and hasattr(module, "BATCH") else None


def overruns(row: dict[str, Any]) -> list[str]:
    """Which budgets a row of the matrix breaks."""
    vendor = TARGETS[row["target"]].backend
    budget = {"spills": SPILLS[row["kernel"]], "registers": REGISTERS[vendor][row["kernel"]], "shared_bytes": SHARED}
    if row["kernel"] == "forward":
        budget |= NAMED.get((row["target"], row["variant"]), {})
    if vendor == "hip" and not row["stack_bytes"]:
        del budget["spills"]  # without a stack they are scalars kept in lanes of vector registers, not in memory
    broken = [f"{name} {row[name]} > {limit}" for name, limit in budget.items() if row[name] > limit]
    if row["kernel"] in ("forward", "backward"):
        # a thread never loads more than its own positions, nor more than the planes' common alignment in one go
        possible = min(128, 8 * row["align_bytes"], 8 * row["thread_bytes"])
        if row["load_bits"] < possible:
            broken.append(f"load_bits {row['load_bits']} < {possible}")
        if row["kernel"] == "backward" and row["store_bits"] < possible:
            broken.append(f"store_bits {row['store_bits']} < {possible}")
    return broken


def _describe(target: str, dtype: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    programs = math.prod(options["grid"])
    row = {
        "kernel": name,
        "programs": programs,
        "programs_a_multiprocessor": round(programs / MULTIPROCESSORS[target], 1),
    }
    if name in ("table", "sum"):
        flags = [flag for flag in ("SUPERVISED", "CAPPED", "WEIGHTED", "SUMS", "RESULTS") if options.get(flag)]
        sizes = [f"{size} {options[size]}" for size in ("LINK", "PAIRS", "PATCHES", "ROWS", "PARTS") if size in options]
        return row | {"variant": " ".join([*sizes, *flags]), "align_bytes": "", "thread_bytes": ""}
    flags = [flag for flag in ("POSITIONS", "WIDE", "HAS_REFERENCE") if options.get(flag)]
    sizes = [f"{size} {options[size]}" for size in ("BLOCK", "LANES", "ALIGN") if size in options]
    itemsize, threads = min(one.itemsize for one in DTYPES[dtype]), TARGETS[target].warp_size * options["num_warps"]
    return row | {
        "variant": " ".join([*sizes, *flags]),
        "align_bytes": options["ALIGN"] * itemsize,
        "thread_bytes": max(1, options["BLOCK"] * options.get("LANES", 1) // threads) * itemsize,
    }


def _in_flight(row: dict[str, Any]) -> int | str:
    """Bytes under way on a multiprocessor: one batch of loads of each program that fits on it at once."""
    if not row["batch"] or row["kernel"] not in ("forward", "backward"):
        return ""
    target = TARGETS[row["target"]]
    threads = row["warps"] * target.warp_size
    fit = (65536 if target.backend == "cuda" else 131072) // (max(1, row["registers"]) * threads)
    return int(min(fit, 32, row["programs_a_multiprocessor"]) * threads * row["batch"] * row["load_bits"] / 8)


def _launch_matrix(latents: list[str], dtypes: list[str]) -> Iterator[dict[str, Any]]:
    """Launches one case after another; yields what names it."""
    for latent, cut, dtype in itertools.product(latents, GRIDS, dtypes):
        sides = SHAPES[latent][1:]
        grid = sides if cut is None else tuple(min(n, side) for n, side in zip(cut, sides, strict=True))
        launch_all(latent, grid, dtype)
        yield {"latent": latent, "pairs": 1, "grid": "x".join(map(str, grid)), "dtype": dtype, "everything": False}
    if latents == list(SHAPES):
        cases = [
            (pairs, grid, "sigmoid", full, False) for pairs in PAIRS for grid in TABLE_GRIDS for full in (False, True)
        ]
        cases += [(1, TABLE_GRIDS[0], link, True, False) for link in kernels.LINKS[1:]]
        cases += [(pairs, grid, "sigmoid", True, True) for pairs in PAIRS for grid in TABLE_GRIDS]
        cases += [(1, TABLE_GRIDS[0], "poly", True, True)]
        for pairs, grid, link, everything, bounded in cases:
            launch_table(pairs, grid, link, everything, torch.float32, SHAPES["cogvideox"], bounded)
            named = {"latent": "cogvideox", "pairs": pairs, "grid": "x".join(map(str, grid)), "dtype": "fp32"}
            yield named | {"everything": everything}


def matrix(targets: list[str], latents: list[str], dtypes: list[str]) -> list[dict[str, Any]]:
    """One row for each target, case and launch; equal specialisations are compiled and read once."""
    rows: list[dict[str, Any]] = []
    for target in targets:
        found: list[tuple[dict[str, Any], Any]] = []
        with compile_only(TARGETS[target]) as launches:
            for case in _launch_matrix(latents, dtypes):
                found += [
                    ({"target": target} | case | _describe(target, case["dtype"], name, options), kernel)
                    for name, kernel, _, options in launches
                ]
                launches.clear()
        unique = {id(kernel): (kernel, _lines(row["kernel"], kernels)) for row, kernel in found}
        with ThreadPoolExecutor() as pool:
            inspected = dict(zip(unique, pool.map(lambda one: inspect(*one), unique.values()), strict=True))
        for row, kernel in found:
            row |= inspected[id(kernel)]
            rows.append(row | {"bytes_in_flight": _in_flight(row)})
        print(f"{target}: {len(found)} launches, {len(unique)} different kernels", file=sys.stderr)
    return rows


def kernels_of(revision: str, folder: Path) -> ModuleType:
    """The Triton kernels of a git revision, loaded from a copy in `folder`."""
    command = ["git", "show", f"{revision}:kernels/triton_patch_dpo.py"]
    source = subprocess.run(command, check=True, capture_output=True, text=True, cwd=RESULTS).stdout
    path = folder / "kernels_before.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def models(module: ModuleType = kernels) -> list[dict[str, Any]]:
    """The kernels that run over latents, of this or another revision, for real models."""
    found: list[tuple[dict[str, Any], Any]] = []
    with compile_only(TARGETS[MODEL_TARGET], module) as launches:
        for latent, pairs in itertools.product(MODELS, MODEL_PAIRS):
            shape = 2 * pairs, *SHAPES[latent]
            policy, reference, target = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(3))
            table = module.patch_log_ratio(policy, reference, target, MODEL_GRID)
            module.gran_dpo_backward(table[0, 0, 0, 0], table, policy, target)
            found += [
                ({"latent": latent, "pairs": pairs} | _describe(MODEL_TARGET, "bf16", name, options), kernel)
                for name, kernel, _, options in launches
                if name in ("forward", "backward")
            ]
            launches.clear()
    rows: list[dict[str, Any]] = []
    for row, kernel in found:
        row = {"target": MODEL_TARGET} | row | inspect(kernel, _lines(row["kernel"], module))
        rows.append(row | {"bytes_in_flight": _in_flight(row)})
    return rows


def beside(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """The Markdown table of two revisions' kernels for the same models."""
    columns = {
        "programs a multiprocessor": "programs_a_multiprocessor",
        "bytes in flight": "bytes_in_flight",
        "instructions before the first wide load": "before_loads",
        "a line": "line_instructions",
        "loads in one batch": "batch",
        "registers": "registers",
    }
    lines = [f"| latent, pairs, kernel | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for old, new in zip(before, now, strict=True):
        assert all(str(old[key]) == str(new[key]) for key in ("latent", "pairs", "kernel"))
        pairs = f"{old['pairs']} pair{'s' if int(old['pairs']) > 1 else ''}"
        cells = [f"{old[key]} → {new[key]}" for key in columns.values()]
        lines.append(f"| {old['latent']}, {pairs}, {old['kernel']} | {' | '.join(cells)} |")
    return lines


def _compare(revision: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        before, now = models(kernels_of(revision, Path(folder))), models()
    stamp = {"triton": triton.__version__}
    source = code_hash(Path(kernels.__file__))
    rows = [{"revision": revision, "source": ""} | row | stamp for row in before]
    _write(MODELS_CSV, rows + [{"revision": "", "source": source} | row | stamp for row in now])
    print("\n".join(beside(before, now)))


def predicted_us(moved: int, launches: int, rate: float) -> float:
    """Microseconds of launches that move so many bytes, at a share of the rate of a copy."""
    return launches * START_US + 1e6 * moved / (SHARE_OF_COPY * rate)


def predictions(latents: list[str]) -> list[dict[str, Any]]:
    """Bytes moved and the time of a whole call by size: predicted, never measured.

    The call is three launches: forward, table, backward. `H100_of_copy` is its rate beside that of one `torch.clone` of
    as many bytes, its start included.
    """
    rows = []
    for latent, name, pairs in itertools.product(latents, ("bf16", "bf16+fp32", "fp32"), PREDICTED_PAIRS):
        shape, (own, other) = (2 * pairs, *SHAPES[latent]), (one.itemsize for one in DTYPES[name])
        forward = kernels.forward_bytes(shape, MODEL_GRID, own, own, other)
        backward = kernels.backward_bytes(shape, MODEL_GRID, own, other)
        row: dict[str, Any] = {"latent": latent, "dtype": name, "pairs": pairs}
        row |= {"forward_bytes": forward, "backward_bytes": backward}
        row |= {
            f"{gpu}_predicted_us": round(predicted_us(forward + backward, 3, rate), 1) for gpu, rate in COPY.items()
        }
        copy = START_US + 1e6 * (forward + backward) / COPY["H100"]
        rows.append(row | {"H100_of_copy": round(copy / predicted_us(forward + backward, 3, COPY["H100"]), 2)})
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
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "bf16+fp32", "fp32"])
    parser.add_argument("--check", action="store_true", help="print and judge, but leave the committed CSV alone")
    parser.add_argument("--beside", metavar="REVISION", help="compare with that revision's kernels, and no more")
    choice = parser.parse_args()
    if choice.beside:
        _compare(choice.beside)
        return 0
    rows = matrix(choice.targets, choice.latents, choice.dtypes)
    # one line for each different kernel; the CSV has every launch
    short = {tuple(row[key] for key in ("target", "kernel", "dtype", "variant")): row for row in rows}
    hidden = ("latent", "pairs", "grid", "align_bytes", "thread_bytes", "programs")
    _print([{key: value for key, value in row.items() if key not in hidden} for row in short.values()])
    model = predictions(choice.latents)
    print(
        f"\npredicted, nothing was measured on a GPU: {START_US} us for each of three launches and the bytes at "
        f"{SHARE_OF_COPY} of a copy's rate"
    )
    _print(model)
    if not choice.check:
        stamp = {"source": code_hash(Path(kernels.__file__)), "triton": triton.__version__}
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
