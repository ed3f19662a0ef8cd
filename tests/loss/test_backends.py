"""Which implementation runs: order of choice, reasons, report."""

import os
import subprocess
import sys

import pytest
import torch

from halo_fast import using_backend
from halo_fast.loss import backends

CPU = torch.device("cpu")


def chosen(name=None) -> str:
    return backends.select(CPU, torch.float32, name).__name__.rsplit(".", 1)[1]


def test_backends_are_chosen_by_argument_then_context_then_environment_then_device(monkeypatch):
    monkeypatch.delenv("HALO_FAST_BACKEND", raising=False)
    assert chosen() == "cpu_patch_dpo"
    monkeypatch.setenv("HALO_FAST_BACKEND", "reference")
    assert chosen() == "reference"
    with using_backend("cpp"):
        assert chosen() == "cpu_patch_dpo"
        with using_backend("reference"):
            assert chosen() == "reference"
        assert chosen() == "cpu_patch_dpo"
        assert chosen("reference") == "reference"
    assert chosen() == "reference"
    monkeypatch.setenv("HALO_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="one of reference, cpp, triton; got 'cuda'"):
        chosen()


def test_backends_left_after_an_exception():
    before = chosen()
    with pytest.raises(ZeroDivisionError), using_backend("reference"):
        raise ZeroDivisionError
    assert chosen() == before


def test_backends_asked_for_in_vain_raise_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="'triton' was asked for but .*TRITON_INTERPRET=1"):
        backends.select(CPU, torch.float32, "triton")
    with pytest.raises(RuntimeError, match="runs on cpu tensors only, not on cuda"):
        backends.select(torch.device("cuda"), torch.float32, "cpp")


def test_backends_report_names_the_instruction_set_and_why_triton_is_missing():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = "from halo_fast.loss import backends; print(backends.report())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    rows = {line[: line.index("  ")]: line for line in done.stdout.splitlines()}
    assert (
        any(name in rows["backend cpp"] for name in ("AVX-512", "AVX2", "portable"))
        and "threads" in rows["backend cpp"]
    )
    if not torch.cuda.is_available():
        assert "unavailable" in rows["backend triton"] and "TRITON_INTERPRET=1" in rows["backend triton"]
    assert {"device cpu", "device cuda", "torch", "triton", "xformers"} <= set(rows)


def test_backends_open_nothing_on_import():
    code = """
import sys, halo_fast
assert not any(name.split(".")[0] == "triton" for name in sys.modules if sys.modules[name]), "triton"
assert "halo_fast.kernels.cpu_patch_dpo" not in sys.modules
assert "halo_fast/kernels/_cpu" not in open("/proc/self/maps").read() if sys.platform == "linux" else True
"""
    subprocess.run([sys.executable, "-c", code], check=True)
