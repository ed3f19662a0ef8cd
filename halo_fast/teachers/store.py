"""Labels that were paid for: an SQLite file keyed by everything that an answer depends on."""

import json
import math
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from halo_fast.runs import UserError, hash_text
from halo_fast.teachers.base import RUBRIC, Label

__all__ = ["LabelStore", "label_key"]


def label_key(clip_hash: str, prompt: str, grid: tuple[int, int, int], teacher: str) -> str:
    """Key of a label: a hash of the clip's bytes (their own hash), prompt, rubric, grid and the teacher's name."""
    return hash_text(json.dumps([clip_hash, prompt, RUBRIC, list(grid), teacher]))


class LabelStore:
    """Keys and labels in one SQLite file; what `add` has returned from survives any kill. A context manager.

    Raises:
        UserError: the file is not a label store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path)
        try:
            with self._connection:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS labels"
                    " (key TEXT PRIMARY KEY, teacher TEXT NOT NULL, label TEXT NOT NULL)"
                )
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise UserError(f"{path}: expected a label store, got {error}; move the file away") from error

    def __enter__(self) -> "LabelStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def find(self, keys: Iterable[str]) -> dict[str, Label]:
        """The stored labels among `keys`."""
        found = {}
        for key in keys:
            row = self._connection.execute("SELECT label FROM labels WHERE key = ?", (key,)).fetchone()
            if row is not None:
                found[key] = _parse(row[0])
        return found

    def add(self, labels: Mapping[str, Label], teacher: str) -> None:
        """Store labels in one transaction; the first answer to a key stays."""
        rows = [(key, teacher, _format(label)) for key, label in labels.items()]
        with self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO labels VALUES (?, ?, ?)", rows)


def _format(label: Label) -> str:
    def scores(values: Iterable[float]) -> list[float | None]:
        return [None if math.isnan(value) else float(value) for value in values]

    video = dict(zip(label.video, scores(label.video.values()), strict=True))
    patches = {name: scores(values) for name, values in label.patches.items()}
    return json.dumps({"status": label.status, "video": video, "patches": patches}, sort_keys=True)


def _parse(text: str) -> Label:
    def score(value: float | None) -> float:
        return math.nan if value is None else value

    stored = json.loads(text)
    return Label(
        {name: score(value) for name, value in stored["video"].items()},
        {name: [score(value) for value in values] for name, values in stored["patches"].items()},
        stored["status"],
    )
