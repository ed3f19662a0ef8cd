"""The harness's small bodies: gate, clock, table, both runners."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks import harness, interleaved
from benchmarks.cases import cases
from benchmarks.cases import loss as losses
from benchmarks.harness import Bench, Case, Clock, GateError

ROOT = Path(__file__).parents[2]
SHAPE = (4, 5, 6, 8)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Compiled providers are the eager ones here: a compiler takes longer than all of these tests."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("kind", losses.LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_loss_passes_its_gate(kind, dtype):
    with losses.opened(kind, SHAPE, dtype, num_pairs=2) as bench:
        errors = bench.gate()
        assert set(errors) == {name for name in losses.LOSSES[kind] if not harness.missing(name)}
        assert set(bench.rounds) - set(errors) <= set(losses.FLOORS)
        for run in bench.rounds.values():
            assert harness.timed(run)["seconds"] >= 0


@pytest.mark.parametrize(
    "wrong",
    [lambda *data: 1.01 * losses.ours(*data), lambda *data: losses.ours(*data) + 0.01, lambda *data: data[0].sum() * 0],
)
def test_a_wrong_provider_gets_no_time(wrong, monkeypatch):
    monkeypatch.setitem(losses.LOSSES["halo"], "ours", wrong)
    with pytest.raises(GateError, match="ours.*no time is reported"), losses.opened("halo", SHAPE, torch.float32):
        pass


def test_an_error_that_is_not_a_number_is_refused():
    with pytest.raises(GateError, match="got nan"):
        harness.check_errors({"ours": float("nan")}, 1.0)


def test_a_round_may_time_itself():
    clock = Clock()
    clock.advance(lambda: {"seconds": 2.5})
    assert clock.read() == 2.5
    clock.advance(lambda: None)
    assert 2.5 <= clock.read() < 3.5


def test_absent_peers_say_what_to_install(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert "trl is not installed: pip install 'halo_fast[bench]'" in harness.missing("TRL")
    assert harness.missing("ours") is None


def constant_case(seconds):
    """Providers that report fixed seconds."""

    @contextmanager
    def opened():
        rounds = {name: lambda value=value: {"seconds": value} for name, value in seconds.items()}
        yield Bench(rounds, lambda: {"ours": 1e-7}, lambda name: {"ideal bytes": 8.0}, bases=("ours",))

    return Case("loss", "constant", tuple(seconds), opened)


def test_ratios_are_quotients_within_a_round():
    case = constant_case({"eager": 6.0, "ours": 2.0})
    with case.opened() as bench:
        rows = interleaved.rows_of(case, bench, rounds=4, setting="threads=1", state="machine=none")
    assert all(tuple(row) == harness.COLUMNS for row in rows)
    found = {(row["provider"], row["metric"]): float(row["p50"]) for row in rows}
    assert found == {
        ("eager", "ideal bytes"): 8.0, ("ours", "error"): 1e-7, ("ours", "ideal bytes"): 8.0,
        ("eager", "seconds"): 6.0, ("ours", "seconds"): 2.0, ("eager", "seconds / ours"): 3.0,
    }  # fmt: skip


def test_rows_replace_those_of_the_same_key(tmp_path):
    case, path = constant_case({"ours": 1.0}), tmp_path / "table.csv"
    old = harness.row(case, "ours", "seconds", [1.0, 2.0, 3.0], "threads=1", "commit=a")
    other = harness.row(case, "ours", "seconds", [9.0], "threads=2", "commit=a")
    harness.write_rows([old, other], path)
    assert (old["p20"], old["p50"], old["p80"]) == ("1.4", "2", "2.6")
    harness.write_rows([old | {"p50": "5", "conditions": "commit=b"}], path)
    rows = harness.read_rows(path)
    assert [(row["p50"], row["conditions"]) for row in rows] == [("5", "commit=b"), ("9", "commit=a")]


def test_facts_survive_their_cell():
    facts = {"threads": "1", "machine": "AMD EPYC, 2 cores", "flags": "a=b"}
    assert harness.split(harness.joined(facts)) == facts


def test_the_committed_table_has_one_schema():
    rows = harness.read_rows()
    assert all(tuple(row) == harness.COLUMNS and None not in row for row in rows)
    assert len({tuple(row[name] for name in harness.KEY) for row in rows}) == len(rows)
    known = {(case.mode, case.name): set(case.providers) for mode in harness.MODES for case in cases(mode)}
    assert all(row["provider"] in known[row["mode"], row["case"]] for row in rows)
    assert all(float(row["p50"]) >= 0 for row in rows)


def test_pytest_runs_a_case(tmp_path):
    """pytest-benchmark's own run: its groups, its JSON, rows of it. Peers run or are skipped by name."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-rs", "-k", "4096",
               f"--benchmark-json={report}", "-p", "no:cacheprovider"]  # fmt: skip
    # a worker of pytest-xdist would measure nothing
    environment = {key: value for key, value in os.environ.items() if "XDIST" not in key} | {"TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    (case,) = (case for case in cases("loss") if "4096" in case.name)
    assert f"benchmark '{case.group}'" in done.stdout
    rows = harness.rows_of_json(json.loads(report.read_text()))
    absent = {name for name in case.providers if harness.missing(name)}
    assert {row["provider"] for row in rows if row["metric"] == "seconds"} == set(case.providers) - absent
    assert all(f"{harness.PEERS[name]} is not installed" in done.stdout for name in absent)
    assert all(tuple(row) == harness.COLUMNS for row in rows)
    assert "machine=" in rows[0]["conditions"]


@pytest.mark.gpu
def test_graph_replay_times_one_call():
    inputs = [torch.randn(1 << 24, device="cuda") for _ in range(2)]
    run = harness.graph_round([lambda x=x: x.clone() for x in inputs])
    seconds = run()["seconds"]
    assert 2 * inputs[0].nbytes / 10e12 < seconds < 1e-2
    assert harness.launches(lambda: inputs[0].clone()) == 1
