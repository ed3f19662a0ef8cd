"""A few hundred damaged files, in a process of their own; tests/support/fuzz.py runs for as long as one likes."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("seed", [0, 1])
def test_no_damaged_file_ends_in_a_traceback(seed):
    seconds = os.environ.get("HALO_FUZZ_SECONDS", "60")
    words = ["--seconds", seconds, "--seed", str(seed)]
    if "HALO_FUZZ_SECONDS" not in os.environ:
        words += ["--cases", "400"]
    done = subprocess.run([sys.executable, "-m", "fuzz", *words], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
