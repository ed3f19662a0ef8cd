"""Two import rules. The pipeline may import anything; nothing imports the pipeline. Only the demo names the demo.

The graph is by file. Imports inside functions and for type checkers count like any others.
"""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {
    "triton", "xformers", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pyarrow", "av", "sklearn",
    "jsonargparse", "openai", "tqdm", "PIL", "annotated_types", "filelock",
}  # fmt: skip
LEAVES = {
    "halo_fast.errors", "halo_fast.files", "halo_fast.patches", "halo_fast.processes", "halo_fast.registry",
    "halo_fast.settings",
}  # fmt: skip
LIBRARIES = {"agreement", "data", "export", "families", "judges", "loss", "rewards", "teachers", "train"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; the kernels are imported as halo_fast.kernels."""
    found = {}
    for root, name in ((ROOT / "halo_fast", "halo_fast"), (ROOT / "kernels", "halo_fast.kernels")):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; write it from halo_fast"
            # "from package import x" means the module package.x if there is one, else something in package
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= members & modules().keys()
            names |= {node.module} if members - modules().keys() else set()
    return {name for name in names if name in modules()}


@cache
def graph() -> dict[str, set[str]]:
    return {name: imports(path) - {name} for name, path in modules().items()}


def room(module: str) -> str:
    return ".".join(module.split(".")[1:2])


def test_the_graph_is_not_empty():
    assert {room(module) for module in graph()} >= LIBRARIES | {"pipeline", "demo", "kernels"}
    assert sum(len(targets) for targets in graph().values()) > 200
    assert "halo_fast.errors" in graph()["halo_fast.pipeline.cli"]


def test_nothing_imports_the_pipeline():
    found = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets
        if room(target) == "pipeline" and room(module) not in ("pipeline", "__main__")
    ]
    assert not found
    # nor by a name that the registry would import
    named = {module for module, path in modules().items() if "halo_fast.pipeline" in path.read_text()}
    assert {room(module) for module in named} <= {"pipeline", "__main__"}


def test_nothing_but_the_demo_imports_the_demo():
    found = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets
        if room(target) == "demo" and room(module) != "demo"
    ]
    assert not found


def test_only_the_registry_names_the_demo():
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for module, path in sorted(modules().items())
        if room(module) != "demo"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search("demo", line, re.IGNORECASE)
    ]
    assert len(lines) == 1 and lines[0].startswith("halo_fast/registry.py"), "\n".join(lines)


def test_no_library_names_a_run_or_its_config():
    found = [
        f"{path.relative_to(ROOT)}: {node.id}"
        for module, path in modules().items()
        if room(module) in LIBRARIES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name) and node.id in ("Config", "Run")
    ]
    assert not found


def test_imports_make_no_circle():
    try:
        order = list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")
    assert order.index("halo_fast.errors") < order.index("halo_fast.pipeline.cli")


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_import_leaves_alone(leaf):
    assert graph()[leaf] <= LEAVES


def test_kernels_import_nothing_else():
    assert {target for module in graph() if room(module) == "kernels" for target in graph()[module]} <= {
        module for module in graph() if room(module) == "kernels"
    }


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_halo_fast_is_light():
    run(f"""
import sys, torch, numpy
before = set(sys.modules)
import halo_fast
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not new & {HEAVY!r}, new & {HEAVY!r}
assert not any(name.startswith("halo_fast.kernels.") for name in sys.modules), "a kernel was imported"
assert not torch.cuda.is_initialized()
libraries = open("/proc/self/maps").read() if sys.platform == "linux" else ""
assert "halo_fast/kernels" not in libraries and "triton" not in libraries
""")


def test_libraries_need_no_fcntl():
    """Windows has none."""
    run("""
import sys
import filelock, torch  # which import it themselves where there is one
sys.modules["fcntl"] = None
import halo_fast.train, halo_fast.rewards, halo_fast.families, halo_fast.teachers
assert "halo_fast.pipeline.run" not in sys.modules
""")


def test_no_test_file_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        names = {name for node in ast.walk(ast.parse(path.read_text())) for name in _modules(node)}
        assert not {name for name in names if name.startswith("test_")}, path


def _modules(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
