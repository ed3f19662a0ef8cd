"""The wheel, built from the sdist, works in a clean environment that has torch and numpy alone."""

import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core")
packaging = pytest.importorskip("packaging.requirements")

ROOT = Path(__file__).parents[1]

BUILD = "import sys; from scikit_build_core.build import build_{0}; print('built', build_{0}(sys.argv[1]))"

USE = """
import math, torch, halo_fast
torch.manual_seed(0)
prediction = torch.randn(4, 2, 3, 8, 8, requires_grad=True)
target = torch.randn(4, 2, 3, 8, 8)
rewards, videos = torch.randn(4, 3, 2, 2), torch.randn(4)
out = halo_fast.gran_dpo(prediction, target, prediction.detach(), rewards, videos)
assert abs(out.loss.item() - 2 * math.log(2)) < 1e-5, out.loss
out.loss.backward()
assert prediction.grad.abs().sum() > 0
from halo_fast.loss import backends
assert backends.unavailable("cpp", "cpu") is None, backends.unavailable("cpp", "cpu")
print(halo_fast.__file__)
"""


def build(kind: str, source: Path, destination: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(kind), str(destination)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return destination / done.stdout.split()[-1]


def core_packages(names: list[str]) -> set[Path]:
    """Top-level files and folders of these distributions and of all they need."""
    found, waiting, seen = set(), list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        installed = distribution(name)
        tops = {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__")}
        found |= {Path(str(installed.locate_file(top))) for top in tops}
        needed = [packaging.Requirement(text) for text in installed.requires or []]
        waiting += [need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    sdist = build("sdist", ROOT, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return build("wheel", source, folder)


@pytest.mark.slow
def test_wheel_holds_what_it_should(wheel):
    assert wheel.name.endswith(".whl") and "-py3-none-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    data = ("halo_fast/py.typed", "halo_fast/pipeline/report/page.html.j2", "halo_fast/demo/recipe.yaml")
    data += ("halo_fast/pipeline/report/judges.html.j2", "halo_fast/judges/videoreward.txt")
    assert {"halo_fast/kernels/__init__.py", *data} <= set(names)
    assert [name for name in names if name.startswith("halo_fast/kernels/_cpu.")]
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "halo_fast").rglob("*.py")}
    assert package <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".tmp")) or name.split("/")[0] in ("tests", "kernels")]
    assert wheel.stat().st_size < 20 * 2**20


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "clean")], check=True)
    (library,) = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    for path in core_packages(["torch", "numpy"]):
        (library / path.name).symlink_to(path)
    install = [sys.executable, "-m", "pip", f"--python={tmp_path / 'clean' / 'bin' / 'python'}", "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def call(*command):
        program = tmp_path / "clean" / "bin" / command[0]
        return subprocess.run([program, *command[1:]], cwd=elsewhere, capture_output=True, text=True)

    used = call("python", "-c", USE)
    assert used.returncode == 0, used.stderr
    assert Path(used.stdout.strip()).is_relative_to(library)
    assert call("halo", "doctor").returncode == 0
    refused = call("halo", "train")
    assert refused.returncode == 2 and "is not installed; pip install" in refused.stderr
