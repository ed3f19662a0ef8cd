"""What is read off the code: tables of README.md and docs/api/index.md, and the public names with their signatures.

python -m tools.tables            # writes the tables between their marks, and tests/public_names.txt
"""

import inspect
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from halo_fast import registry
from halo_fast.export import comfyui
from halo_fast.families import Family
from halo_fast.loss import backends

__all__ = ["MODULES", "PUBLIC_NAMES", "TABLES", "public_list", "public_names", "rendered"]

ROOT = Path(__file__).parents[1]
PUBLIC_NAMES = "tests/public_names.txt"
MODULES = {
    "halo_fast": "api/loss.md", "halo_fast.loss.objectives": "api/objectives.md", "halo_fast.train": "api/train.md",
    "halo_fast.families": "api/families.md", "halo_fast.data": "api/data.md", "halo_fast.rewards": "api/rewards.md",
    "halo_fast.teachers": "api/teachers.md", "halo_fast.registry": "api/data.md",
}  # fmt: skip
_SOME = {"halo_fast.registry": ["known", "register"]}  # of modules whose other names serve the package itself
_DEVICES = {"cpp": "CPU", "triton": "CUDA, ROCm, XPU", "reference": "anything that torch runs on"}
_TITLES = {"cpp": "C++ (`cpp`)", "triton": "Triton (`triton`)", "reference": "PyTorch (`reference`)"}
_STATE = {
    "cpp": "measured",
    "triton": "compiled for 7 targets; run interpreted; no GPU has timed it",
    "reference": "the ground truth of the tests",
}
_OPERATIONS = ("patch_log_ratio", "patch_error", "patch_error_backward", "gran_dpo_table")


def public_names(module: str) -> list[str]:
    """The public names of a module: its __all__, without its version."""
    return _SOME.get(module) or [name for name in import_module(module).__all__ if not name.startswith("__")]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def backend_table() -> str:
    """Operations, backends and dtypes."""
    names = [name for name in backends.NAMES if name != "reference"] + ["reference"]
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in backends._DTYPES)
    devices = {name: [device for device, default in backends._DEFAULTS.items() if default == name] for name in names}
    modules = {name: backends._module(name) for name in names}

    def has(operation: str) -> list[str]:
        return ["yes" if hasattr(modules[name], operation) else "no" for name in names]

    rows = [["runs on", *(_DEVICES[name] for name in names)]]
    rows.append(["default on", *(", ".join(devices[name]) or "all other devices" for name in names)])
    rows.append(["dtypes", *[dtypes] * len(names)])
    rows += [[f"`{operation}`", *has(operation)] for operation in _OPERATIONS]
    whole = ["kernels of its own" if hasattr(modules[name], "gran_dpo") else "from the four above" for name in names]
    rows.append(["`gran_dpo`", *whole])
    rows.append(["state", *(_STATE[name] for name in names)])
    return _table(["", *(_TITLES[name] for name in names)], rows)


def family_table() -> str:
    """Families and what they can do."""
    rows = []
    for pipeline in registry.known("family"):
        family: type[Family] = registry.resolve("family", pipeline)
        rows.append([
            f"`{pipeline}`", " or ".join(f"`{name}`" for name in family.networks), family.layout,
            "yes", "yes", "yes" if pipeline in comfyui._LAYERS else "no",
        ])  # fmt: skip
    head = ["diffusers pipeline", "trained", "latents", "LoRA", "all weights (`train.rank: 0`)", "ComfyUI file"]
    return _table(head, rows)


def api_table() -> str:
    """Public names by module."""
    rows = []
    for module, page in MODULES.items():
        names = ", ".join(f"`{name}`" for name in public_names(module))
        rows.append([f"[`{module}`]({Path(page).name})", names])
    return _table(["import from", "names"], rows)


TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "backends"): backend_table,
    ("README.md", "families"): family_table,
    ("docs/api/index.md", "api"): api_table,
}


def rendered(text: str, name: str, table: str) -> str:
    """The text with a table between its marks.

    Raises:
        ValueError: no such marks.
    """
    mark = re.escape(f"<!-- python -m tools.tables: {name} -->\n")
    changed, count = re.subn(rf"({mark}).*?(<!-- end -->)", lambda found: found[1] + table + found[2], text, flags=re.S)
    if count != 1:
        raise ValueError(f"{name}: expected one pair of marks, got {count}")
    return changed


def signature(module: str, name: str) -> str:
    """A public name with its parameters and their defaults: of a class those of its construction.

    Types are left out: they are written differently by different versions of Python. The type checker holds them.
    """
    value = getattr(import_module(module), name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return f"{module}.{name}"
    parameters = inspect.signature(value).parameters.values()
    untyped = inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters])
    return re.sub(r"<(?:function|class) '?([\w.]+)[^>]*>", r"\1", f"{module}.{name}{untyped}")


def public_list() -> str:
    """All public names with their signatures, a line each."""
    lines = [signature(module, name) for module in MODULES for name in public_names(module)]
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    """Write all tables, and the list of public names."""
    for (file, name), table in TABLES.items():
        path = ROOT / file
        path.write_text(rendered(path.read_text(), name, table()))
    (ROOT / PUBLIC_NAMES).write_text(public_list())


if __name__ == "__main__":
    main()
