"""The labelling page's server: clips out of a run directory, scores into its label store, nothing beyond loopback."""

import hmac
import io
import json
import math
import re
import secrets
from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.files import hash_text
from halo_fast.patches import PIXELS, PatchGrid
from halo_fast.pipeline.clips import run_clips
from halo_fast.pipeline.config import Config, check_round
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.annotate import clips_to_label
from halo_fast.teachers import PATCH_DIMENSIONS, RUBRIC, VIDEO_DIMENSIONS, Label, LabelStore, label_key
from halo_fast.teachers.human import person_name
from halo_fast.teachers.labelling import open_clip
from halo_fast.teachers.store import Edit

__all__ = ["LabelServer", "label"]

_PAGE = files("halo_fast.pipeline.label").joinpath("page.html")
_LONGEST_BODY = 1 << 20
_SKIPPED = "skipped"
# style and script are in the page; nothing is fetched from elsewhere or sent elsewhere
_POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def label(config: Config, name: str, port: int = 0, round: int = 1) -> None:
    """Serve the labelling page until Ctrl-C; scores go to labels.sqlite of the run directory as they are given.

    Args:
        config: of the run whose candidates are scored; annotate.num_clips and seed choose the same clips as for any
            other teacher.
        name: who scores; the labels are those of the teacher "human:<name>".
        port: on 127.0.0.1; 0 for a free one.
        round: of the run, whose candidates are scored.

    Raises:
        UserError: no candidates, a name that is not a word, a port that is taken.
    """
    with LabelServer(config, name, port, round) as server:
        print(
            f"{name} scores {server.count} clips at\n  {server.url}\nCtrl-C ends; every score is saved at once.",
            flush=True,
        )
        server.serve_forever()


