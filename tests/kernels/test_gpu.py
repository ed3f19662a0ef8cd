"""Checks for a GPU: `make gpu` runs them. Elsewhere their bodies run on small CPU tensors, so that they do not rot."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch

from halo_fast import gran_dpo, using_backend
from halo_fast.loss import backends, reference

ROOT = Path(__file__).parents[2]
ON_BOTH = [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"]
SMALL, SMALL_GRID = (3, 5, 7, 9), (2, 3, 4)


@pytest.fixture(params=ON_BOTH)
def device(request):
    if request.param == "cpu" and backends.unavailable("triton", "cpu"):
        pytest.skip("the interpreter is off on a machine with a GPU")
    return request.param


def sizes(device):
    """Real latents on a GPU, a small one on the CPU."""
    if device == "cpu":
        return [(SMALL, SMALL_GRID)]
    return [
        (shape, grid) for shape in cases.LATENTS.values() for grid in (*cases.GRIDS, shape[1:]) if grid[0] <= shape[1]
    ]


def kernels(device):
    return backends.select(torch.device(device), torch.float32, "triton")


def call(device, shape, grid, dtype, seed=0):
    """Loss, logits and gradient of one call of gran_dpo."""
    prediction, ref, target = (x.to(device) for x in cases.latents(shape, 2, dtype, seed=seed))
    prediction.requires_grad_()
    labels = [x.to(device) for x in cases.rewards(grid, 2)]
    with using_backend("triton"):
        out = gran_dpo(prediction, target, ref, *labels)
        out.loss.backward()
    return [out.loss.detach(), out.patch_logits, out.video_logits, prediction.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(device, dtype):
    for shape, grid in sizes(device):
        policy, ref, target = (x.to(device) for x in cases.latents(shape, 2, dtype))
        wide = [x.double() for x in (policy, ref, target)]
        terms = (wide[0] - wide[1]) * (wide[0] + wide[1] - 2 * wide[2])
        scale = reference.patch_mean(terms.abs(), grid)
        found = kernels(device).patch_log_ratio(policy, ref, target, grid)
        worst = ((found - reference.patch_log_ratio(*wide, grid)).abs() / scale).max().item()
        elements = policy[0].numel() // (grid[0] * grid[1] * grid[2])
        assert worst < cases.table_tolerance(dtype, max(1, elements))
        grad = cases.rewards(grid, 2)[0].to(device)
        gradient = kernels(device).patch_error_backward(grad, policy, target)
        truth = reference.patch_error_backward(grad.double(), wide[0], wide[2])
        # compared at a magnitude where the storage type has all its digits
        if dtype == torch.float16:
            gradient = kernels(device).patch_error_backward(grad * elements, policy, target)
            truth = truth * elements
        assert ((gradient.double() - truth).norm() / truth.norm()).item() < cases.GRADIENT_TOLERANCE[dtype]


def test_the_same_bits_on_every_run(device):
    for shape, grid in sizes(device)[:6]:
        first = call(device, shape, grid, torch.bfloat16)
        for _ in range(20 if device == "cuda" else 1):
            again = call(device, shape, grid, torch.bfloat16)
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_the_same_bits_on_many_streams_at_once(device):
    """Launches of one stream depend on each other, those of several on nothing that they share."""
    shape, grid = sizes(device)[0]
    policy, ref, target = (x.to(device) for x in cases.latents(shape, 2, torch.bfloat16))
    truth = kernels(device).patch_log_ratio(policy, ref, target, grid)
    streams = [torch.cuda.Stream() for _ in range(4)] if device == "cuda" else [None] * 2
    results = []
    for turn in range(100 if device == "cuda" else 2):
        stream = streams[turn % len(streams)]
        if stream is not None:
            stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            results.append(kernels(device).patch_log_ratio(policy, ref, target, grid))
    if device == "cuda":
        torch.cuda.synchronize()
    assert all(torch.equal(result, truth) for result in results)


def test_captured_in_a_graph(device):
    """Replays on new inputs equal eager calls: nothing waits for the device or keeps a value of the capture."""
    shape, grid = sizes(device)[0]
    static = [x.to(device) for x in cases.latents(shape, 2, torch.bfloat16)]
    labels = [x.to(device) for x in cases.rewards(grid, 2)]
    static[0].requires_grad_()

    def step():
        with using_backend("triton"):
            loss = gran_dpo(static[0], static[2], static[1], *labels).loss
            return loss.detach(), torch.autograd.grad(loss, static[0])[0]

    if device == "cuda":
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step()
    for seed in (1, 2):
        with torch.no_grad():
            for place, value in zip(static, cases.latents(shape, 2, torch.bfloat16, seed=seed), strict=True):
                place.copy_(value)
        if device == "cuda":
            graph.replay()
        else:
            outputs = step()
        fresh = call(device, shape, grid, torch.bfloat16, seed=seed)
        assert torch.equal(outputs[0], fresh[0]) and torch.equal(outputs[1], fresh[3])


@pytest.mark.gpu
def test_bits_equal_the_interpreters_order_of_sums():
    """One position per patch has no sum across threads, so GPU and CPU must agree to the last bit there."""
    policy, ref, target = cases.latents((4, 2, 6, 8), 2, torch.float64)
    found = kernels("cuda").patch_error(policy.cuda(), target.cuda(), (2, 6, 8)).cpu()
    torch.testing.assert_close(found, reference.patch_error(policy, target, (2, 6, 8)), rtol=1e-14, atol=0)


@pytest.mark.gpu2
def test_on_the_second_gpu():
    first = call("cuda:0", SMALL, SMALL_GRID, torch.float32)
    second = call("cuda:1", SMALL, SMALL_GRID, torch.float32)
    assert all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(first, second, strict=True))


RACES = """
import sys, torch
sys.path.insert(0, "tests/support")
import cases
from halo_fast.loss import backends
device = sys.argv[1]
kernels = backends.select(torch.device(device), torch.float32, "triton")
for shape, grid in (((3, 5, 7, 9), (2, 3, 4)), ((40, 3, 30, 45), (2, 2, 2)))[: 2 if device == "cuda" else 1]:
    policy, ref, target = (x.to(device) for x in cases.latents(shape, 2, torch.bfloat16))
    table = kernels.patch_log_ratio(policy, ref, target, grid)
    kernels.patch_error_backward(table, policy, target)
