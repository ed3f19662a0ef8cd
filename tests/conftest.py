"""Environment of every test: no network, two threads, Triton interpreted where there is no GPU."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="halo_fast_triton_"))
# Triton reads this when it is imported; looking for the driver's device files keeps CUDA itself untouched here.
if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402

torch.set_num_threads(2)


def pytest_collection_modifyitems(items):  # noqa: ANN001
    import pytest

    needed = {"gpu": 1, "gpu2": 2}
    for item in items:
        for marker, count in needed.items():
            if item.get_closest_marker(marker) and torch.accelerator.device_count() < count:
                item.add_marker(pytest.mark.skip(reason=f"needs {count} GPU{'s' if count > 1 else ''}"))
