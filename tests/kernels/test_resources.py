"""What compilers make of the Triton kernels for GPUs that are not here, and the model of the bytes they move."""

import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import code_hash

pytest.importorskip("triton", reason="needs triton and its bundled compilers")

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "resources.csv"


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a kernel imported for the interpreter can never be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
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
    source = code_hash(ROOT / "kernels" / "triton_patch_dpo.py")
    assert {row["source"] for row in rows} == {source}, "run python -m benchmarks.resources and commit its results"
    assert {row["target"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"}
    assert {row["dtype"] for row in rows} == {"bf16", "bf16+fp32", "fp32"}
    each = Counter((row["latent"], row["grid"], row["kernel"]) for row in rows)
    assert each["cogvideox", "13x60x90", "backward"] == 7 * 3
    assert each["hunyuanvideo", "13x4x6", "forward"] == 2 * 7 * 3
    tables = [row for row in rows if row["kernel"] == "table"]
    assert {row["pairs"] for row in tables} == {"1", "2", "4", "8", "16"}
    for flag in ("SUPERVISED", "CAPPED", "WEIGHTED"):
        assert {True, False} == {flag in row["variant"] for row in tables}
    for row in rows:
        nvidia = row["target"].startswith("sm_")
        # The table, one program that waits for memory, may keep a few values in local memory. So do three forward
        # kernels for tokens outside their loop. AMD's scalars spill into vector registers, which takes no stack.
        tokens = row["kernel"] == "forward" and "LANES 128" in row["variant"]
        if nvidia:
            assert int(row["spills"]) <= (24 if row["kernel"] == "table" else 6 if tokens else 0), row
        else:
            assert int(row["stack_bytes"]) == 0, row
        if row["kernel"] not in ("forward", "backward"):
            continue
        assert int(row["shared_bytes"]) <= 16384
        assert int(row["registers"]) <= ((132 if row["kernel"] == "forward" else 128) if nvidia else 256)
        assert int(row["load_bits"]) >= min(128, 8 * int(row["align_bytes"]), 8 * int(row["thread_bytes"]))


def test_resources_committed_say_that_loops_are_cheap_and_the_machine_is_full():
    """On an H100 at real sizes; the same table, beside an earlier revision, stands in the kernels' page."""
    rows = list(csv.DictReader((ROOT / "benchmarks" / "results" / "resources_models.csv").open()))
    before, now = ([row for row in rows if bool(row["revision"]) == old] for old in (True, False))
    source = code_hash(ROOT / "kernels" / "triton_patch_dpo.py")
    assert {row["source"] for row in now} == {source}, "run python -m benchmarks.resources --beside f062473"
    cases = [(row["latent"], row["pairs"], row["kernel"]) for row in now]
    models = ("cogvideox", "wan", "wan-720p", "hunyuanvideo", "ltx")
    assert set(cases) == {(one, pairs, name) for one in models for pairs in "14" for name in ("forward", "backward")}
    for row in now:
        assert float(row["programs_a_multiprocessor"]) >= 4 and int(row["spills"]) == 0, row
        assert int(row["bytes_in_flight"]) >= 50_000, row
        assert int(row["batch"]) >= (6 if row["kernel"] == "forward" else 8)
        assert int(row["line_instructions"]) <= (120 if row["kernel"] == "forward" else 90)
        assert int(row["before_loads"]) <= (320 if row["kernel"] == "forward" else 460)
    page = (ROOT / "docs" / "kernels.md").read_text()
    for old, new in zip(before, now, strict=True):
        name = f"| {new['latent']}, {new['pairs']} pair{'s' * (new['pairs'] != '1')}, {new['kernel']} |"
        (line,) = [line for line in page.splitlines() if line.startswith(name)]
        for column in ("programs_a_multiprocessor", "bytes_in_flight", "before_loads", "line_instructions", "batch"):
            assert f" {old[column]} → {new[column]} |" in line


LAUNCHES = """
import torch
from benchmarks.resources import TARGETS, compile_only
from halo_fast import gran_dpo
from halo_fast.loss import backends
from halo_fast.kernels import triton_patch_dpo as kernels

shape, grid = (2, 16, 13, 60, 90), (4, 3, 3)
policy, reference, target = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(3))

def moved(named, *names):
    return sum(named[name].numel() * named[name].element_size() for name in names)

with compile_only(TARGETS["sm_90"]) as launches:
    table = kernels.patch_log_ratio(policy, reference, target, grid)
    (first, _, _, named), (second, _, _, summed) = launches
    assert (first, second) == ("forward", "sum") and summed["out"] is table and summed["parts"] is named["out"]
    inputs = moved(named, "policy", "reference", "target")
    assert inputs + moved(summed, "out") == kernels.forward_bytes(shape, grid, 2, 2, 2)
    # parts are written once and read once, and stay in the cache
    assert 2 * moved(named, "out") < 0.02 * inputs
    launches.clear()
    wide = target.float()
    error = kernels.patch_error(policy, wide, grid)
    (_, _, _, named), (_, _, _, summed) = launches
    assert moved(named, "policy", "target") + moved(summed, "out") == kernels.forward_bytes(shape, grid, 2, 4)
    assert named["target"] is wide, "read as it is, not cast"
    launches.clear()
    kernels.gran_dpo_backward(torch.ones(()), table, policy, wide)
    (_, _, _, named), = launches
    bytes = moved(named, "factor", "grad", "prediction", "target", "gradient")
    assert bytes == kernels.backward_bytes(shape, grid, 2, 4)
    launches.clear()
    inf = float("inf")
    numbers = (0.0, 1.0, 1.0, 500.0, 50.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, inf, inf)
    videos = table[:, 0, 0, 0].contiguous()
    for beta in (500.0, 501.5):
        new = (0.0, 1.0, 1.0, beta, *numbers[4:])
        kernels.gran_dpo_table(table, table, videos, None, None, None, shape[1:], "sigmoid", new)
    (_, one, _, _), (_, other, _, _) = launches
    assert one is other, "a new beta compiles nothing"
    launches.clear()
    for cap in (1.5, 2.0):
        kernels.gran_dpo_table(table, table, videos, None, None, None, shape[1:], "sigmoid", (*numbers[:-1], cap))
    (_, capped, _, named), (_, other, _, _) = launches
    assert named["CAPPED"] and capped is other and capped is not one, "nor does a new cap"
    launches.clear()
    # a large table takes several programs: its sums, its results, the parts of the loss
    fine = torch.empty(2, 13, 60, 90)
    kernels.gran_dpo_table(fine, fine, videos, None, None, None, shape[1:], "sigmoid", numbers)
    assert [name for name, *_ in launches] == ["table", "table", "sum"]
    assert launches[0][3]["grid"][1] > 4
    launches.clear()
    # the public call: two launches forward, one backward, and nothing that torch would launch beside them; only a CPU
    # sums the rewards to see whether they are finite
    # nothing was computed: what lies in the labels by chance must be finite
    table.zero_(), videos.zero_()
    backends.select = lambda device, dtype: kernels
    one = torch.ones(())
    policy.requires_grad_()
    for cached in (None, torch.rand(2, *grid)):
        launches.clear()
        with torch.profiler.profile() as profile:
            given = None if cached is not None else reference
            loss = gran_dpo(policy, wide, given, table, videos, reference_error=cached).loss
            forward = len(launches)
            torch.autograd.grad(loss, policy, one)
        assert (forward, len(launches)) == (2, 3), [name for name, *_ in launches]
        ran = {event.name.removeprefix("aten::") for event in profile.events() if event.name.startswith("aten::")}
        ran -= {"sum", "item", "_local_scalar_dense", "fill_"}
        harmless = ("empty", "new_empty", "as_strided", "detach", "to")
        assert all(name.startswith(harmless) for name in ran), ran
    policy.requires_grad_(False)
    launches.clear()
    strided = policy.transpose(1, 2).contiguous().transpose(1, 2)
    assert kernels.patch_error_backward(table, strided, target).stride() == strided.stride()
    (_, _, _, named), = launches
    # both layouts are read in place, and as wide
    assert named["FLAT"] and named["ALIGN"] == 8
    launches.clear()
    tokens = policy.contiguous(memory_format=torch.channels_last_3d)
    kernels.patch_log_ratio(tokens, tokens, tokens, grid)
    assert launches[0][3]["LANES"] == 16 and launches[0][3]["ALIGN"] == 8
    assert "atom" not in launches[0][1].asm["ptx"]
print("ok")
"""


def test_resources_of_one_call_are_two_launches_forward_one_backward_and_the_bytes_of_the_model():
    done = compiled("-c", LAUNCHES)
    assert done.returncode == 0 and done.stdout.strip().endswith("ok"), done.stderr[-3000:]


PLANS = """
import torch, triton
from benchmarks.resources import TARGETS, _CompileOnly
from halo_fast.kernels import triton_patch_dpo as kernels

ran = []
class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *args: ran.append(("plan", grid, args))

compiled = Compiled(None)
triton.runtime.driver.set_active(_CompileOnly(TARGETS["sm_90"]))
def launch(kernel, grid):
    return lambda *args, **options: ran.append(("first", grid, args)) or compiled
triton.KernelInterface.__getitem__ = launch
policy, reference, target = (torch.empty(2, 16, 13, 60, 90, dtype=torch.bfloat16) for _ in range(3))
for _ in range(2):
    kernels.patch_log_ratio(policy, reference, target, (4, 3, 3))
assert [how for how, *_ in ran] == ["first", "first", "plan", "plan"]
# the same launch, but for the tensors
for first, second in zip(ran[:2], ran[2:], strict=True):
    assert first[1] == second[1] and len(first[2]) == len(second[2])
    assert all(one == other for one, other in zip(first[2], second[2]) if not isinstance(one, torch.Tensor))
# another stride, dtype or alignment of a view is another plan
for views in (
    (policy.transpose(3, 4).contiguous().transpose(3, 4), reference, target),
    (policy, reference, target.float()),
    (policy, reference, torch.empty(target.numel() + 1, dtype=target.dtype)[1:].view(target.shape)),
):
    ran.clear()
    kernels.patch_log_ratio(*views, (4, 3, 3))
    assert ran[0][0] == "first"
print("ok")
"""


def test_resources_of_a_second_call_come_from_its_plan():
    done = compiled("-c", PLANS)
    assert done.returncode == 0 and done.stdout.strip().endswith("ok"), done.stderr[-3000:]


def test_resources_of_launches_do_not_depend_on_the_device():
    """Sums are cut by shape alone, so their bits travel from one GPU to the next."""
    from halo_fast.kernels import triton_patch_dpo as kernels

    names = kernels.launch_config.__code__.co_varnames[: kernels.launch_config.__code__.co_argcount]
    assert names == ("positions", "lines", "slabs", "lanes", "align_bytes", "itemsize", "least")
    for positions in (1, 90, 1980, 14400):
        for lines in (1, 64, 528):
            for lanes in (1, 16, 128):
                config = kernels.launch_config(positions, lines, 8, lanes, 16, 4, 4)
                assert config.block * lanes <= kernels.TILE and config.block & (config.block - 1) == 0
                programs = 8 * -(-positions // config.block) * -(-lines // config.lines)
                assert config.lines == 4 or programs * config.block * lanes >= kernels.PROGRAMS * kernels.TILE // 2


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 90, 104, 160, 1023])
def test_resources_saved_by_multiplying_divide_exactly(divisor):
    """floor(x / d) by the high half of 4 x (2^30 // d + 1), for every x that the kernels' rule admits."""
    from halo_fast.kernels import triton_patch_dpo as kernels

    last = min(2**30 // divisor, 2**28)
    x = torch.cat([torch.arange(min(last, 2**20)), torch.arange(last - min(last, 2**20), last)])
    assert torch.equal((4 * x * kernels._magic(divisor)) >> 32, x // divisor)
