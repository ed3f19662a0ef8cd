"""Hashes of a run's files, made once: afterwards size and time stamp stand for the content, until `halo verify`."""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from halo_fast.errors import UserError
from halo_fast.files import hash_file, hash_text, progress, read_json, write_json

__all__ = ["MANIFEST", "changed_outputs", "hash_folder", "hash_outputs", "read_manifest", "verify"]

MANIFEST = "manifest.json"


def read_manifest(stage: Path) -> dict[str, Any] | None:
    """The manifest of a stage, which nobody may change; None if there is none.

    That of 100,000 files takes half a second to read, so it is read again only where the file is another.

    Args:
        stage: the stage's folder.
    """
    path = stage / MANIFEST
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _read(path, status.st_ino, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, *_: int) -> dict[str, Any] | None:
    return read_json(path)


def hash_outputs(stage: Path, files: list[Path]) -> dict[str, dict[str, str | int]]:
    """Hash and size of each file of a stage that is about to finish, by its path in the folder.

    Args:
        stage: folder of the stage.
        files: in it.
    """
    outputs: dict[str, dict[str, str | int]] = {}
    stamps = {}
    for path in progress(files, len(files), f"{stage.name}: hashing"):
        name, stamp = path.relative_to(stage).as_posix(), _stamp(path)
        outputs[name], stamps[name] = {"sha256": hash_file(path), "bytes": stamp[0]}, stamp
    _stamp_file(stage).unlink(missing_ok=True)
    if stamps:
        write_json(_stamp_file(stage), stamps)
    return outputs


def changed_outputs(stage: Path, part: str, label: str, read_all: bool = False) -> list[Path]:
    """The files of a finished stage that are gone or have other content than its manifest says.

    A file whose size and time stamp are still those of its making is not read. Others are: a copied run is read once.

    Args:
        stage: folder of the stage.
        part: a file or folder in it, "." for all; nothing else is looked at.
        label: of the progress.
        read_all: whether time stamps are not trusted.
    """
    outputs = (read_manifest(stage) or {"outputs": {}})["outputs"]
    stamps = read_json(_stamp_file(stage)) or {}
    names = [name for name in outputs if part == "." or name == part or name.startswith(f"{part}/")]
    changed, read = [], {}
    for name in progress(names, len(names), label):
        path = f"{stage}/{name}"  # a text: a Path for each of 100,000 files takes a second
        try:
            stamp = _stamp(path)
        except OSError:
            changed.append(Path(path))
            continue
        if stamps.get(name) == stamp and not read_all:
            continue
        if stamp[0] == outputs[name]["bytes"] and hash_file(path) == outputs[name]["sha256"]:
            read[name] = stamp
        else:
            changed.append(Path(path))
    if any(stamps.get(name) != stamp for name, stamp in read.items()):
        write_json(_stamp_file(stage), stamps | read)
    return changed


def hash_folder(folder: Path, book: Path, label: str) -> str:
    """The hash of all files of a folder, such as a model's; a file is read again only if it has changed.

    Args:
        folder: of any origin.
        book: file where the hashes are kept; nothing is kept while its folder does not exist.
        label: of the progress.
    """
    kept = read_json(book) or {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    known = {}
    for path in progress(files, len(files), f"{label}: hashing {folder}"):
        name, stamp = path.relative_to(folder).as_posix(), _stamp(path)
        same = kept.get(name, {}).get("stamp") == stamp
        known[name] = {"stamp": stamp, "sha256": kept[name]["sha256"] if same else hash_file(path)}
    if known and known != kept and book.parent.is_dir():
        write_json(book, known)
    return hash_text(json.dumps({name: entry["sha256"] for name, entry in known.items()}, sort_keys=True))


def verify(run: Path) -> str:
    """Read every file of every finished stage, of later rounds too, and compare it with the hash in the manifest.

    Args:
        run: a run directory.

    Raises:
        UserError: no finished stage, or files that are gone or have other content; all are named.
    """
    stages = [path.parent for pattern in ("*", "round_*/*") for path in sorted(run.glob(f"{pattern}/{MANIFEST}"))]
    if not stages:
        raise UserError(f"{run}: expected a run directory with finished stages")
    changed = [path for stage in stages for path in changed_outputs(stage, ".", f"verify: {stage.name}", True)]
    if changed:
        names = ", ".join(str(path.relative_to(run)) for path in changed)
        raise UserError(
            f"{run}: {len(changed)} files are gone or differ from their hashes: {names}; delete them and run their "
            "stages again"
        )
    counts = [(stage.relative_to(run).as_posix(), (read_json(stage / MANIFEST) or {})["outputs"]) for stage in stages]
    return "\n".join(
        f"{name:<20}{len(outputs):>8} files {sum(output['bytes'] for output in outputs.values()):>16,} bytes, intact"
        for name, outputs in counts
    )


def _stamp(path: Path | str) -> list[int]:
    """Size in bytes and time of the last change in nanoseconds."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def _stamp_file(stage: Path) -> Path:
    """Where the stamps of a stage's files are: beside its folder, because they differ from copy to copy."""
    return stage.with_name(f".{stage.name}.stamps.json")
