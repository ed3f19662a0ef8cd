"""Settings from the command line and from YAML files, by jsonargparse."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halo_fast import registry
from halo_fast.errors import UserError
from halo_fast.pipeline.config import Config

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["build_parser", "load_config", "parse", "parse_config", "recipe_file"]


def build_parser(program: str, description: str) -> ArgumentParser:
    """A parser that takes --config FILE.yaml and raises its mistakes instead of leaving the process.

    Args:
        program: how the command is called, for messages: "halo train".
        description: one line for `--help`.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _expand_help(self, action: Any) -> str:
            return _plain_types(super()._expand_help(action))

    parser = ArgumentParser(
        prog=program, description=description, exit_on_error=False, allow_abbrev=False, print_config=None,
        formatter_class=Formatter,
    )  # fmt: skip
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; the word --config may be left out.")
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """The parsed arguments.

    Raises:
        UserError: jsonargparse's message in one line, under the name of the file if the file is wrong.
    """
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(list(arguments))
    except (ArgumentError, ValueError) as error:
        place = f"{arguments[1]}: " if _is_of_file(parser, arguments, error) else ""
        message = _plain(str(error))
        raise UserError(
            f"{place}{message}{_nearest(parser, message)} `{parser.prog} --help` lists the settings"
        ) from None


def _nearest(parser: ArgumentParser, message: str) -> str:
    """What follows a message: a question if the setting that it misses is near to one that exists, else ";"."""
    found = re.search(r"unrecognized arguments: --([\w.]+)", message)
    in_file = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    wrong = found[1] if found else ".".join(in_file.groups()) if in_file else None
    near = difflib.get_close_matches(wrong, [action.dest for action in parser._actions], 1) if wrong else []
    return f"; did you mean {near[0]}?" if near else ";"


def _plain_types(text: str) -> str:
    """A line of `--help` with types in words: "int >= 1" for Annotated[int, Ge(ge=1)]."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}

    def bounds(found: re.Match[str]) -> str:
        limits = re.findall(r"([gl][et])=([-+.\w]+)", found[2])
        limits = [limit for limit in limits if limit[1] not in ("None", "inf")]
        return f"{found[1]} {', '.join(f'{signs[name]} {limit}' for name, limit in limits)}"

    text = re.sub(r"Annotated\[(\w+), ((?:G[et]|L[et]|Interval)\([^\]]*)\]", bounds, text)
    text = re.sub(r"Literal\[([^\]]*)\]", r"\1", text)
    text = re.sub(r"Optional\[((?:[^\[\]]|\[[^\[\]]*\])*)\]", r"\1 or null", text)
    return re.sub(r"\(type: [^()]*", lambda found: found[0].replace(" | None", " or null").replace(" | ", " or "), text)


def _is_of_file(parser: ArgumentParser, arguments: Sequence[str], error: Exception) -> bool:
    """Whether the file that the arguments begin with gives the same error alone; what is missing is no error of it."""
    from jsonargparse import ArgumentError

    if arguments[:1] != ["--config"] or not arguments[1:] or "arguments are required" in str(error):
        return False
    try:
        parser.parse_args(list(arguments[:2]))
    except (ArgumentError, ValueError) as alone:
        return str(alone) == str(error)
    return False


def _plain(message: str) -> str:
    """A message of jsonargparse, or of pydantic where that is installed, without names of their own classes."""
    for pattern, words in (
        (r'Parser key "([\w.]+)"', r"\1"),
        (r"^config: ", ""),
        (r"<class '(\w+)'>", r"\1"),
        (r'in "<unicode string>", ', ""),
        (r"typing\.Annotated\[(\w+), [^\]]*\]", r"\1"),
        (r"Expected a typing\.Literal\[([^\]]*)\]\. Got value:", r"expected one of \1, got"),
        (r"Does not validate[^\n]*\n\s*Subtypes:[^\n]*\n\s*Errors:\n\s*- ", ""),
        (r",?\n\s*- Expected a NoneType", " or null"),
        (r"\n\s*Given value type: [^\n]*\n\s*Given value:", ", got"),
        (r"\d+ validation errors? for \S+\s+Input should be", "expected"),
        (r" \[type=[^\n]*", ","),
        (r"\s*For further information visit \S+ Got value:", " got"),
        (r"\s*For further information visit \S+", ""),
    ):
        message = re.sub(pattern, words, message)
    return message


def parse_config(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Config, Namespace]:
    """The settings of a run, and beside them the parser's other arguments.

    Args:
        parser: of `build_parser`; gets one argument for every setting.
        arguments: words of the command line; the first may be a YAML file or the name of a recipe.

    Raises:
        UserError: a setting that does not exist or cannot have such a value.
    """
    parser.add_class_arguments(Config)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", str(recipe_file(arguments[0])), *arguments[1:]]
    settings = parse(parser, arguments)
    file = f"{arguments[1]}: " if arguments[:1] == ["--config"] else ""
    _check_sections(settings, Config, file)
    try:
        settings = parser.instantiate(settings)
        return Config(**{field.name: settings[field.name] for field in fields(Config)}), settings
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_sections(settings: Namespace, kind: Any, place: str) -> None:
    """Raise where a section of settings is something else; jsonargparse takes whatever stands there in a file."""
    from jsonargparse import Namespace

    for field in fields(kind):
        section: Any = settings.get(field.name, Namespace())  # one without settings is left out
        factory: Any = field.default_factory
        if is_dataclass(factory):
            if not isinstance(section, Namespace):
                raise UserError(f"{place}{field.name}: expected a section of settings, got {section!r}")
            _check_sections(section, factory, f"{place}{field.name}.")


def recipe_file(name: str | Path) -> Path:
    """The YAML file that a name stands for: a registered recipe, or the file of that name.

    Raises:
        UserError: neither a recipe nor a file.
    """
    if str(name) in registry.known("recipe"):
        return Path(registry.resolve("recipe", str(name)))
    if not Path(name).exists() or Path(name).is_dir():
        names = ", ".join(registry.known("recipe"))
        problem = "is a folder" if Path(name).is_dir() else "does not exist"
        raise UserError(f"expected a YAML file or the name of a recipe ({names}), got {str(name)!r}, which {problem}")
    return Path(name)


def load_config(recipe: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """The settings in a file or recipe, for Python.

    Args:
        recipe: a registered recipe or a YAML file.
        changes: dotted setting -> value, as on the command line: {"train.max_train_steps": 10}.

    Raises:
        UserError: as for `parse_config`.
    """
    words = [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in (changes or {}).items()
    ]
    parser = build_parser("halo run", "")
    return parse_config(parser, [str(recipe), *words])[0]
