"""Lists of prompts: text files, tables, and registered lists."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halo_fast import registry
from halo_fast.data.records import SUFFIXES, Row, exists, is_empty, parse_csv, parse_json, read_records
from halo_fast.errors import UserError, first_line

__all__ = ["prompt_pictures", "prompt_source", "read_prompts", "shared_prompts"]

logger = logging.getLogger(__name__)

# names of the column of prompts in a table, the first that it has counts
_COLUMNS = ("prompt", "prompts", "prompt_en", "caption", "text prompt", "gen_caption", "text")
_FORMATS = "a text file with one prompt a line, or a csv, tsv, json, jsonl or parquet table with a column 'prompt'"


def prompt_source(prompts: str) -> Path | str:
    """What identifies a list of prompts as a stage's input: the file, or the registered or dotted name."""
    return prompts if registry.is_name("prompts", prompts) else Path(prompts)


def read_prompts(prompts: str, count: int | None, seed: int = 0, setting: str = "prompts") -> list[str]:
    """The first prompts of a list.

    Args:
        prompts: a text file with one prompt a line, a table with a column of prompts, a JSON list, a registered name,
            or "package.module:attribute" of a callable that takes a count (None for all) and a seed and gives prompts;
            the callable raises ValueError for a count that it cannot serve.
        count: how many; fewer come from a file that is shorter. None for all.
        seed: for registered lists, which may be drawn.
        setting: under which mistakes are reported.

    Raises:
        UserError: a missing or unreadable file, an empty prompt, no prompts, no list of that name.
    """
    if registry.is_name("prompts", prompts):
        return _registered_prompts(prompts, count, seed, setting)
    path = Path(prompts)
    if path.suffix.lower() in SUFFIXES and path.suffix.lower() not in (".json", ".jsonl") and path.is_file():
        found = _column(read_records(path), path, setting)
    else:
        found = _from_text(_read_text(path, setting), path, setting)
    if not found:
        raise UserError(f"{setting}: {path} holds no prompts; write one a line")
    taken = found[:count]
    if len(taken) < len(found):
        logger.info("%s: the first %d of %d prompts of %s (num_prompts)", setting, len(taken), len(found), path)
    return taken


def prompt_pictures(prompts: str, setting: str = "prompts") -> dict[str, Path]:
    """The picture from which each prompt's clips go on, by the column "image" of a table; none without such a column.

    Args:
        prompts: as for `read_prompts`; names of pictures are relative to the table's folder.
        setting: under which mistakes are reported.

    Raises:
        UserError: no such picture, or two of one prompt.
    """
    path = Path(prompts)
    if registry.is_name("prompts", prompts) or path.suffix.lower() not in SUFFIXES or not path.is_file():
        return {}
    value = read_records(path) if path.suffix.lower() not in (".json", ".jsonl") else _json_rows(path, setting)
    if not any("image" in row for row in value):
        return {}
    found: dict[str, Path] = {}
    for number, (row, prompt) in enumerate(zip(value, _column(value, path, setting), strict=True), 1):
        place, name = f"{setting}: {path} row {number}", row.get("image")
        if not isinstance(name, str) or not exists(path.parent / name) or not (path.parent / name).is_file():
            raise UserError(
                f"{place}: expected the name of a picture in 'image', got {name!r}; write it relative to the table"
            )
        if found.setdefault(prompt, path.parent / name) != path.parent / name:
            raise UserError(
                f"{place}: expected one picture of a prompt, got two of {prompt!r}; word the prompts differently"
            )
    return found


def _json_rows(path: Path, setting: str) -> list[Row]:
    """The rows of a JSON list of objects; none of other lists, which have no columns."""
    value = parse_json(_read_text(path, setting), path.suffix.lower() == ".jsonl")
    return value if isinstance(value, list) and all(isinstance(row, dict) for row in value) else []


def shared_prompts(prompts: Sequence[str], others: Sequence[str]) -> list[str]:
    """The prompts that both lists hold, whatever their case and blanks, in the order of the second.

    Args:
        prompts: such as those that train.
        others: such as those that evaluate.
    """
    known = {" ".join(prompt.casefold().split()) for prompt in prompts}
    return [prompt for prompt in others if " ".join(prompt.casefold().split()) in known]


def _registered_prompts(name: str, count: int | None, seed: int, setting: str) -> list[str]:
    """The prompts that a registered or dotted callable gives."""
    give = registry.resolve("prompts", name, setting)
    with registry.user_errors("prompts", name, setting):
        try:
            found = give(count, seed)
        except ValueError as error:
            raise UserError(f"{setting}: {error}; lower num_prompts") from error
    if not isinstance(found, list | tuple) or not found or not all(isinstance(one, str) for one in found):
        wrong = next((one for one in found if not isinstance(one, str)), found) if isinstance(found, list) else found
        raise UserError(f"{setting}: expected {name!r} to give a list of prompts, got {wrong!r}")
    return list(found)


def _read_text(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{setting}: expected {_FORMATS}, got {str(path)!r} ({reason})") from error


def _from_text(text: str, path: Path, setting: str) -> list[str]:
    """The prompts of a text, which its content shows to be JSON, a table, or one prompt a line."""
    suffix = path.suffix.lower()
    try:
        is_json = suffix in (".json", ".jsonl") or text.lstrip()[:1] in ("[", "{")
        value = parse_json(text, suffix == ".jsonl") if is_json else None
    except ValueError as error:
        if suffix in (".json", ".jsonl"):
            raise UserError(f"{setting}: expected {_FORMATS}, got {str(path)!r} ({first_line(error)})") from error
        value = None  # a prompt may begin with a bracket
    if value is not None:
        return _from_json(value, path, setting)
    lines = text.removesuffix("\n").split("\n")
    header = [cell.strip().strip('"').casefold() for cell in lines[0].replace("\t", ",").replace(";", ",").split(",")]
    if any(name in header for name in _COLUMNS[:3]) and all(len(cell.split()) == 1 for cell in header):
        if len(header) > 1:
            return _column(parse_csv(text, f"{setting}: {path}"), path, setting)
        lines = lines[1:]
    if lines in ([""], []):
        return []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{setting}: {path} line {number} is empty; write a prompt there or remove the line")
    return [line.strip() for line in lines]


def _from_json(value: Any, path: Path, setting: str) -> list[str]:
    """The prompts of a list of texts or of objects, or of an object that holds one such list."""
    if isinstance(value, dict) and any(isinstance(item, str) for item in value.values()):
        value = [value]
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return _column(value, path, setting)
    if not isinstance(value, list):
        raise UserError(f"{setting}: expected a list of prompts in {path}, got {type(value).__name__}")
    return [_checked(item, number, path, setting) for number, item in enumerate(value, 1)]


def _column(rows: Sequence[Any], path: Path, setting: str) -> list[str]:
    """The column of prompts of a table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    named = {str(column).strip().casefold(): column for column in reversed(columns)}
    column = next((named[name] for name in _COLUMNS if name in named), None)
    if rows and column is None:
        got = ", ".join(map(repr, columns))
        raise UserError(
            f"{setting}: expected a column {' or '.join(map(repr, _COLUMNS[:4]))} in {path}, got {got}; "
            "name the column, or save the prompts as .txt with one a line"
        )
    return [_checked(row.get(column), number, path, setting) for number, row in enumerate(rows, 1)]


def _checked(prompt: Any, number: int, path: Path, setting: str) -> str:
    if not isinstance(prompt, str) or is_empty(prompt):
        raise UserError(
            f"{setting}: {path} row {number}: expected a prompt, got {prompt!r}; write text there or remove the row"
        )
    return " ".join(prompt.split())
