"""The public names: frozen with their signatures, typed, documented; deprecated ones go when they said they would."""

import importlib
import inspect
import re
import tomllib
import types
import typing
from importlib.metadata import version
from pathlib import Path

import pytest
from typing_extensions import deprecated

import halo_fast
from tools import tables

ROOT = Path(__file__).parents[1]
NAMES = [(module, name) for module in tables.MODULES for name in tables.public_names(module)]
GONE = re.compile(r"^since \d+\.\d+: use \S.*; gone in (\d+\.\d+)$")


def test_signatures_are_those_of_the_list():
    """A change here is a change of the public API: CONTRIBUTING.md says how to make one."""
    listed = (ROOT / tables.PUBLIC_NAMES).read_text().splitlines()
    assert tables.public_list().splitlines() == listed, "see CONTRIBUTING.md, then run `python -m tools.tables`"


@pytest.mark.parametrize("file, name", tables.TABLES)
def test_tables_are_those_of_the_code(file, name):
    text = (ROOT / file).read_text()
    assert tables.rendered(text, name, tables.TABLES[file, name]()) == text, "run `python -m tools.tables`"


@pytest.mark.parametrize("module, name", NAMES)
def test_public_names_are_typed_and_have_a_docstring(module, name):
    value = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return  # a constant or a type
    assert inspect.getdoc(value), f"{module}.{name} has no docstring"
    functions = [value] if inspect.isfunction(value) else [
        member for key, member in vars(value).items()
        if isinstance(member, types.FunctionType) and not key.startswith("_")
    ]  # fmt: skip
    for function in functions:
        hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True) if name != "Objective" else None
        untyped = [
            parameter.name for parameter in inspect.signature(function).parameters.values()
            if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls")
        ]  # fmt: skip
        assert not untyped, f"{module}.{name}: {function.__name__} lacks types of {untyped}"
        assert hints is None or "return" in hints, f"{module}.{name}: {function.__name__} lacks its return type"


def test_whatever_takes_a_path_takes_a_text():
    """Files and folders are given as "runs/demo/reward" more often than as a Path; the type checker sees the rest."""
    refused = []
    for module, name in NAMES:
        value = getattr(importlib.import_module(module), name)
        functions = [value] if inspect.isfunction(value) else [
            inspect.unwrap(member.__func__ if isinstance(member, classmethod) else member)
            for key, member in (vars(value) if inspect.isclass(value) else {}).items()
            if isinstance(member, types.FunctionType | classmethod) and (key == "__init__" or key[0] != "_")
        ]  # fmt: skip
        for function in functions:
            for parameter, hint in typing.get_type_hints(function).items():
                kinds = typing.get_args(hint) or (hint,)
                if parameter != "return" and Path in kinds and str not in kinds:
                    refused.append(f"{module}.{name}: {function.__name__}({parameter})")
    assert refused == []


def test_public_names_are_documented_on_the_page_of_their_module():
    for module, name in NAMES:
        page = (ROOT / "docs" / tables.MODULES[module]).read_text()
        members = re.search(rf"::: {re.escape(module)}\n.*?members: \[(.*?)\]", page, re.S)
        listed = members and name in re.split(r",\s*", members[1])
        value = getattr(importlib.import_module(module), name)
        constant = not (inspect.isclass(value) or inspect.isfunction(value))
        everywhere = "\n".join(file.read_text() for file in (ROOT / "docs" / "api").glob("*.md"))
        assert listed or constant or re.search(rf"::: halo_fast[\w.]*\.{name}$", everywhere, re.M), f"{module}.{name}"


def removal(value: object) -> tuple[int, ...] | None:
    """The version in which a deprecated object goes, by its message; None if it is not deprecated."""
    message = getattr(value, "__deprecated__", None)
    if message is None:
        return None
    found = GONE.match(message)
    assert found, f"{message!r}: expected 'since 0.2: use NEW; gone in 0.4'"
    return tuple(int(part) for part in found[1].split("."))


def test_no_name_outlives_its_deprecation():
    now = tuple(int(part) for part in halo_fast.__version__.split(".")[:2])
    for module, name in NAMES:
        gone = removal(getattr(importlib.import_module(module), name))
        assert gone is None or now < gone, f"{module}.{name} was to be gone"


def test_the_way_to_deprecate_warns_and_is_read():
    @deprecated("since 0.2: use gran_dpo; gone in 0.4")
    def old(value: int) -> int:
        return value

    with pytest.warns(DeprecationWarning, match="use gran_dpo"):
        assert old(3) == 3
    assert removal(old) == (0, 4)


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert project == halo_fast.__version__ == cited[1] == version("halo_fast")