print("done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_no_races_and_no_wild_accesses(device, tool):
    command = [sys.executable, "-c", RACES, device]
    if device == "cuda":
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            pytest.skip("needs compute-sanitizer from the CUDA toolkit")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *command]
    elif tool != "memcheck":
        pytest.skip("one run without the tool is enough")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.gpu
def test_compiled_in_every_mode():
    """In "reduce-overhead" and "max-autotune" too, whose graphs own all memory that is allocated while they warm up.

    On the CPU the three modes run in test_device_check_runs_small_on_the_cpu.
    """
    check = pytest.importorskip("benchmarks.device_check", reason="needs the repository's root on the path")
    assert all(found <= 1e-5 for _, found in check.check_compiled(cases.LATENTS["cogvideox"], "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_each_view_its_own_dtype(dtype):
    """A model under autocast predicts in half precision; its target stays in float32, and nothing is cast."""
    prediction, ref, target = (x.cuda() for x in cases.latents((4, 5, 12, 16), 2, torch.float32))
    layer = torch.nn.Conv3d(4, 4, 1).cuda()
    labels = [x.cuda() for x in cases.rewards((2, 3, 4), 2)]
    with torch.autocast("cuda", dtype):
        output = layer(prediction)
        with torch.no_grad():
            reference_output = layer(ref)
        loss = gran_dpo(output, target, reference_output, *labels).loss
    loss.backward()
    assert output.dtype == dtype and loss.dtype == torch.float32 and layer.weight.grad.isfinite().all()


def test_device_check_runs_small_on_the_cpu():
    """The script for a GPU must not rot between two times that there is one."""
    check = pytest.importorskip("benchmarks.device_check", reason="needs the repository's root on the path")
    if backends.unavailable("triton", "cpu"):
        pytest.skip("the interpreter is off on a machine with a GPU")
    lines = list(check.report((8, 4, 4, 6), "cpu", quick=False))
    assert not any(fault for fault, _ in lines), lines
    assert sum("of copy" in line for _, line in lines) == 4 and "host time" in lines[-1][1]
    assert sum("torch.compile, " in line for _, line in lines) == 3


COLLECT = """
import sys
blocked = "accelerate av diffusers ftfy jsonargparse openai peft pyarrow safetensors sklearn transformers".split()
sys.modules.update(dict.fromkeys(blocked))
import pytest
sys.exit(pytest.main(["--collect-only", "-q", *sys.argv[1:]]))
"""


def test_the_files_of_make_gpu_need_torch_and_triton_alone():
    (names,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("GPU_TESTS")]
    files = [f"tests/{name}" for name in names.rstrip(")").split(",")[1].split()]
    assert "tests/kernels/test_gpu.py" in files and all((ROOT / file).exists() for file in files)
    done = subprocess.run([sys.executable, "-c", COLLECT, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "error" not in done.stdout.lower(), done.stdout[-2000:]


def test_times_table(device, capsys):
    """Prints what the kernels reach of a plain copy's rate; no time is asserted."""
    tune = pytest.importorskip("benchmarks.tune", reason="needs the repository's root on the path")
    shapes = cases.LATENTS if device == "cuda" else {"small": (4, 5, 6, 8)}
    for name, shape in shapes.items():
        lines = tune.table(shape, torch.bfloat16, device, [None])
        with capsys.disabled():
            print(f"\n{name} {shape} on {device}:", *lines, sep="\n  ")
        assert len(lines) == 1 and "of copy" in lines[0]
