"""A small server of OpenAI's protocol on the loopback interface: responses, chat completions, files and batches.

It answers every question by a rule that tests can compute, keeps a ledger of what it would bill, and misbehaves on
demand."""

import base64
import hashlib
import io
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

MODEL = "gpt-4o-2024-11-20"
PRICES = (2.5e-6, 10e-6)
# What servers say to a question beyond their context, as JSON; those that are missing cut the question and say nothing.
TOO_LONG: dict[str, Any] = {
    "vllm": {
        "object": "error", "type": "BadRequestError", "param": None, "code": 400,
        "message": "This model's maximum context length is 1000 tokens. However, you requested 5000 tokens.",
    },
    "sglang": {
        "object": "error", "type": "BadRequestError", "param": None, "code": 400,
        "message": "The input (5000 tokens) is longer than the model's context length (1000 tokens).",
    },
    "lmstudio": {"error": "Trying to keep the first 5000 tokens when context the overflows. Load the model larger."},
    "llama.cpp": {
        "error": {"code": 400, "message": "the request exceeds the available size", "type": "exceed_context_size_error"}
    },
    "azure": {"error": {"code": "context_length_exceeded", "message": "Please reduce the length.", "param": "input"}},
    "litellm": {"error": {"message": "litellm.ContextWindowExceededError: too many", "type": None, "code": "400"}},
}  # fmt: skip
# what content filters say, with status 400
POLICY: dict[str, Any] = {
    "openai": {"error": {"code": "content_policy_violation", "message": "no"}},
    "azure": {
        "error": {
            "message": "The prompt triggered Azure OpenAI's content management policy.",
            "code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"},
        }
    },
    "litellm": {"error": {"message": "litellm.ContentPolicyViolationError: no", "type": None, "code": "400"}},
    "dashscope": {"error": {"code": "data_inspection_failed", "message": "Input data may contain bad content."}},
}  # fmt: skip
# outcomes that reach the client as a whole and hold what was asked for
USABLE = ""


def expected_score(prompt: str, field_name: str) -> float:
    """The score from 1 to 5 that the server gives a field of a question about a prompt."""
    digest = hashlib.sha256(f"{prompt} {field_name}".encode()).digest()
    return 1 + digest[0] % 9 / 2


@dataclass
class Request:
    """What the server saw: path, digest of the body, the question's JSON, how it answered, when it came, its bill."""

    path: str
    digest: str
    question: dict[str, Any]
    body: dict[str, Any]
    outcome: str
    arrived: float
    dollars: float = 0.0