class LabelServer(ThreadingHTTPServer):
    """HTTP on loopback under a path that only the printed address has; see `label` for the arguments.

    Attributes:
        url: address of the page, with its token.
        count: clips to score.
    """

    daemon_threads = True

    def __init__(self, config: Config, name: str, port: int = 0, round: int = 1) -> None:
        self.teacher = person_name(name)
        run = Run(config, number=check_round(config, round))
        found = run_clips(run)
        self._folder = found.folder
        self._factors = found.factors() or PIXELS
        self._store = run.root / "labels.sqlite"
        self._grid, self._fps = (config.grid[0], config.grid[1], config.grid[2]), config.generate.fps
        self._rows = clips_to_label(config, run, found)
        self._clips = [open_clip(self._folder / row.video, row.prompt) for row in self._rows]
        self.count = len(self._clips)
        self._keys = [label_key(clip.hash, clip.prompt, self._grid, self.teacher) for clip in self._clips]
        with LabelStore(self._store) as store:
            stored = store.labels_of(self.teacher)
        self._earlier, self.strangers = self._find_earlier(stored)
        self._token = secrets.token_urlsafe(24)
        self.frames = lru_cache(maxsize=4)(self._frames)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UserError(f"port {port}: {error.strerror}; choose another, or 0 for a free one") from error
        self.url = f"http://127.0.0.1:{self.server_address[1]}/{self._token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        # browsers drop connections at will; anything else is worth seeing
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def admits(self, path: str, host: str) -> bool:
        """Whether a request has the token and this address; a page whose name resolves to loopback has another."""
        token = path.strip("/").split("/")[0]
        known = hmac.compare_digest(token.encode(), self._token.encode())
        return known and host == f"127.0.0.1:{self.server_address[1]}"

    def overview(self) -> dict[str, Any]:
        """What the page starts with: dimensions with their rubric, and the state of every clip."""
        with LabelStore(self._store) as store:
            labels = store.find(self._keys)
        lines = dict(re.findall(r"^- (\w+): (.*(?:\n  .*)*)", RUBRIC, re.MULTILINE))
        return {
            "teacher": self.teacher,
            "dimensions": [{"name": name, "text": " ".join(lines[name].split())} for name in VIDEO_DIMENSIONS],
            "patch": {"name": PATCH_DIMENSIONS[0], "text": " ".join(lines[PATCH_DIMENSIONS[0]].split())},
            "fps": self._fps,
            "earlier": [index in self._earlier and key not in labels for index, key in enumerate(self._keys)],
            "strangers": self.strangers,
            "states": [self._state(labels.get(key)) for key in self._keys],
        }

    def clip(self, index: int) -> dict[str, Any]:
        """A clip's prompt, size, patch edges and scores so far; null is not scored."""
        video = self.frames(index)
        grid = self._patch_grid(index, video)
        with LabelStore(self._store) as store:
            found = store.find([self._keys[index]]).get(self._keys[index])
            version = store.version(self._keys[index])
        video_scores, patches = (dict(found.video), dict(found.patches)) if found else ({}, {})
        scores = list(patches.get(PATCH_DIMENSIONS[0], [math.nan] * math.prod(self._grid)))
        return {
            "prompt": self._clips[index].prompt,
            "frames": len(video),
            "height": video.shape[1],
            "width": video.shape[2],
            "edges": [grid.pixel_edges(axis) for axis in range(3)],
            "video": {name: _nullable(video_scores.get(name, math.nan)) for name in VIDEO_DIMENSIONS},
            "patches": [_nullable(score) for score in scores],
            "state": self._state(found),
            "version": version,
            "earlier": None if found else self._earlier.get(index),
        }

    def save(self, index: int, scores: Any) -> str | None:
        """Store what the page sends: {"video", "patches", "skipped", "version", "bases"}.

        Args:
            index: of the clip.
            scores: of the video by dimension and of the patches, null for none; whether the clip is skipped; a name for
                this version, and the versions on which it may build.

        Returns:
            The clip's new state; None, and nothing is stored, if another page has changed the clip since.

        Raises:
            ValueError: anything but scores from 1 to 5 or null, for all dimensions and patches.
        """
        if not isinstance(scores, dict) or set(scores) != {"video", "patches", "skipped", "version", "bases"}:
            raise ValueError("expected video, patches, skipped, version and bases")
        version, bases = scores["version"], scores["bases"]
        if not isinstance(bases, list) or not all(isinstance(name, str) for name in [version, *bases]) or not version:
            raise ValueError("version and bases: expected names of versions")
        video, patches = scores["video"], scores["patches"]
        if not isinstance(video, dict) or set(video) != set(VIDEO_DIMENSIONS):
            raise ValueError(f"expected a score or null for {', '.join(VIDEO_DIMENSIONS)}")
        if not isinstance(patches, list) or len(patches) != math.prod(self._grid):
            raise ValueError(f"expected {math.prod(self._grid)} patches")
        values = [*video.values(), *patches]
        if not all(value is None or (type(value) in (int, float) and 1 <= value <= 5) for value in values):
            raise ValueError("expected scores from 1 to 5 or null")
        if any(value is not None for value in values):
            given = {name: float(value) for name, value in video.items() if value is not None}
            padded = [math.nan if value is None else float(value) for value in patches]
            found: Label | None = Label(given, {PATCH_DIMENSIONS[0]: padded})
        else:
            found = Label(status=_SKIPPED) if scores["skipped"] else None
        edit = self._edit(index, version)
        with LabelStore(self._store) as store:
            stored = store.replace(self._keys[index], found, self.teacher, edit, bases)
        return self._state(found) if stored else None

    def _edit(self, index: int, version: str) -> Edit:
        clip = hash_text(json.dumps([self._clips[index].hash, self._clips[index].prompt]))
        return Edit(clip, json.dumps(self._grid), hash_text(RUBRIC), version)

    def _find_earlier(self, stored: Mapping[str, tuple[Label, Edit | None]]) -> tuple[dict[int, dict[str, Any]], int]:
        """This person's scores of these clips under another grid or rubric, by clip, and how many labels do not fit.

        Scores of the video mean the same under any grid; those of patches only under this one.
        """
        left = {key: known for key, known in stored.items() if key not in self._keys and known[0].status == "ok"}
        counts = {len(scores) for label, _ in left.values() for scores in label.patches.values()}
        grids = [grid for count in sorted(counts) for grid in _grids(count)]
        here = [self._edit(index, "") for index in range(self.count)]
        found = {}
        for index, clip in enumerate(self._clips):
            keys = {label_key(clip.hash, clip.prompt, grid, self.teacher): str(grid) for grid in grids}
            keys |= {key: edit.grid for key, (_, edit) in left.items() if edit and edit.clip == here[index].clip}
            for key in [key for key in left if key in keys]:
                label, edit = left[key]
                same = edit is not None and edit.grid == here[index].grid
                if not label.video and not same:
                    continue
                del left[key]
                patches = [_nullable(score) for score in label.patches.get(PATCH_DIMENSIONS[0], [])]
                found[index] = {
                    "why": "another version of the rubric" if same else f"the grid {keys[key]}",
                    "video": {name: _nullable(label.video.get(name, math.nan)) for name in VIDEO_DIMENSIONS},
                    "patches": patches if same else None,
                }
        return found, len(left)

    def _state(self, found: Label | None) -> str:
        """ "open", "part", "done" or "skipped"."""
        if found is None or found.status not in ("ok", _SKIPPED):
            return "open"
        if found.status == _SKIPPED:
            return _SKIPPED
        patches = found.patches.get(PATCH_DIMENSIONS[0], [math.nan])
        complete = set(found.video) == set(VIDEO_DIMENSIONS) and not any(map(math.isnan, patches))
        return "done" if complete else "part"

    def _frames(self, index: int) -> Tensor:
        return self._clips[index].frames()

    def _patch_grid(self, index: int, video: Tensor) -> PatchGrid:
        frames, height, width, _ = video.shape
        return PatchGrid(self._grid, frames, height, width, *self._factors)


