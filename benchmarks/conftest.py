"""pytest-benchmark runs the cases: `pytest benchmarks`, or `make bench`."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.cases import cases
from benchmarks.harness import Bench, Case, Clock

SETTING = {"threads": 1, "memory": "as it comes"}
CLOCK = Clock()


def pytest_xdist_auto_num_workers() -> int:
    """Nothing is timed beside another process."""
    return 0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "mode(name): runs every case of one mode with every provider")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case and provider, cases in one piece, since providers share a bench."""
    marker = metafunc.definition.get_closest_marker("mode")
    if marker is None:
        return
    parameters = []
    for case in cases(marker.args[0]):
        timing = pytest.mark.benchmark(group=case.group, timer=CLOCK.read)
        marks = [timing, pytest.mark.slow] if case.slow else [timing]
        parameters += [
            pytest.param(case, provider, id=f"{case.name}-{provider}", marks=marks) for provider in case.providers
        ]
    metafunc.parametrize(("case", "provider"), parameters)


class Opened:
    """The bench that is open: providers of one case share it, and the next case closes it."""

    case: Case | None = None
    bench: Bench
    stack = ExitStack()

    @classmethod
    def get(cls, case: Case) -> Bench:
        if cls.case is not case:
            cls.close()
            torch.set_num_threads(SETTING["threads"])
            cls.bench = cls.stack.enter_context(case.opened())
            cls.bench.gate()
            cls.case = case
        return cls.bench

    @classmethod
    def close(cls) -> None:
        cls.case = None
        cls.stack.close()


def pytest_sessionfinish() -> None:
    Opened.close()


@pytest.fixture
def run_case(case: Case, provider: str, benchmark: Any) -> Any:
    """Times one provider, or skips it, and keeps what is known of it in extra_info."""

    def run(rounds: int, warmup_rounds: int = 1) -> None:
        if reason := harness.missing(provider):
            pytest.skip(reason)
        bench = Opened.get(case)
        if provider not in bench.rounds:
            pytest.skip(f"{provider} has no case on {harness.device()}")
        errors = bench.gate()
        counts = ({"error": errors[provider]} if provider in errors else {}) | bench.count(provider)
        names = {"mode": case.mode, "case": case.name, "provider": provider}
        benchmark.extra_info.update(names, setting=harness.joined(SETTING), counts=counts)
        benchmark.pedantic(CLOCK.advance, (bench.rounds[provider],), rounds=rounds, warmup_rounds=warmup_rounds)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what the figures depend on."""
    machine_info["conditions"] = harness.conditions()


def pytest_benchmark_compare_machine_info(machine_info: dict[str, Any], compared_benchmark: dict[str, Any]) -> None:
    """Name what differs, but for what differs between any two revisions."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A table of what was counted, which pytest-benchmark's own leaves out."""
    session = getattr(config, "_benchmarksession", None)
    lines = [
        f"{info['mode']:<9}{info['case']:<48}{info['provider']:<36}"
        + ", ".join(f"{metric} {value:,.4g}" for metric, value in info["counts"].items())
        for one in (session.benchmarks if session else ())
        if (info := one.extra_info) and info.get("counts")
    ]
    if lines:
        terminalreporter.section("counted")
        terminalreporter.write("\n".join(lines) + "\n")