@dataclass
class OpenAIServer:
    """A context manager; `url` is the base_url of its clients.

    misbehave: number of the request (from 0), its question -> "" for a right answer, or how to misbehave: "429", "500",
        "quota", "401", "404", "slow", "cut", "half", "words", "range", "grade", "extra", "missing", "refusal",
        "length", "model", "policy", "html", "gone", "deep"; or, with an answer that is right beneath, "surrogate" (half
        a character in it), "tokens" (a count that no file holds) and "revision" (the key in the model's name). "key"
        adds a field whose name is the key, with escapes.
    biased: answer "first" to every comparison; else the brighter video wins and equals tie.
    dialect: whose words errors have, a key of TOO_LONG or POLICY.
    context: prompt tokens that the model takes; the dialect decides whether a longer question is refused or cut.
    queue: prompt tokens that batches may hold in all; one that exceeds it fails.
    reported: name under which the server reports the model, if not the one that was asked for.
    """

    misbehave: Callable[[int, dict[str, Any]], str] = lambda number, question: USABLE
    biased: bool = False
    dialect: str = "openai"
    context: int | None = None
    queue: int | None = None
    reported: str | None = None
    retry_after: str = "0.02"
    pause: float = 0.0
    slowness: float = 3.0
    requests: list[Request] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    polls_until_done: int = 2
    most_at_once: int = 0

    def __enter__(self) -> "OpenAIServer":
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._at_once = 0
        owner = self

        class Handler(_Handler):
            server_state = owner

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def billed(self) -> float:
        """Dollars for all answers that were made, whether or not they arrived."""
        return sum(request.dollars for request in self.requests)

    def usable_answers(self) -> dict[str, int]:
        """How often each body was given a usable answer."""
        counts: dict[str, int] = {}
        for request in self.requests:
            if request.outcome == USABLE:
                counts[request.digest] = counts.get(request.digest, 0) + 1
        return counts

    def enter(self, path: str, body: dict[str, Any]) -> tuple[int, Request]:
        """Log a request before it is answered."""
        question = json.loads(_texts(body)[1])
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.lock:
            number = len(self.requests)
            outcome = self.misbehave(number, question)
            self.requests.append(Request(path, digest, question, body, outcome, time.monotonic()))
            return number, self.requests[-1]

    def counted(self, change: int) -> None:
        """Keep count of the requests that are being answered."""
        with self.lock:
            self._at_once += change
            self.most_at_once = max(self.most_at_once, self._at_once)

    def answer(self, request: Request, chat: bool, key: str, share: float = 1.0) -> dict[str, Any]:
        """The response's document, right or wrong by the request's outcome, and its bill; `key` came with it."""
        body, outcome = request.body, request.outcome
        values = self._values(request.question, body, chat)
        first = request.question["fields"][0]
        if outcome == "range":
            values[first] = 7
        elif outcome == "grade":
            values[first] = 3.7
        elif outcome == "extra":
            values["rubric"] = "ignore it"
        elif outcome == "missing":
            del values[first]
        remarks = "as asked \ud83d" if outcome == "surrogate" else "as asked"
        text = json.dumps({"remarks": remarks} | values, ensure_ascii=False)
        if outcome == "key":
            field_name = "".join(f"\\u{ord(letter):04x}" if index % 2 else letter for index, letter in enumerate(key))
            text = f'{text[:-1]}, "{field_name}": 3}}'
        if outcome == "words":
            text = "I would give this clip a 4, it looks fine."
        finish = "stop"
        if outcome == "length":
            text, finish = text[: len(text) // 2], "length"
        refusal = "I cannot look at this. \ud83d" if outcome == "refusal" else None
        model = "gpt-4o-mini-2024-07-18" if outcome == "model" else self.reported or body["model"]
        used, made = prompt_tokens(body), len(text) // 4
        used = min(used, self.context or used)
        request.dollars = share * (used * PRICES[0] + made * PRICES[1])
        if outcome == "revision":
            model = f"{model}@{key}"
        if outcome == "tokens":
            made = 2**63
        if chat:
            message = {"role": "assistant", "content": None if refusal else text, "refusal": refusal}
            return {
                "id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": model,
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": {"prompt_tokens": used, "completion_tokens": made, "total_tokens": used + made},
            }  # fmt: skip
        part = {"type": "output_text", "text": text, "annotations": []}
        if refusal:
            part = {"type": "refusal", "refusal": refusal}
        return {
            "id": "resp_1", "object": "response", "created_at": 0, "model": model,
            "status": "incomplete" if outcome == "length" else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if outcome == "length" else None,
            "output": [
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part]},
            ],
            "usage": {"input_tokens": used, "output_tokens": made, "total_tokens": used + made},
        }  # fmt: skip

    def _values(self, question: dict[str, Any], body: dict[str, Any], chat: bool) -> dict[str, Any]:
        if question["task"] != "pair":
            return {name: expected_score(question["prompt"], name) for name in question["fields"]}
        pictures = [np.asarray(Image.open(io.BytesIO(image)), dtype=float).mean() for image in _images(body)]
        half = len(pictures) // 2
        gap = np.mean(pictures[:half]) - np.mean(pictures[half:])
        verdict = "first" if self.biased or gap > 2 else "second" if gap < -2 else "tie"
        return dict.fromkeys(question["fields"], verdict)

    def run_batch(self, batch: dict[str, Any], key: str) -> None:
        """Answer all lines of a batch's input file; "500" fails a line, "expired" leaves it out, others misbehave."""
        output, errors = [], []
        for line in self.files[batch["input_file_id"]].decode().splitlines():
            entry = json.loads(line)
            _, request = self.enter("/v1/batches", entry["body"])
            if request.outcome == "expired":
                continue
            if request.outcome == "500":
                failure = {"status_code": 500, "body": {"error": {"message": "the line failed"}}}
                errors.append({"custom_id": entry["custom_id"], "response": failure, "error": None})
                continue
            document = self.answer(request, False, key, share=0.5)
            response = {"status_code": 200, "request_id": "r", "body": document}
            output.append({"id": "b", "custom_id": entry["custom_id"], "response": response, "error": None})
        for name, lines in (("output_file_id", output), ("error_file_id", errors)):
            if lines:
                batch[name] = f"file-{name}-{batch['id']}"
                self.files[batch[name]] = "\n".join(map(json.dumps, reversed(lines))).encode()


def _texts(body: dict[str, Any]) -> tuple[str, str]:
    """Instructions and question of a request of either API."""
    if "messages" in body:
        system, user = body["messages"]
        return system["content"], user["content"][0]["text"]
    return body["instructions"], body["input"][0]["content"][0]["text"]


def prompt_tokens(body: dict[str, Any]) -> int:
    """Tokens that the server counts for the texts and images of a request."""
    return sum(map(len, _texts(body))) // 4 + 85 * len(_images(body))


def queued_tokens(state: OpenAIServer) -> int:
    """Prompt tokens of all batches that have not ended."""
    waiting = [batch for batch in state.batches.values() if batch["status"] == "in_progress"]
    lines = [line for batch in waiting for line in state.files[batch["input_file_id"]].decode().splitlines()]
    return sum(prompt_tokens(json.loads(line)["body"]) for line in lines)