def _grids(count: int) -> list[tuple[int, int, int]]:
    """All grids of `count` patches."""
    divisors = [number for number in range(1, count + 1) if count % number == 0]
    return [(f, h, count // (f * h)) for f in divisors for h in divisors if count % (f * h) == 0]


def _nullable(score: float) -> float | None:
    return None if math.isnan(score) else score


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    protocol_version = "HTTP/1.1"
    server_version = "halo"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:  # noqa: N802
        self._answer("GET")

    def do_PUT(self) -> None:  # noqa: N802
        self._answer("PUT")

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing: there is a request for each frame, and the address holds the token."""

    def _answer(self, method: str) -> None:
        """Answer one request; a mistake in it becomes a status and a line of text."""
        length = self.headers.get("Content-Length", "0")
        # digits of other scripts are digits to isdigit and no numbers to int
        if not re.fullmatch(r"[0-9]{1,18}", length):
            self.close_connection = True
            return self._send(HTTPStatus.BAD_REQUEST, b"Content-Length: expected a number")
        if int(length) > _LONGEST_BODY:
            self.close_connection = True
            return self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"too long")
        body = self.rfile.read(int(length))
        if not self.server.admits(self.path, self.headers.get("Host", "")):
            return self._send(HTTPStatus.NOT_FOUND, b"not here; open the address that halo label printed")
        route = self.path.strip("/").split("/")[1:]
        if not route and not self.path.endswith("/"):
            # the page uses addresses relative to its own
            return self._send(HTTPStatus.PERMANENT_REDIRECT, b"", location=self.path + "/")
        try:
            self._route(method, route, body)
        except (ValueError, IndexError, RecursionError) as error:
            self._send(HTTPStatus.BAD_REQUEST, str(error).encode())
        except UserError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, str(error).encode())

    def _route(self, method: str, route: list[str], body: bytes) -> None:
        """Answer by the parts of the path behind the token."""
        match method, route:
            case "GET", []:
                self._send(HTTPStatus.OK, _PAGE.read_bytes(), "text/html; charset=utf-8")
            case "GET", ["overview"]:
                self._json(self.server.overview())
            case "GET", ["clips", number]:
                self._json(self.server.clip(self._index(number)))
            case "GET", ["clips", number, "frames", frame]:
                video = self.server.frames(self._index(number))
                self._send(HTTPStatus.OK, _png(video, int(frame)), "image/png")
            case "PUT", ["clips", number]:
                state = self.server.save(self._index(number), json.loads(body))
                if state is None:
                    return self._send(HTTPStatus.CONFLICT, b"another tab or window has changed this clip")
                self._json({"state": state})
            case _:
                self._send(HTTPStatus.NOT_FOUND, b"no such page")

    def _index(self, number: str) -> int:
        if not number.isdecimal() or int(number) >= self.server.count:
            raise ValueError(f"clip: expected 0 to {self.server.count - 1}, got {number!r}")
        return int(number)

    def _json(self, value: object) -> None:
        self._send(HTTPStatus.OK, json.dumps(value, allow_nan=False).encode(), "application/json")

    def _send(
        self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8", location: str = ""
    ) -> None:
        """Send a response with the headers that keep the page and its address private."""
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": _POLICY,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        if location:
            headers["Location"] = location
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body)


def _png(video: Tensor, frame: int) -> bytes:
    from PIL import Image

    if not 0 <= frame < len(video):
        raise ValueError(f"frame: expected 0 to {len(video) - 1}, got {frame}")
    file = io.BytesIO()
    Image.fromarray(video[frame].numpy()).save(file, "png", compress_level=1)
    return file.getvalue()
