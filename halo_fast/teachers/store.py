"""Labels, requests and spending in an SQLite file, keyed by everything that an answer depends on."""

import json
import math
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from halo_fast.errors import UserError
from halo_fast.files import hash_text
from halo_fast.teachers.rubric import RUBRIC, Label

__all__ = ["Edit", "LabelStore", "Reply", "StoreBusyError", "label_key"]

_PATIENCE = 10.0  # seconds that a statement waits for other processes
_PAGE = 1 << 16  # bytes; a disk with less is full
_RESERVE = 2 << 20  # bytes that are kept free for answers under way when the disk is full

_SCHEMA = """
CREATE TABLE IF NOT EXISTS labels (key TEXT PRIMARY KEY, teacher TEXT NOT NULL, label TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, teacher TEXT NOT NULL, judgement TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY, question TEXT NOT NULL, teacher TEXT NOT NULL, batch TEXT,
    status TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', text TEXT NOT NULL DEFAULT '', model TEXT,
    input_tokens INTEGER, output_tokens INTEGER, dollars REAL NOT NULL);
CREATE INDEX IF NOT EXISTS requests_of_question ON requests (question);
CREATE TABLE IF NOT EXISTS edits (
    key TEXT PRIMARY KEY, clip TEXT NOT NULL, grid TEXT NOT NULL, rubric TEXT NOT NULL, version TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS batches (key TEXT PRIMARY KEY, id TEXT, ended INTEGER NOT NULL DEFAULT 0);
"""


def label_key(clip_hash: str, prompt: str, grid: tuple[int, int, int], teacher: str) -> str:
    """Key of a label: a hash of the clip's bytes (their own hash), prompt, rubric, grid and the teacher's name."""
    return hash_text(json.dumps([clip_hash, prompt, RUBRIC, list(grid), teacher]))


class Edit(NamedTuple):
    """What a person's label is about, by hashes of clip and rubric and by the grid, and the label's version."""

    clip: str
    grid: str
    rubric: str
    version: str


@dataclass(frozen=True)
class Reply:
    """What came back on a request.

    Args:
        status: "ok", "refused", "rejected", "malformed", "out_of_range", "truncated", "cut" and "wrong_model" are
            answers. "failed" is no answer and costs nothing; "lost" leaves open whether there was one.
        reason: in words, if not "ok".
        text: the answer as it came.
        model: name of the model that answered, as the server gives it.
        tokens: of input and output, if the server counts them.
    """

    status: str
    reason: str = ""
    text: str = ""
    model: str | None = None
    tokens: tuple[int, int] | None = None


class StoreBusyError(UserError):
    """Another process has the store locked for now."""


class _StoreFullError(UserError):
    """The disk is full."""


