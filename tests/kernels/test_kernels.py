"""What the kernels promise beside their values: memory safety, fixed bits, wide offsets, clear words if missing."""

import ctypes
import functools
import gc
import importlib.util
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from halo_fast.kernels import cpu_patch_dpo

from halo_fast import using_backend
from halo_fast.loss import backends, ops, reference

ROOT = Path(__file__).parents[2]
SHAPE, GRID = (3, 5, 7, 9), (2, 3, 4)
DEVICES = {"cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


@pytest.fixture(params=DEVICES)
def backend(request):
    reason = backends.unavailable(request.param, DEVICES[request.param])
    if reason:
        pytest.skip(reason)
    return request.param


def module(name: str):
    return backends.select(torch.device(DEVICES[name]), torch.float32, name)


def inputs(backend: str, shape=SHAPE, samples=2, dtype=torch.float32):
    return [x.to(DEVICES[backend]) for x in cases.latents(shape, samples, dtype)]


def everything(kernels, policy, ref, target, grid=GRID):
    """Outputs of the four kernels."""
    log_ratio = kernels.patch_log_ratio(policy, ref, target, grid)
    error = kernels.patch_error(policy, target, grid)
    labels = [x.to(policy.device) for x in cases.rewards(grid, len(policy), log_ratio.dtype)]
    numbers = (0.0, 1.0, 1.0, 500.0, 50.0, 0.0, 0.0, 1.0, 0.0, 0.1, 0.1, math.inf, math.inf)
    shape = tuple(policy.shape[1:])
    tables = kernels.gran_dpo_table(log_ratio, *labels, None, error, None, shape, "sigmoid", numbers)
    return [log_ratio, error, *tables, kernels.patch_error_backward(tables[1], policy, target)]


@pytest.mark.gradcheck
def test_gradcheck_through_the_kernels(backend):
    policy, ref, target = inputs(backend, (2, 3, 3, 4), 2, torch.float64)
    policy.requires_grad_()
    with using_backend(backend):
        assert torch.autograd.gradcheck(
            lambda o: ops.patch_log_ratio(o, ref, target, (2, 2, 3)), policy, fast_mode=True
        )
        assert torch.autograd.gradcheck(lambda o: ops.patch_error(o, target, (2, 2, 3)), policy, fast_mode=True)


def test_opcheck_with_the_kernels(backend):
    policy, ref, target = inputs(backend)
    policy.requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    with using_backend(backend):
        torch.library.opcheck(ops.patch_log_ratio, (policy, ref, target, GRID), test_utils=checks)
        torch.library.opcheck(ops.patch_error, (policy, target, GRID), test_utils=checks)
        grad = cases.rewards(GRID, 2)[0].to(policy.device)
        torch.library.opcheck(ops.patch_error_backward, (grad, policy.detach(), target), test_utils=checks)


def test_kernels_of_an_empty_batch(backend):
    policy, ref, target = inputs(backend, samples=0)
    shapes = [tuple(out.shape) for out in everything(module(backend), policy, ref, target)]
    assert shapes == [(0, *GRID)] * 2 + [(), (0, *GRID), (0,), (0, *GRID), (0,), (0, *SHAPE)]


@pytest.fixture
def guarded(monkeypatch):
    """Every float allocation is filled with NaN and has guard elements on both sides; returns the guards' check."""
    rooms, guard = [], 64

    def allocate(shape, stride, dtype, device):
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else 0
        room = torch.full(
            (extent + 2 * guard,), float("nan") if dtype.is_floating_point else -1, dtype=dtype, device=device
        )
        room[:guard] = room[guard + extent :] = 7
        rooms.append(room)
        return room.as_strided(shape, stride, guard)

    def row_major(shape):
        strides = [1]
        for n in reversed(shape[1:]):
            strides.insert(0, strides[0] * n)
        return strides[: len(shape)]

    def new_empty(self, shape, dtype=None, device=None):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return allocate(shape, row_major(shape), dtype or self.dtype, self.device)

    like = torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(
        torch, "empty_like", lambda x: allocate(x.shape, like(x, device="meta").stride(), x.dtype, x.device)
    )

    def check():
        assert rooms
        for room in rooms:
            assert (room[:guard] == 7).all() and (room[-guard:] == 7).all()

    return check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_write_all_of_their_outputs_and_nothing_else(backend, guarded, dtype):
    wide = (3, 3, 30, 45), (1, 1, 2)  # its patches are shared by several programs
    for shape, grid in (*cases.SMALL[1:4], *([wide] if dtype == torch.float32 else [])):
        policy, ref, target = inputs(backend, shape, dtype=dtype)
        layouts = (
            [torch.channels_last_3d] if (shape, grid) == wide else [torch.contiguous_format, torch.channels_last_3d]
        )
        for layout in layouts:
            for out in everything(module(backend), policy.contiguous(memory_format=layout), ref, target, grid):
                assert out.isfinite().all()
    guarded()


def test_kernels_do_not_read_what_lies_between_rows(backend):
    """The gaps of a strided input hold NaN, and a NaN inside one patch stays in it."""
    policy, ref, target = inputs(backend)
    room = policy.new_full((*policy.shape[:-1], 16), float("nan"))
    room[..., : policy.shape[-1]] = policy
    found = everything(module(backend), room[..., : policy.shape[-1]], ref, target)
    for one, other in zip(found, everything(module(backend), policy, ref, target), strict=True):
        torch.testing.assert_close(one, other)
    policy[0, 1, 0, 0, 0] = float("nan")
    table = module(backend).patch_log_ratio(policy, ref, target, GRID)
    assert table.isnan().sum() == 1 and table[0, 0, 0, 0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_repeat_the_same_bits(backend, dtype):
    policy, ref, target = inputs(backend, (3, 2, 30, 45), dtype=dtype)
    first, second = (everything(module(backend), policy, ref, target) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def live_tensors() -> set[int]:
    """By address: what earlier tests left may vanish at any time, so a count would say nothing."""
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}


def test_kernels_keep_no_tensor_between_calls(backend):
    """A counter or a workspace that outlives its call is wrong in graph pools, on other streams and after a fault."""
    kernels = module(backend)
    before = live_tensors()
    for samples in (2, 4):
        everything(kernels, *inputs(backend, (6, 7, 20, 30), samples), (2, 3, 2))
    everything(kernels, *inputs(backend, (2, 3, 50, 45)), (3, 50, 45))
    assert not live_tensors() - before
    assert "atomic" not in (ROOT / "kernels" / "triton_patch_dpo.py").read_text().replace("no atomics", "")


def test_kernels_of_every_backend_take_the_same_numbers_and_links():
    """A link or a number that one backend has in another place would be another objective, without a word."""
    source = (ROOT / "kernels" / "cpu_patch_dpo.cpp").read_text()
    fields = list(reference.TableNumbers._fields)
    (struct,) = re.findall(r"struct TableNumbers \{\s*double ([^;]*);", source)
    assert re.split(r",\s*", struct) == fields
    (enum,) = re.findall(r"enum Link \{ (.*), links \};", source)
    assert tuple(enum.split(", ")) == reference.LINKS == cpu_patch_dpo.LINKS
    triton_patch_dpo = pytest.importorskip("halo_fast.kernels.triton_patch_dpo")
    assert triton_patch_dpo.LINKS == reference.LINKS
    names = triton_patch_dpo._table_kernel.arg_names
    first = names.index(fields[0])
    assert names[first : first + len(fields)] == fields


def test_kernels_refuse_an_unknown_link(backend):
    table = inputs(backend)[0][:, 0, :2, :2, :2].contiguous()
    with pytest.raises(ValueError):
        module(backend).gran_dpo_table(table, table, None, None, None, None, SHAPE, "logistic", (1.0,) * 13)
    with pytest.raises(ValueError):
        reference.gran_dpo_table(table, table, None, None, None, None, SHAPE, "logistic", (1.0,) * 13)


INT64 = """
import sys, tempfile, torch
from halo_fast.loss import backends
kernels = backends.select(torch.device("cpu"), torch.float16, sys.argv[1])
stride = 2**31 - 8
with tempfile.NamedTemporaryFile(dir=sys.argv[2]) as file:
    file.truncate(2 * (2 * stride + 64))
    room = torch.from_file(file.name, shared=True, size=2 * stride + 64, dtype=torch.float16)
    far = room.as_strided((1, 3, 1, 4, 16), (stride, stride, stride, 16, 1))
    torch.manual_seed(0)
    near, target = torch.randn(2, 1, 3, 1, 4, 16).half()
    far.copy_(near)
    zero = torch.zeros_like(near)
    grid = (1, 2, 3)
    expected = kernels.patch_log_ratio(near, zero, target, grid)
    assert torch.equal(kernels.patch_log_ratio(far, zero, target, grid), expected)
    assert torch.equal(kernels.patch_error(near, far, (1, 2, 3)), torch.zeros(1, 1, 2, 3))
    grad = torch.randn(1, 1, 2, 3)
    expected = kernels.patch_error_backward(grad, target, near)
    assert torch.equal(kernels.patch_error_backward(grad, target, far), expected)
"""


def test_kernels_reach_beyond_two_to_the_31_elements(backend, tmp_path):
    """On a sparse file: the last channel lies 8 GiB after the first."""
    if DEVICES[backend] != "cpu":
        pytest.skip("a sparse file is host memory")
    subprocess.run([sys.executable, "-c", INT64, backend, str(tmp_path)], check=True, cwd=ROOT)


@pytest.fixture
def instruction_sets():
    best = cpu_patch_dpo.instruction_set()
    names = cpu_patch_dpo.INSTRUCTION_SETS
    yield names[: names.index(best) + 1]
    cpu_patch_dpo.instruction_set(best)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_kernels_in_cpp_give_the_same_bits_for_any_instruction_set_and_number_of_threads(instruction_sets, dtype):
    cases_ = [(SHAPE, GRID), ((16, 5, 60, 90), (2, 3, 4)), ((4, 3, 33, 64), (3, 33, 64))]
    threads = torch.get_num_threads()
    try:
        for shape, grid in cases_:
            policy, ref, target = cases.latents(shape, 2, dtype)
            results = []
            for name in instruction_sets:
                assert cpu_patch_dpo.instruction_set(name) == name
                for count in (1, 2):
                    torch.set_num_threads(count)
                    results.append(everything(cpu_patch_dpo, policy, ref, target, grid))
                    strided = policy.transpose(1, 2).contiguous().transpose(1, 2)
                    results.append(everything(cpu_patch_dpo, strided, ref, target, grid))
            for result in results[1:]:
                assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_in_cpp_write_large_gradients_like_small_ones(guarded, dtype):
    """Large ones go past the caches; planes of odd size begin anywhere in a cache line."""
    policy, _, target = cases.latents((16, 7, 61, 91), 2, dtype)
    assert policy.numel() * policy.element_size() > 2**21
    grad = cases.rewards(GRID, 2)[0]
    large = cpu_patch_dpo.patch_error_backward(grad, policy, target)
    for c in range(16):
        one = slice(c, c + 1)
        small = cpu_patch_dpo.patch_error_backward(grad / 16, policy[:, one].contiguous(), target[:, one].contiguous())
        assert torch.equal(large[:, one], small)
    factor = torch.tensor(0.5)
    scaled = cpu_patch_dpo.gran_dpo_backward(factor, 2 * grad, policy, target)
    assert torch.equal(scaled, large)
    guarded()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are asked for on Linux alone")
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_in_cpp_fault_in_what_they_write_and_no_more(monkeypatch, threads):
    """A gradient in the middle of fresh memory: its pages are there afterwards, with its values, and no others."""
    policy, _, target = cases.latents((16, 7, 61, 91), 2, torch.float32)
    grad = cases.rewards(GRID, 2)[0]
    expected = cpu_patch_dpo.patch_error_backward(grad, policy, target)
    large, page = 2**21, mmap.PAGESIZE
    room = mmap.mmap(-1, expected.nbytes // large * large + 4 * large)
    start = large + 5 * page + 64
    gradient = torch.frombuffer(room, dtype=torch.float32, count=expected.numel(), offset=start).view(expected.shape)
    monkeypatch.setattr(torch, "empty_like", lambda x: gradient)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(cpu_patch_dpo.patch_error_backward(grad, policy, target), expected)
    finally:
        torch.set_num_threads(before)
    there = (ctypes.c_ubyte * (len(room) // page))()
    address = ctypes.c_void_p(gradient.data_ptr() - start)
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(room)), there) == 0
    first, last = start // page, (start + expected.nbytes - 1) // page
    # large pages may begin before and end after, by less than one
    margin = large // page
    resident = [index for index, bits in enumerate(there) if bits & 1]
    assert set(range(first, last + 1)) <= set(resident)
    assert first - margin < min(resident) and max(resident) < last + margin
    whole = torch.frombuffer(room, dtype=torch.uint8)
    assert not whole[:start].any() and not whole[start + expected.nbytes :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_in_cpp_convert_every_half_like_torch(instruction_sets, dtype):
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 1, 1, 1, -1)
    zero, patches = torch.zeros_like(halves), (1, 1, 2**16)
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(1, *patches, generator=generator) * 10 ** torch.empty(1, *patches).uniform_(
        -6, 3, generator=generator
    )
    for name in instruction_sets:
        cpu_patch_dpo.instruction_set(name)
        for grad in (torch.full((1, *patches), 0.5), scale):
            found = cpu_patch_dpo.patch_error_backward(grad, halves, zero)
            truth = (halves.float() * (2 * grad[:, None])).to(dtype)
            # bit patterns: a NaN equals no NaN, and 0 equals -0; the payload of a NaN is free
            same = (found.view(torch.int16) == truth.view(torch.int16)) | (found.isnan() & truth.isnan())
            assert same.all()


def test_kernels_in_cpp_say_why_they_are_missing(monkeypatch):
    monkeypatch.setattr(cpu_patch_dpo, "_library", functools.cache(cpu_patch_dpo._library.__wrapped__))
    monkeypatch.setattr(backends, "_default", functools.cache(backends._default.__wrapped__))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "HALO_FAST_CPU=OFF" in cpu_patch_dpo.unavailable(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="not built"):
        backends.select(torch.device("cpu"), torch.float32, "cpp")
    assert backends.select(torch.device("cpu"), torch.float32).__name__ == "halo_fast.loss.reference"


needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")


@needs_cmake
def test_kernels_build_refuses_in_words_without_a_compiler_and_can_be_switched_off(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("CXX", "CC")}
    empty = tmp_path / "bin"
    empty.mkdir()

    def configure(*options, path):
        command = [shutil.which("cmake"), "-S", ROOT, "-B", tmp_path / "build", "-G", "Unix Makefiles", *options]
        make = f"-DCMAKE_MAKE_PROGRAM={shutil.which('make') or shutil.which('ninja')}"
        return subprocess.run([*command, make], env=environment | {"PATH": path}, capture_output=True, text=True)

    refused = configure(path=str(empty))
    assert refused.returncode != 0
    assert "no C++ compiler was found" in refused.stderr and "HALO_FAST_CPU=OFF" in refused.stderr
    assert configure("-DHALO_FAST_CPU=OFF", path=str(empty)).returncode == 0


SANITIZED = """
import sys
sys.path[:0] = sys.argv[2:]
import torch, cases, functools
import test_kernels
from halo_fast.kernels import cpu_patch_dpo as kernels
kernels._library = functools.cache(lambda: kernels._bind(sys.argv[1]))
torch.set_num_threads(2)
for name in kernels.INSTRUCTION_SETS:
    kernels.instruction_set(name)
    for dtype in cases.DTYPES:
        for shape, grid in (*cases.SMALL, ((3, 2, 40, 90), (2, 3, 4))):
            policy, ref, target = cases.latents(shape, 2, dtype)
            test_kernels.everything(kernels, policy, ref, target, grid)
            last = policy.contiguous(memory_format=torch.channels_last_3d)
            test_kernels.everything(kernels, last, ref[:1].expand_as(ref), target, grid)
print("clean")
"""


@pytest.mark.slow
@needs_cmake
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ and its sanitizers")
def test_kernels_in_cpp_are_clean_under_the_sanitizers(tmp_path):
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DHALO_FAST_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path)], check=True, capture_output=True)
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SANITIZED,
            str(tmp_path / "_cpu.so"),
            str(ROOT / "tests/support"),
            str(ROOT / "tests/kernels"),
        ],
        # the interpreter itself never frees all it has, so leaks are not looked for
        env=os.environ
        | {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip() == "clean", done.stderr[-2000:]
