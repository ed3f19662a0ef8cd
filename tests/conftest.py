"""Environment of every test: no network, two threads in all, Triton interpreted where there is no GPU."""

import gc
import os
import tempfile
from pathlib import Path

gc.disable()  # until all is imported: see pytest_collection_finish

SUPPORT = str(Path(__file__).parent / "support")
# programs that tests start find it too
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (SUPPORT, os.environ.get("PYTHONPATH"))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="halo_fast_triton_"))
# Triton reads this when it is imported; looking for the driver's device files keeps CUDA itself untouched here.
if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# threads that wait for one another spin, so workers with more threads than cores are slower than one process
torch.set_num_threads(max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(scope="module")
def pipeline():
    """A tiny Wan pipeline; tests that change it make their own."""
    from tiny import tiny_wan

    return tiny_wan()


@pytest.fixture(scope="module")
def pairs(pipeline):
    """Six random preference pairs for it."""
    from training import make_pairs

    from halo_fast.families import family_of

    return make_pairs(family_of(pipeline))


@pytest.fixture
def calls(monkeypatch):
    """Stages are noted instead of run."""
    from verbs import replace_stages

    noted = []

    def note(target):
        return lambda config, run: noted.append((target.replace(":", "."), config, run))

    replace_stages(monkeypatch, note)
    return noted


def pytest_xdist_auto_num_workers(config):
    """Folders of tests run in two processes, each with whole files; files and single tests in this one."""
    return 2 if any(Path(name.partition("::")[0]).is_dir() for name in config.args) else 0


# Whoever takes a long file last works on it alone; these are the longest, in order, of quick and slow tests.
LONGEST = (
    "pipeline/test_launches.py", "train/test_predicted.py", "pipeline/test_spine.py", "docs/test_blocks.py",
    "agreement/test_agreement_patches.py", "kernels/test_kernels.py", "train/test_distributed.py",
    "pipeline/test_plan.py", "kernels/test_gpu.py", "rewards/test_reward_training.py", "train/test_train_meta.py",
    "train/test_train_quantized.py", "train/test_train_schedules.py", "train/test_resume.py",
    "teachers/test_teacher_runs.py", "test_processes.py", "kernels/test_resources.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    needed = {"gpu": 1, "gpu2": 2}
    for item in items:
        for marker, count in needed.items():
            if item.get_closest_marker(marker) and torch.accelerator.device_count() < count:
                item.add_marker(pytest.mark.skip(reason=f"needs {count} GPU{'s' if count > 1 else ''}"))


def pytest_collection_finish():
    """What imports have made stays: each collection among its millions of objects takes half a second."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # libraries that count what is left at the end find nothing
