"""The run directory: one folder a stage, finished when its manifest stands, continued when it does not."""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from halo_fast.errors import UserError
from halo_fast.files import hash_file, hash_text, progress, read_json, versions, write_json
from halo_fast.pipeline.config import Config

if TYPE_CHECKING:
    pass

__all__ = [
    "Run",
    "Stage",
    "UserError",
    "hash_file",
    "hash_text",
    "progress",
    "versions",
    "write_json",
]


_MANIFEST = "manifest.json"
_PENDING = "pending.json"


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
        """A file or folder of the run directory by its relative path, out of a finished stage of this very config.

        Raises:
            UserError: the stage has not finished, was made with other settings, or an earlier one changed since.
        """
        found = self.path / path
        name = Path(path).parts[0]
        manifest = read_json(self.path / name / _MANIFEST)
        if manifest is None or not found.exists():
            raise UserError(f"{found}: not there or unfinished; run `halo {name}` with this config first")
        was, wanted = _flat(manifest["settings"]), self._settings(name, manifest["settings"])
        for setting in [setting for setting in was if wanted.get(setting, was[setting]) != was[setting]]:
            raise UserError(
                f"{self.path / name}: was made with {setting} = {was[setting]}, now it is {wanted[setting]}; give the "
                f"setting it was made with, or redo it with `halo {name} --force`"
            )
        for label, source in manifest.get("sources", {}).items():
            if _hash_input(label, self.require(source)) != manifest["inputs"][label]:
                raise UserError(f"{self.path / name}: {source} changed since it was made; run `halo {name}` again")
        return found

    def _settings(self, name: str, keys: Iterable[str]) -> dict[str, object]:
        """What this config says under the names by which stage `name` keeps its settings."""
        section = getattr(self.config, name, None)
        owners = {key: owner for key in keys for owner in (self.config, section) if hasattr(owner, key)}
        return _flat({key: _plain(getattr(owner, key)) for key, owner in owners.items()})


class Stage:
    """One stage of a run; a context manager whose body returns at once if `done` and else ends with `finish`.

        with run.stage("score", config.score, {"clips": run.require("generate")}) as stage:
            if stage.done:
                return
            ...  # write into stage.folder, skipping what is there already
            stage.finish({"clips": 192})

    Partial work of the same settings and inputs stays in the folder and is continued. Other settings, or another input
    from outside (a prompt file, a model), raise UserError; another input out of the run directory redoes the stage.
    What is made again replaces the old only when it is finished, and a mistake found before anything was written
    changes nothing. One process at a time may work on a stage.
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
        self._sources = {
            label: value.resolve().relative_to(run.path.resolve()).as_posix()
            for label, value in inputs.items()
            if isinstance(value, Path) and value.resolve().is_relative_to(run.path.resolve())
        }
        self._old = run.path / f".{name}.old"
        self._started = ""
        self._lock = -1

    def __enter__(self) -> "Stage":
        try:
            self.run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir: {self.run.path}: {error.strerror}; choose another") from error
        self._lock = os.open(self.run.path / f".{self.name}.lock", os.O_CREAT | os.O_RDWR, 0o666)
        try:
            self._take_lock()
            self._prepare()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self.done:
                raise RuntimeError(f"stage {self.name} ended without finish()")
            if kind is not None and not self.done and not self._files():
                (self.folder / _PENDING).unlink(missing_ok=True)
                shutil.rmtree(self.folder, ignore_errors=True)
                if self._old.exists():
                    self._old.rename(self.folder)
        finally:
            os.close(self._lock)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.folder}: another process is working on it; wait for that one, or choose another output_dir"
            ) from None

    def _prepare(self) -> None:
        known = read_json(self.folder / _MANIFEST)
        if known is None and self._files():
            known = read_json(self.folder / _PENDING)
            if known is None:
                raise UserError(f"{self.folder}: holds files that no stage has written; choose another output_dir")
        if known and (self.run.force or self._outdated(known)):
            self._set_aside()
            known = None
        if known and (self.folder / _MANIFEST).exists():
            damaged = [path for path, output in known["outputs"].items() if not _intact(self.folder / path, output)]
            self.done = not damaged
            if self.done:
                print(f"{self.name}: finished before, kept ({self.folder})", file=sys.stderr)
                return
            print(f"{self.name}: {damaged[0]} is gone or cut short, made again", file=sys.stderr)
            for path in damaged:
                (self.folder / path).unlink(missing_ok=True)
        for source in self._sources.values():
            self._check(source)
        self._started = known["started"] if known else _now()
        write_json(self.folder / _PENDING, {**self._key, "started": self._started})
        (self.folder / _MANIFEST).unlink(missing_ok=True)
        for leftover in self.folder.rglob(".*.tmp"):
            leftover.unlink()

    def _set_aside(self) -> None:
        """Keep finished work until the new is finished; drop unfinished work that stands beside some."""
        discarded = self.run.path / f".{self.name}.discarded"
        shutil.rmtree(discarded, ignore_errors=True)
        # renamed first: a kill in the middle of deleting must not leave what looks like partial work
        if self._old.exists():
            older = self._old if (self.folder / _MANIFEST).exists() else self.folder
            older.rename(discarded)
            shutil.rmtree(discarded)
        if self.folder.exists():
            self.folder.rename(self._old)

    def _files(self) -> list[Path]:
        """What the folder holds besides the stage's own notes."""
        return [path for path in self.folder.rglob("*") if path.is_file() and path.name not in (_MANIFEST, _PENDING)]

    def _check(self, source: str) -> None:
        """Compare the files of an earlier stage with their hashes, so that no damage is carried on."""
        stage = self.run.path / Path(source).parts[0]
        outputs = (read_json(stage / _MANIFEST) or {"outputs": {}})["outputs"]
        inside = {
            path: output for path, output in outputs.items() if (stage / path).is_relative_to(self.run.path / source)
        }
        for path, output in progress(inside.items(), len(inside), f"{self.name}: checking {source}"):
            if not (stage / path).is_file() or hash_file(stage / path) != output["sha256"]:
                raise UserError(f"{stage / path}: damaged since it was made; delete it and run `halo {stage.name}`")

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
            "sources": self._sources,
            "outputs": outputs,
            "counts": dict(counts),
            "versions": versions(),
            "started": self._started,
            "finished": _now(),
        }
        write_json(self.folder / _MANIFEST, manifest)
        (self.folder / _PENDING).unlink()
        shutil.rmtree(self._old, ignore_errors=True)
        self.done = True
        rounded = {
            label.replace("_", " "): f"{value:.3g}" if isinstance(value, float) else value
            for label, value in counts.items()
        }
        told = ", ".join(f"{value} {label}" for label, value in rounded.items())
        print(f"{self.name}: finished, {told or 'nothing to count'} ({self.folder})", file=sys.stderr)

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
            if name not in self._sources:
                raise UserError(f"{self.folder}: was made from other {name}; {cure}")
        if changed:
            print(f"{self.name}: {changed[0]} changed since, made again", file=sys.stderr)
        return bool(changed)


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
    manifest = read_json(value / _MANIFEST)
    if manifest is not None and "outputs" in manifest:
        outputs = manifest["outputs"]
        return hash_text(json.dumps({path: output["sha256"] for path, output in outputs.items()}, sort_keys=True))
    files = {path.relative_to(value).as_posix(): hash_file(path) for path in sorted(value.rglob("*")) if path.is_file()}
    return hash_text(json.dumps(files, sort_keys=True))
