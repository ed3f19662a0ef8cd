"""Imports go one way, and importing halo_fast stays light."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"kernels", "reference", "runs", "config"},
    {"backends"},
    {"ops"},
    {"functional", "objectives", "patches"},
    {"rewards", "teachers", "data", "families"},
    {"generate", "train", "evaluate", "report", "label", "demo"},
    {"cli"},
    {"__main__"},
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
HEAVY = {
    "triton", "xformers", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pyarrow", "av", "sklearn",
    "jsonargparse", "openai", "tqdm", "PIL",
}  # fmt: skip


def imports(path: Path, room: str) -> set[tuple[str, bool]]:
    """Rooms that a file imports from halo_fast, each with whether the import runs when the file is imported."""
    tree = ast.parse(path.read_text(), str(path))
    lazy = {node for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef) for node in ast.walk(outer)}
    # what is imported for type checkers alone never runs
    lazy |= {
        node
        for outer in ast.walk(tree)
        if isinstance(outer, ast.If) and ast.unparse(outer.test).endswith("TYPE_CHECKING")
        for node in ast.walk(outer)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; write it from halo_fast"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        rooms = [name.split(".")[1] for name in names if name.startswith("halo_fast.")]
        found |= {(other, node not in lazy) for other in rooms if other in RANK and other != room}
    return found


def files() -> list[tuple[str, Path]]:
    package = [(path.relative_to(ROOT / "halo_fast").parts[0], path) for path in (ROOT / "halo_fast").rglob("*.py")]
    return [(part.removesuffix(".py"), path) for part, path in package] + [
        ("kernels", path) for path in (ROOT / "kernels").rglob("*.py")
    ]


def test_every_file_has_a_layer():
    rooms = {room for room, _ in files()} - {"__init__"}
    assert rooms <= RANK.keys()
    assert {"kernels", "config", "runs", "cli"} <= rooms


@pytest.mark.parametrize(("room", "path"), [pytest.param(*file, id=file[1].name) for file in files()])
def test_imports_go_down(room, path):
    if room == "__init__":
        allowed = {"backends", "functional", "objectives", "patches", "ops"}
        assert {other for other, _ in imports(path, room)} <= allowed
        return
    for other, eager in imports(path, room):
        # the demo is a teacher, a meter and a model to others, who import it only when it is asked for
        if other == "demo" and not eager:
            continue
        assert RANK[other] <= RANK[room], f"{path}: {room} imports {other}, which stands above it"
        if RANK[room] == 0:
            assert (room, other) == ("runs", "config"), f"{path}: {room} is a leaf but imports {other}"


def test_rooms_import_each_other_without_cycles():
    graph: dict[str, set[str]] = {}
    for room, path in files():
        graph.setdefault(room, set()).update(other for other, eager in imports(path, room) if eager)
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("kernels") < order.index("cli")


def test_importing_halo_fast_is_light():
    script = f"""
import sys, torch, numpy
before = set(sys.modules)
import halo_fast
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not new & {HEAVY!r}, new & {HEAVY!r}
assert not any(name.startswith("halo_fast.kernels.") for name in sys.modules), "a kernel was imported"
assert not torch.cuda.is_initialized()
libraries = open("/proc/self/maps").read() if sys.platform == "linux" else ""
assert "halo_fast/kernels" not in libraries and "triton" not in libraries
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
