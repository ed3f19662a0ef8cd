"""The run directory: a folder for each stage, finished once its manifest is written, continued until then."""

import errno
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock

from halo_fast import processes
from halo_fast.data.tables import PART
from halo_fast.errors import UserError
from halo_fast.files import hash_file, hash_text, read_json, versions, write_json
from halo_fast.pipeline.config import Config, round_config
from halo_fast.pipeline.hashes import MANIFEST, changed_outputs, hash_folder, hash_outputs, read_manifest

__all__ = ["Run", "Stage", "round_folders"]

logger = logging.getLogger(__name__)

_PENDING = "pending.json"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
_ROUND = "round_"


class Run:
    """A run directory, or one of its later rounds, whose folder is laid out in the same way.

    Args:
        config: settings of the run; `config.output_dir` is the directory, made when a stage starts.
        force: whether every stage is made again; None for a command that has no such option.
        number: of the round. The stages of the first are in the directory itself, those of round 2 in its folder
            round_2.

    Attributes:
        config: settings of this round.
        root: the run directory.
        path: folder of the round's stages.
        rounds: the rounds up to this one, the first one first.
        planned: the stages that follow one another, in order, so that each can say where it stands; none by itself.
    """

    def __init__(self, config: Config, force: bool | None = False, number: int = 1) -> None:
        self.config = round_config(config, number)
        self.force = force
        self.root = Path(config.output_dir)
        self.path = self.root if number == 1 else self.root / f"{_ROUND}{number}"
        self.rounds: list[Run] = [*(Run(config, force, number - 1).rounds if number > 1 else []), self]
        self.planned: Sequence[str] = ()

    @property
    def number(self) -> int:
        """Of the round, from 1."""
        return len(self.rounds)

    @property
    def draw(self) -> int:
        """Seed of what each round draws anew."""
        return self.config.seed + self.number - 1

    @property
    def option(self) -> str:
        """What names the round on the command line, for messages; empty for the first."""
        return f" --round {self.number}" if self.number > 1 else ""

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any] | object,
        inputs: Mapping[str, Path | str],
        derived: bool = False,
        changeable: Sequence[str] = (),
    ) -> "Stage":
        """The stage `name`, to be entered with `with`.

        Args:
            name: of the stage's folder and of its command.
            settings: dict or dataclass of everything that decides the output besides the inputs.
            inputs: files and folders (Path), compared by content, and texts (str), compared as they are.
            derived: whether it costs next to nothing, so that whatever differs has it made again instead of refused.
            changeable: names of settings that may change, because the output does not depend on them.
        """
        return Stage(self, name, settings, inputs, derived, changeable)

    def require(self, path: str) -> Path:
        """A file or folder of a finished stage that was made with this config.

        Args:
            path: relative to the run directory.

        Raises:
            UserError: the stage is unfinished, was made with other settings, or its input has changed since.
        """
        return self._require(path, set())

    def _require(self, path: str, checked: set[Path]) -> Path:
        """As `require`; stages in `checked` are not looked at again, and those that are looked at are added."""
        found = self.path / path
        if not processes.is_first():  # which has checked it, or ends the run
            return processes.seen(found)
        name = Path(path).parts[0]
        manifest = read_manifest(self.path / name)
        if manifest is None or not found.exists():
            raise UserError(f"{found}: not there or unfinished; run `{self._command(name)}` with this config first")
        if self.path / name in checked:
            return found
        checked.add(self.path / name)
        # The training of another network, such as Wan 2.2's other expert, has settings of its own.
        other = name.startswith("train") and manifest["settings"].get("network") != self.config.train.network
        settings = {} if other else manifest["settings"]
        changeable = manifest.get("changeable", ())
        for setting, old, new in _differences(*self._compared(name, settings)):
            if setting.partition(".")[0] in changeable:
                continue
            raise UserError(
                f"{self.path / name}: was made with {setting} = {old}, now it is {new}; give the "
                f"setting it was made with, or redo it with `{self._command(name)} --force`"
            )
        for label, source in manifest.get("sources", {}).items():
            owner, part = self.owner(source)
            if self.input_hash(label, owner._require(part, checked)) != manifest["inputs"][label]:
                raise UserError(
                    f"{self.path / name}: {source} changed since it was made; run `{self._command(name)}` again"
                )
        return found

    def owner(self, source: str) -> tuple["Run", str]:
        """The round that made a file or folder, and its path within the folder of that round.

        Args:
            source: relative to the run directory.
        """
        first, _, rest = source.partition("/")
        return next(((one, rest) for one in self.rounds[1:] if one.path.name == first), (self.rounds[0], source))

    def input_hash(self, label: str, value: Path | str) -> str:
        """The hash of an input: of a text, of a file, of a finished stage's outputs, or of all files of a folder.

        Args:
            label: names the input in errors.
            value: a text, or a file or folder (Path) that exists.
        """
        if isinstance(value, str):
            return hash_text(value)
        if value.is_file():
            return hash_file(value)
        manifest = read_manifest(value)
        if manifest is not None and "outputs" in manifest:
            outputs = manifest["outputs"]
            return hash_text(json.dumps({path: output["sha256"] for path, output in outputs.items()}, sort_keys=True))
        return hash_folder(value, self.root / f".{hash_text(str(value.resolve()))[:16]}.hashes.json", label)

    def _command(self, stage: str) -> str:
        """What makes a stage again: that of train_transformer_2 is `halo train`."""
        return f"halo {stage.partition('_')[0]}{self.option}"

    def _compared(self, name: str, before: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings that stage `name` keeps and this config has: as they were kept, and as they are here."""
        # the stage train_transformer_2 has the settings of train
        section = getattr(self.config, name, None) or getattr(self.config, name.partition("_")[0], None)
        owners = {key: owner for key in before for owner in (self.config, section) if hasattr(owner, key)}
        old, new = {}, {}
        for key, value in ((key, getattr(owner, key)) for key, owner in owners.items()):
            old[key], new[key] = before[key], _as_json(value)
            # a stage may keep a part of a section; what a user names freely, such as pairs.dimensions, it keeps whole
            if not isinstance(value, dict):
                old[key], new[key] = _part(old[key], new[key]), _part(new[key], old[key])
        return old, new


def round_folders(run: Path) -> list[Path]:
    """The folders of a run's rounds, the first being the run directory itself; only those that were begun.

    Args:
        run: the run directory.
    """
    numbers = [path.name.removeprefix(_ROUND) for path in run.glob(f"{_ROUND}*") if path.is_dir()]
    return [run, *(run / f"{_ROUND}{number}" for number in sorted(map(int, filter(str.isdecimal, numbers))))]


class Stage:
    """One stage of a run, as a context manager.

        with run.stage("score", config.score, {"clips": run.require("generate")}) as stage:
            if stage.done:
                return
            ...  # write into stage.folder, skipping what exists already
            stage.finish({"clips": 192})

    Unfinished work of the same settings and inputs is continued. Other settings are refused, as are other inputs that
    no stage made (a prompt file, a model). If an earlier stage has changed, the stage is made again. The
    old folder is kept until the new one is finished, and a mistake found before anything was written changes nothing.
    One command at a time may work on a stage. Of its processes the first one alone makes the folder ready, and finishes
    the stage; the others leave the block when it is finished.

    Attributes:
        folder: where the stage writes.
        done: whether the stage is finished.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        settings: Mapping[str, Any] | object,
        inputs: Mapping[str, Path | str],
        derived: bool = False,
        changeable: Sequence[str] = (),
    ) -> None:
        self.run = run
        self._derived, self._changeable = derived, changeable
        self.name = name
        self.folder = run.path / name
        self.done = False
        self._title = name if run.number == 1 else f"{run.path.name}/{name}"
        self._settings, self._inputs = settings, inputs
        self._key: dict[str, Any] = {}
        self._sources = {
            label: value.resolve().relative_to(run.root.resolve()).as_posix()
            for label, value in inputs.items()
            if isinstance(value, Path) and _is_made(value, run)
        }
        self._old = run.path / f".{name}.old"
        self._started = ""
        # released by the operating system when a process is killed
        self._lock: filelock.BaseFileLock = filelock.FileLock(run.path / f".{name}.lock", timeout=0)

    def __enter__(self) -> "Stage":
        self.done = processes.by_first(self._begin)
        if not self.done:
            processes.seen(self.folder / _PENDING)
        return self

    def _begin(self) -> bool:
        """Check inputs, lock the stage and make its folder ready; whether it is done."""
        for label, value in self._inputs.items():
            if isinstance(value, Path) and not value.exists():
                raise UserError(f"{label}: {value} does not exist; expected a file or folder")
        try:
            self.run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir: {self.run.path}: {error.strerror}; choose another") from error
        inputs = {label: self.run.input_hash(label, value) for label, value in self._inputs.items()}
        self._key = {"settings": _as_json(self._settings), "inputs": inputs}
        self._acquire()
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        return self.done

    def _acquire(self) -> None:
        """Lock the stage, with a file that stands for a lock where the file system has none."""
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{self.folder}: another process is working on it; wait for that one, or choose another output_dir. "
                f"If none is, remove {self._lock.lock_file}"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS or isinstance(self._lock, filelock.SoftFileLock):
                raise
            self._lock = filelock.SoftFileLock(f"{self._lock.lock_file}ed", timeout=0)
            self._acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not processes.is_first():
            if kind is None:
                processes.wait()
                self.done = True
            return
        try:
            if kind is None and not self.done:
                raise RuntimeError(f"stage {self.name} ended without finish()")
            if kind is not None and not self.done and not self._written():
                (self.folder / _PENDING).unlink(missing_ok=True)
                shutil.rmtree(self.folder, ignore_errors=True)
                if self._old.exists():
                    self._old.rename(self.folder)
        finally:
            self._lock.release()
        if kind is None:
            processes.wait()

    def finish(self, counts: Mapping[str, int | float]) -> None:
        """Write the manifest: settings, hashes of inputs and outputs, counts, versions and times.

        Args:
            counts: what the stage made; kept in the manifest and logged.
        """
        own = [self.folder / MANIFEST, self.folder / _PENDING]
        files = sorted(
            path for path in self.folder.rglob("*") if path.is_file() and path not in own and path.suffix != PART
        )
        outputs = hash_outputs(self.folder, files)
        manifest = {
            "stage": self.name,
            **self._key,
            "sources": self._sources,
            **({"changeable": list(self._changeable)} if self._changeable else {}),
            "outputs": outputs,
            "counts": dict(counts),
            "versions": versions(),
            "started": self._started,
            "finished": _now(),
        }
        write_json(self.folder / MANIFEST, manifest)
        (self.folder / _PENDING).unlink()
        for part in self.folder.glob(f".*{PART}"):
            part.unlink()
        shutil.rmtree(self._old, ignore_errors=True)
        self.done = True
        summary = ", ".join(
            f"{f'{value:.3g}' if isinstance(value, float) else value} {label.replace('_', ' ')}"
            for label, value in counts.items()
        )
        logger.info("%s: finished, %s (%s)", self._title, summary or "nothing to count", self.folder)

    def _prepare(self) -> None:
        """Find out whether the stage is done, and make its folder ready for work if it is not."""
        earlier = self._earlier_record()
        if earlier and (self.run.force or self._outdated(earlier)):
            self._set_aside()
            earlier = None
        if earlier and (self.folder / MANIFEST).exists():
            self.done = self._intact(earlier["outputs"])
            if self.done:
                logger.info("%s: finished before, kept (%s)", self._title, self.folder)
                return
        for source in self._sources.values():
            self._check_outputs(source)
        self._started = earlier["started"] if earlier else _now()
        write_json(self.folder / _PENDING, {**self._key, "started": self._started})
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for leftover in self.folder.rglob(".*.tmp"):
            leftover.unlink()
        logger.info("%s: %s (%s)", self._title, "goes on" if earlier else "begins", self._standing())

    def _standing(self) -> str:
        """Which of the planned stages this is, or else its folder."""
        planned = list(self.run.planned)
        name = self.name.partition("_")[0]  # train_transformer_2 takes the place of train
        return f"stage {planned.index(name) + 1} of {len(planned)}" if name in planned else str(self.folder)

    def _earlier_record(self) -> dict[str, Any] | None:
        """The manifest, or the notes of unfinished work; None if the folder is empty."""
        earlier = read_json(self.folder / MANIFEST)
        if earlier is None and self._written():
            earlier = read_json(self.folder / _PENDING)
            if earlier is None:
                raise UserError(f"{self.folder}: holds files that no stage has written; choose another output_dir")
        return earlier

    def _outdated(self, earlier: dict[str, Any]) -> bool:
        """Whether an earlier stage has changed.

        Raises:
            UserError: the settings, or inputs that no stage made, differ.
        """
        offered = "" if self.run.force is None else "pass --force to redo the stage, or "
        cure = f"{offered}choose another output_dir"
        for name, old, new in _differences(earlier["settings"], self._key["settings"]):
            if name.partition(".")[0] in self._changeable:
                continue
            if self._derived:
                return self._made_again(name)
            raise UserError(f"{self.folder}: was made with {name} = {old}, now it is {new}; {cure}")
        before, now = earlier["inputs"], self._key["inputs"]
        changed = [name for name in [*now, *before] if before.get(name) != now.get(name)]
        for name in changed:
            if name not in self._sources and not self._derived:
                raise UserError(f"{self.folder}: was made from other {name}; {cure}")
        return self._made_again(changed[0]) if changed else False

    def _made_again(self, changed: str) -> bool:
        logger.info("%s: %s changed since, made again", self._title, changed)
        return True

    def _set_aside(self) -> None:
        """Keep finished work until the new is finished, and drop unfinished work."""
        discarded = self.run.path / f".{self.name}.discarded"
        shutil.rmtree(discarded, ignore_errors=True)
        # Rename first: a kill during deletion must not leave a folder that looks unfinished.
        if self._old.exists():
            older = self._old if (self.folder / MANIFEST).exists() else self.folder
            older.rename(discarded)
            shutil.rmtree(discarded)
        if self.folder.exists():
            self.folder.rename(self._old)

    def _intact(self, outputs: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether all outputs exist at their size; those cut short are removed."""
        damaged = [
            path
            for path, output in outputs.items()
            if not (self.folder / path).is_file() or (self.folder / path).stat().st_size != output["bytes"]
        ]
        for path in damaged:
            (self.folder / path).unlink(missing_ok=True)
        if damaged:
            logger.warning("%s: %s is gone or cut short, made again", self._title, damaged[0])
        return not damaged

    def _written(self) -> list[Path]:
        """The files in the folder besides the manifest and the notes."""
        return [path for path in self.folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, _PENDING)]

    def _check_outputs(self, source: str) -> None:
        """Look for damage in an earlier stage's files, so that none is passed on.

        Raises:
            UserError: a file is gone or has other content.
        """
        owner, path = self.run.owner(source)
        stage = owner.path / Path(path).parts[0]
        part = Path(path).relative_to(stage.name).as_posix()
        for changed in changed_outputs(stage, part, f"{self.name}: checking {source}"):
            raise UserError(
                f"{changed}: damaged since it was made; delete it and run `halo {stage.name}{owner.option}`"
            )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _part(value: Any, known: Any) -> Any:
    """What a value has of the names that a known one has."""
    if not (isinstance(value, dict) and isinstance(known, dict)):
        return value
    return {name: _part(value[name], one) for name, one in known.items() if name in value}


def _is_made(path: Path, run: Run) -> bool:
    """Whether a stage of the run made it; a prompt file or a model may lie in the run directory too."""
    root, place = run.root.resolve(), path.resolve()
    if place == root or not place.is_relative_to(root):
        return False
    owner, part = run.owner(place.relative_to(root).as_posix())
    return bool(part) and read_manifest(owner.path / Path(part).parts[0]) is not None


def _as_json(settings: Mapping[str, Any] | object) -> Any:
    """The settings as JSON returns them, so that tuples and lists compare equal; infinity, which it lacks, as text."""
    value = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings
    return json.loads(json.dumps(_without_infinity(value), allow_nan=False))


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(one) for one in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    """Dotted name, old and new value of each setting that differs."""
    old, new = _flatten(dict(before)), _flatten(dict(now))
    for name in dict.fromkeys([*new, *old]):
        if old.get(name, "unset") != new.get(name, "unset"):
            yield name, old.get(name, "unset"), new.get(name, "unset")


def _flatten(value: object, name: str = "") -> dict[str, object]:
    """Nested settings as one dict with dotted names."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {
        key: leaf for part in value for key, leaf in _flatten(value[part], f"{name}.{part}" if name else part).items()
    }
