"""The run directory: one folder a stage, finished when its manifest stands, continued when it does not."""

import csv
import hashlib
import io
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from halo_fast.config import Config

if TYPE_CHECKING:
    import pyarrow
    import torch

__all__ = [
    "Run",
    "Stage",
    "UserError",
    "hash_bytes",
    "hash_file",
    "hash_text",
    "progress",
    "replacing",
    "versions",
    "write_bytes",
    "write_csv",
    "write_json",
    "write_parquet",
    "write_safetensors",
]

Item = TypeVar("Item")

_MANIFEST = "manifest.json"
_PENDING = "pending.json"
_PACKAGES = ("halo_fast", "torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "pyarrow", "av")


class UserError(Exception):
    """A mistake of the user in one line: the argument or file, what was expected, what came and what to do."""


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


class Run:
    """A run directory.

    Args:
        config: settings of the run; `config.output_dir` is the directory, made when a stage starts.
        force: empty every stage's folder before it starts.
    """

    def __init__(self, config: Config, force: bool = False) -> None:
        self.config = config
        self.force = force
        self.path = Path(config.output_dir)

    def stage(self, name: str, settings: Mapping[str, Any] | object, inputs: Mapping[str, Path | str]) -> "Stage":
        """The stage `name`, to be entered with `with`.

        Args:
            name: folder in the run directory, and verb of the command line.
            settings: dict or dataclass of everything that decides the output besides the inputs.
            inputs: files and folders (Path) by content, anything else (str) as text.
        """
        return Stage(self, name, settings, inputs)

    def require(self, path: str) -> Path:
        """A file or folder of the run directory by its relative path; UserError if its stage has not finished."""
        found = self.path / path
        stage = Path(path).parts[0]
        if not (self.path / stage / _MANIFEST).exists() or not found.exists():
            raise UserError(f"{found}: not there or unfinished; run `halo {stage}` with this config first")
        return found


class Stage:
    """One stage of a run; a context manager whose body returns at once if `done` and else ends with `finish`.

        with run.stage("score", config.score, {"clips": run.require("generate")}) as stage:
            if stage.done:
                return
            ...  # write into stage.folder, skipping what is there already
            stage.finish({"clips": 192})

    Partial work of the same settings and inputs stays in the folder and is continued. Other settings, or another input
    from outside (a prompt file, a model), raise UserError; another input out of the run directory redoes the stage.
    """

    def __init__(
        self, run: Run, name: str, settings: Mapping[str, Any] | object, inputs: Mapping[str, Path | str]
    ) -> None:
        self.run = run
        self.name = name
        self.folder = run.path / name
        self.done = False
        self._key = {
            "settings": _plain(settings),
            "inputs": {label: _hash_input(label, value) for label, value in inputs.items()},
        }
        self._inner = {
            label
            for label, value in inputs.items()
            if isinstance(value, Path) and value.resolve().is_relative_to(run.path.resolve())
        }
        self._started = ""

    def __enter__(self) -> "Stage":
        for discarded in self.run.path.glob(f".{self.name}.discarded.*"):
            shutil.rmtree(discarded)
        known = self._read(_MANIFEST) or self._read(_PENDING)
        if known is None and self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder}: holds files that no stage has written; choose another output_dir")
        if known and (self.run.force or self._outdated(known)):
            self._discard()
            known = None
        if known and (self.folder / _MANIFEST).exists():
            damaged = [path for path, output in known["outputs"].items() if not _intact(self.folder / path, output)]
            self.done = not damaged
            if self.done:
                print(f"{self.name}: finished before, kept ({self.folder})", file=sys.stderr)
                return self
            print(f"{self.name}: {damaged[0]} is gone or cut short, made again", file=sys.stderr)
            for path in damaged:
                (self.folder / path).unlink(missing_ok=True)
        self._started = known["started"] if known else _now()
        write_json(self.folder / _PENDING, {**self._key, "started": self._started})
        (self.folder / _MANIFEST).unlink(missing_ok=True)
        for leftover in self.folder.rglob(".*.tmp"):
            leftover.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self.done:
            raise RuntimeError(f"stage {self.name} ended without finish()")

    def finish(self, counts: Mapping[str, int | float]) -> None:
        """Write the manifest, a stage's last act: settings, hashes of inputs and outputs, counts, versions, times."""
        outputs = {
            path.relative_to(self.folder).as_posix(): {"sha256": hash_file(path), "bytes": path.stat().st_size}
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.relative_to(self.folder).as_posix() not in (_MANIFEST, _PENDING)
        }
        manifest = {
            "stage": self.name,
            **self._key,
            "outputs": outputs,
            "counts": dict(counts),
            "versions": versions(),
            "started": self._started,
            "finished": _now(),
        }
        write_json(self.folder / _MANIFEST, manifest)
        (self.folder / _PENDING).unlink()
        self.done = True
        rounded = {
            label.replace("_", " "): f"{value:.3g}" if isinstance(value, float) else value
            for label, value in counts.items()
        }
        told = ", ".join(f"{value} {label}" for label, value in rounded.items())
        print(f"{self.name}: finished, {told or 'nothing to count'} ({self.folder})", file=sys.stderr)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not JSON ({error}); delete {self.folder} or choose another output_dir") from None

    def _outdated(self, known: dict[str, Any]) -> bool:
        """Whether an earlier stage was redone since; UserError if settings or outside files differ."""
        cure = "pass --force to redo the stage, or choose another output_dir"
        before, now = _flat(known["settings"]), _flat(self._key["settings"])
        for name in [*now, *before]:
            if before.get(name, "unset") != now.get(name, "unset"):
                was, wanted = before.get(name, "unset"), now.get(name, "unset")
                raise UserError(f"{self.folder}: was made with {name} = {was}, now it is {wanted}; {cure}")
        before, now = known["inputs"], self._key["inputs"]
        changed = [name for name in [*now, *before] if before.get(name) != now.get(name)]
        for name in changed:
            if name not in self._inner:
                raise UserError(f"{self.folder}: was made from other {name}; {cure}")
        if changed:
            print(f"{self.name}: {changed[0]} changed since, made again", file=sys.stderr)
        return bool(changed)

    def _discard(self) -> None:
        # renamed first: a kill in the middle of deleting must not leave what looks like partial work
        discarded = self.run.path / f".{self.name}.discarded.{os.getpid()}"
        self.folder.rename(discarded)
        shutil.rmtree(discarded)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(settings: Mapping[str, Any] | object) -> Any:
    """The settings as JSON gives them back, so that tuples and lists compare equal."""
    value = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings
    return json.loads(json.dumps(value, allow_nan=False))


def _flat(value: object, name: str = "") -> dict[str, object]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {key: leaf for part in value for key, leaf in _flat(value[part], f"{name}.{part}" if name else part).items()}


def _intact(path: Path, output: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == output["bytes"]


def _hash_input(label: str, value: Path | str) -> str:
    if isinstance(value, str):
        return hash_text(value)
    if value.is_file():
        return hash_file(value)
    if not value.is_dir():
        raise UserError(f"{label}: {value} does not exist; expected a file or folder")
    manifest = value / _MANIFEST
    if manifest.exists():
        outputs = json.loads(manifest.read_text())["outputs"]
        return hash_text(json.dumps({path: output["sha256"] for path, output in outputs.items()}, sort_keys=True))
    files = {path.relative_to(value).as_posix(): hash_file(path) for path in sorted(value.rglob("*")) if path.is_file()}
    return hash_text(json.dumps(files, sort_keys=True))
