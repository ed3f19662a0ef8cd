"""What compilers make of the Triton kernels for GPUs that are not here, and the model of the bytes they move."""

import csv
import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton and its bundled compilers")

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "resources.csv"


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a kernel imported for the interpreter can never be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_resources_stay_in_budget_when_compiled_now():
    """A part of the matrix; `python -m benchmarks.resources` compiles all of it."""
    done = compiled(
        "-m",
        "benchmarks.resources",
        "--check",
        "--targets",
        "sm_80",
        "sm_90",
        "gfx942",
        "--latents",
        "cogvideox",
        "--dtypes",
        "bf16",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "0 over budget" in done.stdout


def test_resources_committed_are_complete_in_budget_and_of_these_kernels():
    rows = list(csv.DictReader(COMMITTED.open()))
    source = hashlib.sha256((ROOT / "kernels" / "triton_patch_dpo.py").read_bytes()).hexdigest()[:16]
    assert {row["source"] for row in rows} == {source}, "run python -m benchmarks.resources and commit its results"
    assert {row["target"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"}
    assert {row["dtype"] for row in rows} == {"bf16", "fp32"}
    each = Counter((row["latent"], row["grid"], row["kernel"]) for row in rows)
    assert each["cogvideox", "13x60x90", "backward"] == 7 * 2 and each["hunyuanvideo", "13x4x6", "forward"] == 2 * 7 * 2
    for row in rows:
        assert int(row["spills"]) == 0 and int(row["stack_bytes"]) == 0
        if row["kernel"] != "table":
            assert int(row["registers"]) <= (80 if row["target"].startswith("sm_") else 160)
            assert int(row["shared_bytes"]) <= 16384
            assert int(row["load_bits"]) >= min(128, 8 * int(row["align_bytes"]), 8 * int(row["thread_bytes"]))


LAUNCHES = """
import torch
from benchmarks.resources import TARGETS, compile_only
from halo_fast import gran_dpo
from halo_fast.loss import backends
from halo_fast.kernels import triton_patch_dpo as kernels

shape, grid = (2, 16, 13, 60, 90), (4, 3, 3)
policy, reference, target = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(3))

def moved(args):
    tensors = {id(x): x for x in args if isinstance(x, torch.Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())

with compile_only(TARGETS["sm_90"]) as launches:
    table = kernels.patch_log_ratio(policy, reference, target, grid)
    (_, _, args, _), = launches
    # parts and arrivals are the launcher's own workspace, which stays in the cache
    workspace = sum(x.numel() * x.element_size() for x in args[4:6])
    assert moved(args) - workspace == kernels.forward_bytes(shape, grid, 2), (moved(args), workspace)
    assert workspace < 0.02 * kernels.forward_bytes(shape, grid, 2), workspace
    launches.clear()
    kernels.patch_error(policy, target, grid)
    (_, _, args, _), = launches
    workspace = sum(x.numel() * x.element_size() for x in args[4:6])
    assert moved(args) - workspace == kernels.forward_bytes(shape, grid, 2, inputs=2)
    launches.clear()
    kernels.gran_dpo_backward(torch.ones(()), table, policy, target)
    (_, _, args, _), = launches
    assert moved(args) == kernels.backward_bytes(shape, grid, 2)
    launches.clear()
    numbers = (0.0, 1.0, 1.0, 500.0, 50.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    videos = table[:, 0, 0, 0].contiguous()
    kernels.gran_dpo_table(table, table, videos, None, None, None, shape[1:], "sigmoid", numbers)
    assert len(launches) == 1
    launches.clear()
    # the public call: two launches forward, one backward, and nothing that torch would launch beside them; only a CPU
    # sums the rewards to see whether they are finite, and sets the slabs' counters to zero anew
    backends.select = lambda device, dtype: kernels
    one = torch.ones(())
    policy.requires_grad_()
    with torch.profiler.profile() as profile:
        loss = gran_dpo(policy, target, reference, table, videos).loss
        forward = len(launches)
        torch.autograd.grad(loss, policy, one)
    assert (forward, len(launches)) == (2, 3), [name for name, *_ in launches]
    ran = {event.name.removeprefix("aten::") for event in profile.events() if event.name.startswith("aten::")}
    ran -= {"sum", "item", "_local_scalar_dense", "fill_", "zeros", "zero_"}
    assert not {name for name in ran if not name.startswith(("empty", "new_empty", "as_strided", "detach", "to"))}, ran
    policy.requires_grad_(False)
    launches.clear()
    strided = policy.transpose(1, 2).contiguous().transpose(1, 2)
    assert kernels.patch_error_backward(table, strided, target).stride() == strided.stride()
    (name, compiled, _, options), = launches
    # both layouts are read in place, and as wide
    assert options["FLAT"] and options["ALIGN"] == 8
    # the last program of a slab sees the others' parts: their stores are released before, and acquired after
    launches.clear()
    kernels.patch_log_ratio(policy, reference, target, grid)
    ptx = launches[0][1].asm["ptx"]
    assert "atom.global.gpu.acq_rel" in ptx and ptx.index("bar.sync") < ptx.index("atom.global.gpu.acq_rel")
    assert "red.global" not in ptx and "atom.global.gpu.acq_rel.add.f" not in ptx
print("ok")
"""


def test_resources_of_one_call_are_two_launches_forward_one_backward_and_the_bytes_of_the_model():
    done = compiled("-c", LAUNCHES)
    assert done.returncode == 0 and done.stdout.strip().endswith("ok"), done.stderr[-3000:]


def test_resources_of_launches_do_not_depend_on_the_device():
    """Sums are cut by shape alone, so their bits travel from one GPU to the next."""
    from halo_fast.kernels import triton_patch_dpo as kernels

    names = kernels.launch_config.__code__.co_varnames[: kernels.launch_config.__code__.co_argcount]
    assert names == ("positions", "lines", "align_bytes", "itemsize")
    for positions in (1, 90, 1980, 14400):
        for lines in (1, 64, 528):
            for dtype in (torch.bfloat16, torch.float64):
                config = kernels.launch_config(positions, lines, 16, dtype.itemsize)
                assert config.block >= min(positions, 128) and config.block & (config.block - 1) == 0
