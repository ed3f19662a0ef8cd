"""Files that are whole or not there: atomic writes, tables, hashes, versions; and progress of long work."""

import csv
import hashlib
import io
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from halo_fast.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    import torch

__all__ = [
    "damaged",
    "hash_bytes",
    "hash_file",
    "hash_text",
    "progress",
    "read_json",
    "read_table",
    "replacing",
    "versions",
    "write_bytes",
    "write_csv",
    "write_json",
    "write_parquet",
    "write_safetensors",
]


Item = TypeVar("Item")

_PACKAGES = ("halo_fast", "torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "pyarrow", "av")


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as indented JSON to `path` atomically; NaN and infinity raise ValueError."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_csv(path: Path | str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write `rows` to `path` atomically, a column for every key in order of appearance, empty where a row has none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def write_parquet(path: Path | str, table: "pyarrow.Table") -> None:
    """Write a pyarrow table to `path` atomically."""
    import pyarrow.parquet

    with replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def write_safetensors(
    path: Path | str, tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors to `path` atomically; equal tensors and metadata give equal bytes."""
    from safetensors.torch import save

    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    if metadata:
        # safetensors orders metadata at random, so the header is put together here
        length = int.from_bytes(data[:8], "little")
        header = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(data[8 : 8 + length])
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    write_bytes(path, data)


def read_table(path: Path | str) -> "pyarrow.Table":
    """The parquet table at `path`.

    Raises:
        UserError: missing or damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(damaged(Path(path), error)) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object at `path`, None if there is no file; UserError if it is damaged."""
    try:
        value = json.loads(path.read_bytes())
        if not (isinstance(value, dict) and value):
            raise ValueError(f"expected an object, got {value!r}")
        return value
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(damaged(path, error)) from error


def damaged(path: Path, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    return f"{path}: missing or damaged ({reason}); delete {path.parent} and run `halo {path.parent.name}` again"


def hash_bytes(data: bytes) -> str:
    """SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def hash_text(text: str) -> str:
    """SHA-256 of `text` in UTF-8, in hexadecimal."""
    return hash_bytes(text.encode())


def hash_file(path: Path | str) -> str:
    """SHA-256 of the file's content in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def progress(iterable: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yield the items and report on stderr: a bar after two seconds, or without a terminal a line every 30 s."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, total=total, desc=label, delay=2, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for done, item in enumerate(iterable):
        now = time.monotonic()
        if done and now - last >= 30:
            last = now
            left = (now - start) / done * (total - done)
            print(f"{label}: {done}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)
        yield item
