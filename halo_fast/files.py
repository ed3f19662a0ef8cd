"""Files that are whole or not there: atomic writes, tables, hashes, versions; and progress of long work."""

import csv
import ctypes
import hashlib
import importlib
import io
import json
import math
import os
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from halo_fast.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow
    import torch

__all__ = [
    "damaged",
    "hash_bytes",
    "hash_file",
    "hash_tensors",
    "hash_text",
    "laid_out_like",
    "no_loading_bars",
    "progress",
    "read_checkpoint",
    "read_json",
    "read_table",
    "replacing",
    "return_freed_memory",
    "scratch_tensor",
    "versions",
    "write_bytes",
    "write_checkpoint",
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
    # machines that share a disk may have processes of one number
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def scratch_tensor(folder: Path | None, shape: Sequence[int], dtype: "torch.dtype") -> "torch.Tensor":
    """A tensor of zeros that lies in a file of a folder, so that it may be larger than memory.

    The file has no name, and is gone when the tensor or the process is.

    Args:
        folder: on a disk with enough room; None for a tensor in memory.
        shape: no side may be 0.
        dtype: of the numbers.
    """
    import torch

    if folder is None:
        return torch.zeros(*shape, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".scratch")
    os.close(handle)
    try:
        return torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(*shape)
    finally:
        Path(name).unlink()


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc).

    It keeps what large pieces leave between small ones that live on, so a loop over large pieces seems to need more
    and more.
    """
    if os.name != "posix":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def laid_out_like(part: "torch.Tensor", count: int, dtype: "torch.dtype", folder: Path | None = None) -> "torch.Tensor":
    """A tensor of zeros with `count` rows, in which a row lies as in `part`, by `scratch_tensor`.

    The order of axes in memory decides the order of random numbers, and the last bit of sums over channels.

    Args:
        part: [n, ...].
        count: of rows.
        dtype: of the numbers.
        folder: on whose disk it lies; None for a tensor in memory.
    """
    order = sorted(range(part.ndim), key=lambda axis: (axis > 0, -part.stride()[axis]))
    sides = [count, *(part.shape[axis] for axis in order[1:])]
    return scratch_tensor(folder, sides, dtype).permute(*map(order.index, range(part.ndim)))


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


def write_checkpoint(path: Path | str, tensors: Mapping[str, "torch.Tensor"], state: Mapping[str, Any]) -> None:
    """Write tensors and the rest of a training's state to one safetensors file, atomically.

    Args:
        path: the file.
        tensors: by name; any device and layout.
        state: whatever JSON can hold, kept in the file's metadata.
    """
    write_safetensors(path, tensors, {"state": json.dumps(state)})


def read_checkpoint(path: Path | str) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """The tensors, on the CPU, and the state that `write_checkpoint` wrote.

    Raises:
        UserError: the file is missing, damaged or no checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: missing or damaged checkpoint ({first_line(error)}); remove it to start again"
        ) from error


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
    """The message for a stage's file that cannot be read.

    Args:
        path: of the file, whose folder has the name of its stage.
        error: that reading it raised.
    """
    return (
        f"{path}: missing or damaged ({first_line(error)}); "
        f"delete {path.parent} and run `halo {path.parent.name}` again"
    )


def hash_bytes(data: bytes) -> str:
    """SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def hash_text(text: str) -> str:
    """SHA-256 of `text` in UTF-8, in hexadecimal."""
    return hash_bytes(text.encode())


def hash_tensors(*parts: str | Mapping[str, "torch.Tensor"]) -> str:
    """SHA-256 of texts and named tensors in the order given, in hexadecimal.

    Args:
        parts: texts, and tensors by name, which count with their names, dtypes, shapes and values; any device.
    """
    import torch

    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
            continue
        for name, tensor in part.items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


@contextmanager
def no_loading_bars(*packages: str) -> Iterator[None]:
    """Inside the block packages such as transformers and diffusers draw no bars for the files that they load."""
    logs = [importlib.import_module(f"{package}.utils.logging") for package in packages]
    enabled = [log for log in logs if log.is_progress_bar_enabled()]
    for log in enabled:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in enabled:
            log.enable_progress_bar()


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
