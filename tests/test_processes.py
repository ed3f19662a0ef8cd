"""Several processes as one run: shares, what the first does alone, who speaks, and that nobody waits for the dead."""

import json
import signal
import sys
import time
from datetime import timedelta

import pytest
import torch
from launches import ACCELERATE, TORCHRUN, ended, free_port, kill_worker, launch, start

from halo_fast import processes

TOGETHER = """
import json, sys, time
from pathlib import Path
import torch
from halo_fast import processes

folder = Path(sys.argv[1])
processes.join()
rank = processes._launch.rank
told = [processes.by_first(lambda: {"rank": rank, "count": processes.count()}) for _ in range(2)]
alone = processes.by_first(lambda: list(processes.share(range(5), "alone")))
taken, others = [], None
for number in processes.share(range(20), "numbers"):
    taken.append(number)
    time.sleep(0.05 if rank else 0.01)
    (folder / f"{number}.txt").write_text(str(rank))
present = len(list(folder.glob("*.txt")))
none = list(processes.share([], "nothing"))
if rank:
    time.sleep(1)
    (folder / "late").write_text("")
late = str(processes.seen(folder / "late"))
halves = torch.full((3, 2), 0.5 + rank, dtype=torch.float16).T
sums = [halves, torch.tensor(rank), torch.zeros(0, 4), torch.arange(2.0) if rank else torch.ones(2)]
processes.add_up(sums)
held = torch.zeros(2, 3).T if rank else torch.arange(6.0).view(2, 3).T
def work():
    return {"held": held, "new": torch.tensor([[True], [False]]), "scalar": torch.tensor(2.5)}, [processes.count(), 7]
given, rest = processes.tensors_by_first(work, into={"held": held, "other": torch.ones(1)})
tensors = [one.tolist() for one in (*sums, held, *given.values())]
patience = processes._launch.group._get_backend(torch.device("cpu")).options._timeout.days
record = {"told": told, "alone": alone, "taken": taken, "present": present, "none": none, "late": late}
record |= {"tensors": tensors, "rest": rest}
(folder / f"{rank}.json").write_text(json.dumps(record | {"patience": patience, "speaks": processes.speaks()}))
processes.leave()
"""

# The first process works for an hour on a number, and the second takes all others.
AT_WORK = """
import sys, time
from pathlib import Path
from halo_fast import processes
from halo_fast.errors import UserError
from halo_fast.pipeline import cli

def work(arguments):
    folder, mistaken = arguments
    for number in processes.share(range(4), "numbers"):
        if mistaken == "both" or (mistaken == "second" and not processes.is_first()):
            raise UserError("number: no good")
        if processes.is_first():
            (Path(folder) / "begun").write_text("")
            time.sleep(3600)
        while not (Path(folder) / "begun").exists():
            time.sleep(0.01)

cli._dispatch = work
sys.exit(cli.main(sys.argv[1:]))
"""


def test_one_process_shares_with_nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "3")  # says nothing without a number of processes
    processes.join()
    assert processes.count() == 1 and processes.is_first() and processes.speaks()
    assert list(processes.share("abc", "letters")) == ["a", "b", "c"]
    assert processes.by_first(lambda: {1, 2}) == {1, 2}
    assert processes.seen(tmp_path / "missing") == tmp_path / "missing"
    processes.wait()
    processes.leave()
    value = torch.ones(2)
    processes.add_up([value])
    assert value.tolist() == [1, 1] and processes.rank() == 0
    given, rest = processes.tensors_by_first(lambda: ({"value": value}, [3]))
    assert given["value"].data_ptr() == value.data_ptr() and rest == [3]


def test_two_processes_take_each_item_once_and_hear_the_first(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TOGETHER)
    done = ended(launch(TORCHRUN, script, tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for record in (first, second):
        assert record["told"] == 2 * [{"rank": 0, "count": 1}]  # alone, the first is one process
        assert record["alone"] == [0, 1, 2, 3, 4] and record["none"] == []
        assert record["taken"] == sorted(record["taken"])
        assert record["tensors"][:4] == [2 * [3 * [2.0]], 1, [], [1.0, 2.0]]
        assert record["tensors"][4:] == 2 * [[[0, 3], [1, 4], [2, 5]]] + [[[True], [False]], 2.5]
        assert record["rest"] == [1, 7]
        assert record["present"] == 20  # nobody goes on before all are done
        assert record["late"] == str(tmp_path / "late")
        assert record["patience"] == timedelta(days=365).days
    assert sorted(first["taken"] + second["taken"]) == list(range(20))
    assert len(first["taken"]) > len(second["taken"]) > 0  # the faster one takes more
    assert first["speaks"] != second["speaks"]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["both", "second"])
def test_a_mistake_is_reported_once_and_ends_the_launch(tmp_path, who):
    (tmp_path / "script.py").write_text(AT_WORK)
    done = ended(launch(TORCHRUN, tmp_path / "script.py", tmp_path, who), timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("halo: error: number: no good") == 1
    assert done.stderr.count("Traceback") == 1  # the launcher's own, which says who failed
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_launch(tmp_path, rank):
    (tmp_path / "script.py").write_text(AT_WORK)
    process = launch(TORCHRUN, tmp_path / "script.py", tmp_path, "nobody")
    kill_worker(process, rank, (tmp_path / "begun").exists)
    done = ended(process, timeout=300)
    assert done.returncode != 0 and f"exitcode  : -{int(signal.SIGKILL)}" in done.stderr
    assert done.stderr.count("halo: another process has ended") <= 1
    assert done.stderr.count("Traceback") == 1


@pytest.mark.slow
def test_who_waits_for_a_killed_process_ends_without_a_launcher_too(tmp_path):
    (tmp_path / "script.py").write_text(AT_WORK)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    working, waiting = (
        start(
            [sys.executable, tmp_path / "script.py", tmp_path, "nobody"], address | {"RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in "01"
    )
    while not (tmp_path / "begun").exists():
        assert working.poll() is None and waiting.poll() is None
        time.sleep(0.1)
    time.sleep(2)  # until the other one waits
    working.kill()
    done = ended(waiting, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert working.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_accelerate_that_starts_one_process_is_named(tmp_path):
    done = ended(launch((*ACCELERATE, "--cpu"), "-m", "halo_fast", "score", "demo", "--output_dir", tmp_path / "run"))
    assert "accelerate launch has started one process" in done.stderr and "torchrun" in done.stderr
    assert "run `halo reward` with this config first" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [("doctor",), ("score", "demo", "--score.batch_size=0")])
def test_what_one_process_must_do_and_wrong_settings_are_refused_once(tmp_path, words):
    done = ended(launch(TORCHRUN, "-m", "halo_fast", *words))
    assert done.returncode != 0 and done.stderr.count("halo: error") == 1
    expected = "halo doctor: runs in one process, got 2" if words[0] == "doctor" else "score.batch_size"
    assert expected in done.stderr
