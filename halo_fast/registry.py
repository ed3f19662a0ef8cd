"""Names of models, prompts, teachers, meters and more, each for a "module:attribute" that is imported on demand.

Whatever takes a registered name also takes a dotted name of your own: "package.module:Class". A plugin is a module with
`TABLES`, {kind: {name: "module:attribute"}}.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from halo_fast.errors import UserError, first_line

__all__ = ["create", "is_name", "known", "register", "require", "resolve", "user_errors"]

logger = logging.getLogger(__name__)

_PLUGINS = ("halo_fast.demo.plugin",)
_tables: dict[str, dict[str, str]] = {}


def register(kind: str, names: Mapping[str, str]) -> None:
    """Add names of a kind.

    Args:
        kind: "model", "family", "prompts", "teacher", "meter", "judge", "reward backbone", "reward examples",
            "reward evaluation", "objective", "recipe", "comparison", "command", "command help" (the text of a command
            in `halo --help`), or whatever else has names.
        names: name -> "module:attribute".

    Raises:
        ValueError: the name stands for something else already.
    """
    table = _tables.setdefault(kind, {})
    for name, place in names.items():
        if table.setdefault(name, place) != place:
            raise ValueError(f"{kind}: {name!r} is registered as {table[name]}; choose another name")


def known(kind: str) -> list[str]:
    """The registered names of a kind, sorted."""
    _load_plugins()
    return sorted(_tables.get(kind, {}))


def is_name(kind: str, text: str) -> bool:
    """Whether a text is a registered name or has the form "package.module:attribute", and is no file or folder."""
    return text in known(kind) or (re.fullmatch(r"[A-Za-z_][\w.]*:\w+", text) is not None and not Path(text).exists())


def load(target: str) -> Any:
    """The object behind "module:attribute", imported if it is not yet."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def target(kind: str, name: str) -> str:
    """The "module:attribute" that a registered name stands for; any other name is returned as it is."""
    _load_plugins()
    return _tables.get(kind, {}).get(name, name)


def resolve(kind: str, name: str, setting: str | None = None) -> Any:
    """The object behind a registered name, or behind a dotted "package.module:attribute".

    Args:
        kind: as for `register`.
        name: registered or dotted.
        setting: under which a mistake is reported; by default the kind.

    Raises:
        UserError: neither registered nor importable; the message lists the known names.
    """
    place = target(kind, name)
    names = ", ".join(map(repr, known(kind))) or "none"
    expected = f'{setting or kind}: expected one of {names}, or your own as "package.module:attribute"; got {name!r}'
    if ":" not in place:
        raise UserError(expected)
    try:
        return load(place)
    except Exception as error:
        if _is_ours(place) and not isinstance(error, (ImportError, AttributeError)):
            raise
        missing = getattr(error, "name", None)
        if place != name and missing and missing.split(".")[0] != "halo_fast":
            raise  # a missing package of an extra: the command line says what to install
        logger.debug("%s: import of %r failed", setting or kind, name, exc_info=True)
        raise UserError(f"{expected}, which cannot be imported ({first_line(error)})") from error


def create(kind: str, name: str, setting: str | None, *arguments: Any, requires: Sequence[str] = ()) -> Any:
    """What the callable behind a name makes of the arguments.

    Args:
        kind: as for `register`.
        name: registered or dotted.
        setting: under which a mistake is reported; by default the kind.
        arguments: of the callable.
        requires: attributes that the result needs.

    Raises:
        UserError: no such name, no callable, one of your own that fails, or a result without these attributes.
    """
    found, place = resolve(kind, name, setting), setting or kind
    if not callable(found):
        raise UserError(f"{place}: expected {name!r} to be a class or function, got {type(found).__name__}")
    with user_errors(kind, name, place):
        made = found(*arguments)
    return require(made, requires, name, place)


def require(value: Any, requires: Sequence[str], name: str, setting: str) -> Any:
    """The value of a name, if it has the attributes; none that is there is read.

    Raises:
        UserError: names the attributes that it lacks.
    """
    missing = [one for one in requires if one not in dir(value) and not hasattr(value, one)]
    if missing:
        raise UserError(
            f"{setting}: expected {name!r} to give an object with {', '.join(requires)}; "
            f"got {type(value).__name__} without {', '.join(missing)}"
        )
    return value


@contextmanager
def user_errors(kind: str, name: str, setting: str) -> Iterator[None]:
    """Report what code of the user's own raises in one line; errors of this package's keep their traceback.

    Raises:
        UserError: names the setting, the name and the error; the traceback is logged at level DEBUG.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_ours(target(kind, name)):
            raise
        logger.debug("%s: %r failed", setting, name, exc_info=True)
        raise UserError(f"{setting}: {name!r} failed ({type(error).__name__}: {first_line(error)})") from error


def _is_ours(place: str) -> bool:
    return place.startswith("halo_fast.")


@cache
def _load_plugins() -> None:
    for plugin in _PLUGINS:
        for kind, names in import_module(plugin).TABLES.items():
            register(kind, names)
