"""Rows with named columns out of the tables that other programs write: csv, tsv, json, jsonl and parquet."""

import csv
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halo_fast.errors import UserError, first_line

__all__ = ["SUFFIXES", "Row", "exists", "is_empty", "parse_csv", "parse_json", "read_records", "required_text"]

Row = Mapping[str, Any]

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")

_DELIMITERS = ",\t;|"
# what spreadsheets and pandas write into a cell without a value
_EMPTY = {"", "nan", "null", "none", "n/a", "na"}


def read_records(path: Path) -> list[Row]:
    """The rows of a table, in whichever of the known formats it is written.

    A csv may be separated by commas, tabs, semicolons or bars; a json may hold one list or an object on each line.

    Raises:
        UserError: not readable, or not a table with named columns.
    """
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".csv", ".tsv"):
            return parse_csv(text, str(path))
        rows = parse_json(text, path.suffix.lower() == ".jsonl")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: expected a csv, tsv, json, jsonl or parquet table, got {reason}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of rows with named columns, got {_shape_of(rows)}")
    return rows


def parse_json(text: str, of_lines: bool = False) -> Any:
    """The value of a JSON text, or the list of values of a text with one on each line.

    Args:
        text: of the file.
        of_lines: whether a text of one value, which is no list, is one line.

    Raises:
        ValueError: neither.
    """
    try:
        value = json.loads(text)
        return [value] if of_lines and not isinstance(value, list) else value
    except ValueError as whole:
        # only a line feed ends a line here: U+2028 and its like may stand inside a value
        lines = [line for line in text.split("\n") if line.strip()]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise (whole if len(lines) < 2 else error) from None


def parse_csv(text: str, name: str) -> list[Row]:
    """The rows of a csv text; the separator is the one that gives the header most columns.

    Args:
        text: with a header.
        name: of the file, for messages.

    Raises:
        UserError: a column named twice, or a row with another number of cells than the header.
    """
    with _cells_of_any_length():
        header = max((next(_lines(text, mark), []) for mark in _DELIMITERS), key=len)
        mark = next(mark for mark in _DELIMITERS if next(_lines(text, mark), []) == header)
        rows = [row for row in _lines(text, mark) if row][1:]
    columns = [column.strip() for column in header]
    twice = [column for index, column in enumerate(columns) if column and column in columns[:index]]
    if twice:
        raise UserError(f"{name}: expected each column once, got {twice[0]!r} twice; rename one")
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise UserError(f"{name}: row {number}: expected {len(columns)} cells, got {len(row)}")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def is_empty(value: Any) -> bool:
    """Whether a cell holds no value: null, NaN, blank, or a word that stands for these."""
    if isinstance(value, str):
        return value.strip().casefold() in _EMPTY
    return value is None or (isinstance(value, float) and math.isnan(value))


def exists(file: Path) -> bool:
    """Whether there is such a file; a name that no file can have is none."""
    try:
        return file.exists()
    except (OSError, ValueError):
        return False


def required_text(row: Row, column: str, place: str) -> str:
    """The text in a column; of a list of texts the first.

    Args:
        row: of the table.
        column: its name.
        place: of the row, for messages.

    Raises:
        UserError: empty, or no text.
    """
    value = row.get(column)
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, str) or not value.strip() or not _is_text(value):
        raise UserError(f"{place}: expected text in {column!r}, got {value!r}; write it there or leave the row out")
    return value.strip()


def _is_text(value: str) -> bool:
    """Whether a text can be written to a file: no NUL, no half of a surrogate pair."""
    try:
        return "\0" not in value and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _lines(text: str, delimiter: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Lift the csv module's limit of 131072 characters a cell, which is global."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _shape_of(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        odd = next(item for item in value if not isinstance(item, dict))
        return f"a list with {type(odd).__name__} {odd!r:.40}"
    return f"{type(value).__name__} {value!r:.40}"