def _images(body: dict[str, Any]) -> list[bytes]:
    """The image files of a request of either API."""
    content = body["messages"][1]["content"] if "messages" in body else body["input"][0]["content"]
    urls = [part["image_url"] for part in content[1:]]
    urls = [url["url"] if isinstance(url, dict) else url for url in urls]
    return [base64.b64decode(url.removeprefix("data:image/jpeg;base64,")) for url in urls]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: OpenAIServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        state = self.server_state
        if self.path == "/v1/files":
            self._send(200, state_file(state, data, self.headers["Content-Type"]))
        elif self.path == "/v1/batches":
            self._send(200, start_batch(state, json.loads(data)))
        elif self.path in ("/v1/responses", "/v1/chat/completions"):
            state.counted(+1)
            try:
                self._ask(json.loads(data))
            finally:
                state.counted(-1)
        else:
            self._send(404, {"error": {"message": f"no {self.path}"}})

    def do_GET(self) -> None:
        state, path = self.server_state, self.path.partition("?")[0]
        if path == "/v1/batches":
            self._send(200, {"object": "list", "data": list(state.batches.values()), "has_more": False})
        elif path.startswith("/v1/batches/"):
            batch = state.batches[path.split("/")[3]]
            batch["polls"] += 1
            if batch["status"] == "in_progress" and queued_tokens(state) > (state.queue or math.inf):
                batch["status"] = "failed"
                message = f"Enqueued token limit reached for gpt-4o. Limit: {state.queue:,} enqueued tokens."
                error = {"code": "token_limit_exceeded", "message": message, "param": None, "line": None}
                batch["errors"] = {"object": "list", "data": [error]}
            elif batch["status"] == "in_progress" and batch["polls"] >= state.polls_until_done:
                state.run_batch(batch, self.headers["Authorization"].removeprefix("Bearer "))
                batch["status"] = "completed"
            self._send(200, batch)
        elif path.endswith("/content"):
            self._reply(200, state.files[path.split("/")[3]], "application/octet-stream")
        else:
            self._send(404, {"error": {"message": f"no {path}"}})

    def _ask(self, body: dict[str, Any]) -> None:
        state = self.server_state
        _, request = state.enter(self.path, body)
        outcome = request.outcome
        state.closing.wait(state.slowness if outcome == "slow" else state.pause)
        # a careless server that sends the key back
        echo = f"request was {self.headers['Authorization']}"
        broken = f"{echo} \ud83d"
        if outcome == "gone":
            self.close_connection = True
        elif outcome == "429":
            self._send(429, {"error": {"message": broken, "code": "rate_limit_exceeded"}}, state.retry_after)
        elif outcome == "quota":
            self._send(429, {"error": {"message": broken, "code": "insufficient_quota"}})
        elif outcome == "policy" and state.dialect != "openai":
            self._send(400, POLICY[state.dialect])
        elif outcome == "policy":
            self._send(400, {"error": {"message": broken, "code": "content_policy_violation"}})
        elif state.context and prompt_tokens(body) > state.context and state.dialect in TOO_LONG:
            self._send(400, TOO_LONG[state.dialect])
        elif outcome in ("400", "401", "404", "413", "422", "500"):
            self._send(int(outcome), {"error": {"message": broken, "code": []}})
        elif outcome == "html":
            self._reply(200, f"<html>{echo}</html>".encode(), "text/html")
        elif outcome == "deep":
            self._reply(200, b"[" * 200_000, "application/json")
        else:
            key = self.headers["Authorization"].removeprefix("Bearer ")
            data = json.dumps(state.answer(request, self.path.endswith("completions"), key)).encode()
            if outcome == "half":
                data = data[: len(data) // 2]
            self._reply(200, data, "application/json", cut=outcome == "cut")

    def _send(self, status: int, document: dict[str, Any], retry_after: str | None = None) -> None:
        self._reply(status, json.dumps(document).encode(), "application/json", retry_after)

    def _reply(self, status: int, data: bytes, kind: str, retry_after: str | None = None, cut: bool = False) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            if retry_after:
                self.send_header("Retry-After", retry_after)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection |= cut
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has gone


def state_file(state: OpenAIServer, data: bytes, content_type: str) -> dict[str, Any]:
    """Keep an uploaded file of a multipart form."""
    form = BytesParser().parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + data)
    parts = {part.get_param("name", header="content-disposition"): part for part in form.get_payload()}
    assert parts["purpose"].get_payload(decode=True) == b"batch"
    number = f"file-{len(state.files)}"
    state.files[number] = parts["file"].get_payload(decode=True)
    return {"id": number, "object": "file", "bytes": len(data), "created_at": 0, "filename": "f", "purpose": "batch"}


def start_batch(state: OpenAIServer, body: dict[str, Any]) -> dict[str, Any]:
    """Take a batch, to be answered when it has been polled `polls_until_done` times."""
    number = f"batch_{len(state.batches)}"
    state.batches[number] = body | {
        "id": number, "object": "batch", "status": "in_progress", "created_at": 0, "polls": 0,
        "output_file_id": None, "error_file_id": None,
    }  # fmt: skip
    return state.batches[number]
