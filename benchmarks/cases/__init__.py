"""The cases of the benchmarks, one module a mode."""

import importlib

from benchmarks.harness import MODES, Case


def cases(mode: str | None = None) -> list[Case]:
    """All cases, or those of one mode."""
    modes = MODES if mode is None else (mode,)
    return [case for name in modes for case in importlib.import_module(f"benchmarks.cases.{name}").CASES]
