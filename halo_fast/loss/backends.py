"""Which implementation runs, and why another one cannot.

Order of choice: explicit argument > ``using_backend`` > HALO_FAST_BACKEND > the device's default (triton on cuda and
xpu, cpp on cpu, reference elsewhere). A backend that was asked for and cannot run raises with the reason; the automatic
choice falls back to the reference and logs the reason once.

A backend is a module with patch_log_ratio, patch_error, patch_error_backward, gran_dpo_backward and gran_dpo_table,
with the signatures of ``halo_fast.loss.reference``. It may define a ``gran_dpo`` that is more than
``reference.composed_gran_dpo``, ``unavailable(device) -> str | None``, why it cannot run there, and ``describe() ->
str``, its row in ``halo doctor``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

from halo_fast.loss import reference

__all__ = ["available", "report", "select", "unavailable", "using_backend"]


NAMES = ("reference", "cpp", "triton")
_MODULES = {"cpp": "halo_fast.kernels.cpu_patch_dpo", "triton": "halo_fast.kernels.triton_patch_dpo"}
_DEFAULTS = {"cuda": "triton", "xpu": "triton", "cpu": "cpp"}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger("halo_fast")

# A plain global, not a context variable: autograd runs the backward of CUDA tensors in threads of its own.
_forced: str | None = None


@functools.cache
def _load(name: str) -> ModuleType | str:
    """The module of a backend, or the reason why it cannot be imported."""
    if name == "reference":
        return reference
    try:
        return importlib.import_module(_MODULES[name])
    except (ImportError, OSError) as error:
        return f"cannot import {_MODULES[name]}: {error}"


def _module(name: str) -> ModuleType:
    """The module of a backend that is not unavailable."""
    module = _load(name)
    assert isinstance(module, ModuleType)
    return module


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}; got {name!r}")
    return name


def unavailable(name: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why backend ``name`` cannot run on ``device`` with ``dtype``, or None if it can."""
    device = device if isinstance(device, torch.device) else torch.device(device)
    _check_name(name, "backend")
    if dtype not in _DTYPES:
        return f"dtype {dtype} is not one of float64, float32, bfloat16, float16"
    if name == "reference":
        return None
    if name == "cpp" and device.type != "cpu":
        return f"runs on cpu tensors only, not on {device.type}"
    if name == "triton" and device.type not in ("cuda", "xpu"):
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if not interpreted:
            emulated = "; with TRITON_INTERPRET=1 also on cpu, slowly, for tests" if device.type == "cpu" else ""
            return f"runs on cuda and xpu tensors{emulated}"
    module = _load(name)
    if isinstance(module, str):
        return module
    reason = getattr(module, "unavailable", None)
    return reason(device) if reason else None


def available(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """Every backend's name with None if it can run on ``device``, else the reason why not."""
    return {name: unavailable(name, device, dtype) for name in NAMES}


@functools.cache
def _default(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The device's default, or the reference with a warning. Cached: the search takes longer than a loss."""
    name = _DEFAULTS.get(device.type, "reference")
    if reason := unavailable(name, device, dtype):
        _log.warning(f"backend {name!r} is not used on {device.type} ({reason}); the slower reference runs instead")
        return reference
    return _module(name)


def select(device: torch.device, dtype: torch.dtype, name: str | None = None) -> ModuleType:
    """The module that runs tensors of ``device`` and ``dtype``; RuntimeError if the one asked for cannot."""
    asked = name or _forced or os.environ.get("HALO_FAST_BACKEND") or None
    if not asked:
        return _default(device, dtype)
    if reason := unavailable(_check_name(asked, "backend"), device, dtype):
        raise RuntimeError(f"backend {asked!r} was asked for but {reason}; choose another of {', '.join(NAMES)}")
    return _module(asked)


@contextmanager
def using_backend(name: str) -> Iterator[None]:
    """Run every halo_fast call inside the ``with`` block on backend ``name``: "reference", "cpp" or "triton".

    A backward that runs after the block has ended uses the default again; the results differ by rounding only.
    """
    global _forced
    before, _forced = _forced, _check_name(name, "backend")
    try:
        yield
    finally:
        _forced = before


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The table that ``halo doctor`` prints: backends with reasons, devices, threads, and what speeds them up."""
    rows = []
    for name in NAMES:
        devices = [kind for kind in _DEFAULTS if _present(kind)]
        reasons = {kind: unavailable(name, kind) for kind in devices}
        runs = [kind for kind, reason in reasons.items() if reason is None]
        describe = getattr(_load(name), "describe", None) if runs else None
        detail = (
            describe() if describe else "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items() if reason)
        )
        rows.append((f"backend {name}", f"runs on {', '.join(runs)}" if runs else "unavailable", detail))
    for kind, default in _DEFAULTS.items():
        chosen = _forced or os.environ.get("HALO_FAST_BACKEND") or default
        uses = chosen if unavailable(chosen, kind) is None else "reference"
        detail = f"{torch.get_num_threads()} threads" if kind == "cpu" else ""
        if kind == "cuda" and _present(kind):
            detail = f"{torch.cuda.get_device_name()}, {'ROCm' if torch.version.hip else 'CUDA'} {_cuda()}"
        rows.append((f"device {kind}", f"uses {uses}" if _present(kind) else "not present", detail))
    rows.append(("torch", _version("torch"), f"built for {_cuda() or 'cpu'}"))
    rows.extend((package, _version(package), "") for package in ("triton", "xformers"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{what:<{widths[0]}}  {state:<{widths[1]}}  {detail}".rstrip() for what, state, detail in rows)


def _present(kind: str) -> bool:
    return kind == "cpu" or bool(getattr(torch, kind).is_available())


def _cuda() -> str | None:
    return torch.version.hip or torch.version.cuda
