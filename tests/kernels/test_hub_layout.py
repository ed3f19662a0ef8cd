"""The generated repository for the Hugging Face `kernels` package: its parts, and the package's own tools."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    output = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / "tools" / "hub_kernels.py", output], check=True)
    return output


def test_variants_hold_the_kernels_as_they_are(layout):
    source = (ROOT / "kernels" / "triton_patch_dpo.py").read_bytes()
    ids = set()
    for variant in (layout / "build").iterdir():
        assert (variant / "triton_patch_dpo.py").read_bytes() == source
        ids.add(json.loads((variant / "metadata.json").read_text())["id"])
    assert {variant.name for variant in (layout / "build").iterdir()} == {"torch-cuda", "torch-rocm", "torch-xpu"}
    assert len(ids) == 3
    assert (layout / "torch-ext" / "halo_fast_kernels" / "triton_patch_dpo.py").read_bytes() == source


def test_foreign_imports_are_refused():
    code = "import hub_kernels; hub_kernels.check_imports('from halo_fast.loss import reference')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True)
    assert "expected imports of torch, triton and the standard library, got halo_fast.loss" in done.stderr


LOAD = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
from kernels._rust import Build
path = Path(sys.argv[1])
assert [str(backend) for backend in Build.open(path).general.backends] == ["cuda", "rocm", "xpu"]
kernel = get_local_kernel(path / "build" / "torch-cuda")
assert get_local_kernel(path / "build" / "torch-rocm") is not kernel
a, b = torch.randn(2, 2, 3, 4, 6, 8, dtype=torch.float64)
found = kernel.patch_error(a, b, (2, 3, 2))
truth = (a - b).pow(2).reshape(2, 3, 2, 2, 3, 2, 2, 4).mean(dim=(1, 3, 5, 7))
assert (found - truth).abs().max() < 1e-12, (found - truth).abs().max()
print("loaded", kernel.__name__)
"""


def test_the_package_loads_it(layout, tmp_path):
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package kernels is not installed")
    # from a folder of its own: this repository's kernels/ would be imported in place of the package
    done = subprocess.run([sys.executable, "-c", LOAD, layout], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("loaded _halo_fast_kernels_cuda_"), done.stderr
    command = [sys.executable, "-c", "from kernels.cli import main; main()", "info", layout, "--json"]
    info = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(info.stdout)["name"] == "halo-fast-kernels", info.stderr