class _Connection(sqlite3.Connection):
    """A connection whose errors are in words; none of them loses what is in the file."""

    path = Path()

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        with _named_errors(self.path):
            return super().execute(*arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        with _named_errors(self.path):
            return super().executemany(*arguments)

    def executescript(self, script: str) -> sqlite3.Cursor:
        with _named_errors(self.path):
            return super().executescript(script)


def _full(path: Path) -> UserError:
    return _StoreFullError(f"{path}: the disk is full; free some space and run again, what is stored is kept")


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """A context manager that turns errors of SQLite into a UserError by their condition."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        kept = "what is stored is kept"
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreBusyError(
                f"{path}: another process has it locked ({error}); close that one and run again, {kept}"
            ) from error
        # the index of a write-ahead log is mapped into memory: without space for it, SQLite reports its disk's failure
        no_space = code == sqlite3.SQLITE_IOERR and shutil.disk_usage(path.parent).free < _PAGE
        if code == sqlite3.SQLITE_FULL or no_space:
            raise _full(path) from error
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_CANTOPEN):
            raise UserError(
                f"{path}: expected a file and folder that can be written ({error}); change their permissions, {kept}"
            ) from error
        if code == sqlite3.SQLITE_IOERR:
            raise UserError(f"{path}: the disk cannot be read or written ({error}); check it, {kept}") from error
        if code == sqlite3.SQLITE_CORRUPT:
            raise UserError(
                f"{path}: the label store is damaged ({error}); keep it, it holds labels that were paid for: "
                f"`sqlite3 {path} .recover` reads what is left"
            ) from error
        raise UserError(f"{path}: expected a label store, got {error}; move the file away") from error


class LabelStore:
    """Labels, judgements and requests in one SQLite file; a context manager.

    What a method has written when it returns survives any kill. A request is entered at its highest cost before it is
    sent, so neither several at once nor a kill can exceed the budget. Its true cost replaces that once it is known.

    Args:
        path: of the file, made if it does not exist; ":memory:" for none.

    Raises:
        UserError: the file is not a label store, is damaged, read-only or locked, or the disk is full; so for
            every method.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._spare = path.with_name(path.name + "-reserve") if path.name != ":memory:" else None
        self._has_spare = self._used_spare = False
        # explicit transactions: a sum and the insert that depends on it belong together
        with _named_errors(path):
            self._connection = sqlite3.connect(path, _PATIENCE, isolation_level=None, factory=_Connection)
        self._connection.path = path
        try:
            # A request has two commits. They survive the end of the process without waiting for the disk; a power cut
            # can lose the last ones, but not the file.
            self._connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;" + _SCHEMA)
        except UserError:
            self._connection.close()
            raise

    def __enter__(self) -> "LabelStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        if self._has_spare and self._spare:
            self._spare.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            # SQLite has already rolled back what failed on a full disk
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _keep_spare(self) -> None:
        """Keep some space of the disk, which answers under way may use when it is full."""
        if self._used_spare:
            raise _full(self.path)
        # another process that ends removes it
        if self._spare is None or (self._has_spare and self._spare.exists()):
            return
        try:
            self._spare.write_bytes(os.urandom(_RESERVE))  # a file system may compress zeros
        except OSError as error:
            self._spare.unlink(missing_ok=True)
            raise UserError(
                f"{self._spare}: {error.strerror}; {_RESERVE >> 20} MiB are kept free for answers under way; free some "
                f"space and run again"
            ) from error
        self._has_spare = True

    def find(self, keys: Iterable[str]) -> dict[str, Label]:
        """The stored labels among `keys`."""
        return {key: _parse(text) for key, text in self._texts("SELECT label FROM labels WHERE key = ?", keys)}

    def add(self, labels: Mapping[str, Label], teacher: str) -> None:
        """Store labels in one transaction; a stored label that is final stays (`Label.final`)."""
        with self._writing():
            final = {key for key, label in self.find(labels).items() if label.final}
            rows = [(key, teacher, _format(label)) for key, label in labels.items() if key not in final]
            self._connection.executemany("INSERT OR REPLACE INTO labels VALUES (?, ?, ?)", rows)

    def replace(self, key: str, label: Label | None, teacher: str, edit: Edit, bases: Sequence[str]) -> bool:
        """Store a person's label in place of the one before; None removes it.

        Args:
            key: of the label.
            label: the new one.
            teacher: the person.
            edit: what is scored, and the new label's version.
            bases: versions that the person may have seen last.

        Returns:
            Whether it is stored: not if the stored version is another one, so somebody has changed it in between.
        """
        with self._writing():
            if self.version(key) not in bases:
                return False
            self._connection.execute("DELETE FROM labels WHERE key = ?", (key,))
            if label is not None:
                self._connection.execute("INSERT INTO labels VALUES (?, ?, ?)", (key, teacher, _format(label)))
            self._connection.execute("INSERT OR REPLACE INTO edits VALUES (?, ?, ?, ?, ?)", (key, *edit))
        return True

    def version(self, key: str) -> str:
        """The version of a person's label; "" if it has none."""
        row = self._connection.execute("SELECT version FROM edits WHERE key = ?", (key,)).fetchone()
        return row[0] if row else ""

    def labels_of(self, teacher: str) -> dict[str, tuple[Label, Edit | None]]:
        """All labels of a person by their keys, oldest first, each with what is known of its making."""
        query = (
            "SELECT labels.key, label, clip, grid, rubric, version FROM labels LEFT JOIN edits USING (key)"
            " WHERE teacher = ? ORDER BY labels.rowid"
        )
        rows = self._connection.execute(query, (teacher,)).fetchall()
        return {key: (_parse(text), Edit(*edit) if edit[0] else None) for key, text, *edit in rows}

    def teachers(self) -> list[str]:
        """Everyone whose labels are stored, by name."""
        return [name for (name,) in self._connection.execute("SELECT DISTINCT teacher FROM labels ORDER BY teacher")]

    def find_judgements(self, keys: Iterable[str]) -> dict[str, dict[str, str]]:
        """The stored judgements of pairs among `keys`: status, reason and a verdict for each dimension."""
        query = "SELECT judgement FROM judgements WHERE key = ?"
        return {key: json.loads(text) for key, text in self._texts(query, keys)}

    def add_judgements(self, judgements: Mapping[str, Mapping[str, str]], teacher: str) -> None:
        """Store judgements in one transaction; a stored judgement that is "ok" stays."""
        with self._writing():
            final = {key for key, found in self.find_judgements(judgements).items() if found["status"] == "ok"}
            rows = [(key, teacher, json.dumps(dict(found))) for key, found in judgements.items() if key not in final]
            self._connection.executemany("INSERT OR REPLACE INTO judgements VALUES (?, ?, ?)", rows)

    def spent(self) -> float:
        """US dollars spent, counting what is under way or lost at the most that it can cost."""
        return self._connection.execute("SELECT COALESCE(SUM(dollars), 0) FROM requests").fetchone()[0]

    def reserve(
        self, costs: Mapping[str, float], teacher: str, budget: float, batch: str | None = None
    ) -> dict[str, int] | None:
        """Enter requests before they are sent, all or none.

        Args:
            costs: the most that each question can cost, in dollars.
            teacher: who is asked.
            budget: bound of the store's spending in dollars.
            batch: key of the batch in which they are sent.

        Returns:
            ids of the requests by question; None, and nothing is entered, if they could exceed the budget.
        """
        self._keep_spare()
        with self._writing():
            if self.spent() + math.fsum(costs.values()) > budget:
                return None
            if batch is not None:
                self._connection.execute("INSERT INTO batches (key) VALUES (?)", (batch,))
            query = "INSERT INTO requests (question, teacher, batch, status, dollars) VALUES (?, ?, ?, 'sent', ?)"
            ids = {}
            for question, dollars in costs.items():
                ids[question] = int(self._connection.execute(query, (question, teacher, batch, dollars)).lastrowid or 0)
        return ids

    def settle(self, replies: Mapping[int, Reply], prices: tuple[float, float]) -> None:
        """Record what came back, in one transaction; on a full disk in the space that was kept for it.

        Args:
            replies: by id of the request; a "lost" one keeps the cost that it was entered with, and so does an
                answer without a count of tokens.
            prices: dollars for an input and an output token.
        """
        try:
            self._settle(replies, prices)
        except _StoreFullError:
            if not self._has_spare or self._spare is None or not self._spare.exists():
                raise
            self._spare.unlink()
            self._used_spare = True  # nothing more is reserved without it
            self._settle(replies, prices)

    def _settle(self, replies: Mapping[int, Reply], prices: tuple[float, float]) -> None:
        with self._writing():
            for number, reply in replies.items():
                tokens = reply.tokens or (None, None)
                if reply.status == "failed":
                    dollars: float | None = 0.0
                else:
                    dollars = reply.tokens and sum(n * price for n, price in zip(reply.tokens, prices, strict=True))
                self._connection.execute(
                    "UPDATE requests SET status = ?, reason = ?, text = ?, model = ?, input_tokens = ?,"
                    " output_tokens = ?, dollars = COALESCE(?, dollars) WHERE id = ?",
                    (reply.status, reply.reason, reply.text, reply.model, *tokens, dollars, number),
                )

    def answers(self, question: str) -> dict[int, Reply]:
        """The answers that a question got, by the ids of the requests, oldest first."""
        rows = self._connection.execute(
            "SELECT id, status, reason, text, model FROM requests WHERE question = ?"
            " AND status NOT IN ('sent', 'failed', 'lost') ORDER BY id",
            (question,),
        )
        return {number: Reply(*row) for number, *row in rows}

    def last_request(self) -> int:
        """The id of the newest request; 0 if there is none."""
        return self._connection.execute("SELECT COALESCE(MAX(id), 0) FROM requests").fetchone()[0]

    def open_batches(self, teacher: str) -> dict[str, tuple[str | None, dict[str, int]]]:
        """A teacher's batches that have not ended, by key: id at the server if known, and requests by question.

        Those of other teachers wait until that teacher is used again: only its server has their answers.
        """
        query = (
            "SELECT DISTINCT batches.key, batches.id FROM batches JOIN requests ON requests.batch = batches.key"
            " WHERE NOT ended AND teacher = ?"
        )
        found = {}
        for key, number in self._connection.execute(query, (teacher,)).fetchall():
            rows = self._connection.execute("SELECT question, id FROM requests WHERE batch = ?", (key,))
            found[key] = (number, dict(rows.fetchall()))
        return found

    def name_batch(self, key: str, number: str) -> None:
        """Record the id that the server gave a batch."""
        with self._writing():
            self._connection.execute("UPDATE batches SET id = ? WHERE key = ?", (number, key))

    def end_batch(self, key: str) -> None:
        """Record that a batch's answers are settled."""
        with self._writing():
            self._connection.execute("UPDATE batches SET ended = 1 WHERE key = ?", (key,))

    def _texts(self, query: str, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
        for key in keys:
            row: Sequence[str] | None = self._connection.execute(query, (key,)).fetchone()
            if row is not None:
                yield key, row[0]


def _format(label: Label) -> str:
    def scores(values: Iterable[float]) -> list[float | None]:
        return [None if math.isnan(value) else float(value) for value in values]

    video = dict(zip(label.video, scores(label.video.values()), strict=True))
    patches = {name: scores(values) for name, values in label.patches.items()}
    return json.dumps(
        {"status": label.status, "reason": label.reason, "video": video, "patches": patches}, sort_keys=True
    )


def _parse(text: str) -> Label:
    def score(value: float | None) -> float:
        return math.nan if value is None else value

    stored = json.loads(text)
    return Label(
        {name: score(value) for name, value in stored["video"].items()},
        {name: [score(value) for value in values] for name, values in stored["patches"].items()},
        stored["status"],
        stored.get("reason", ""),
    )
