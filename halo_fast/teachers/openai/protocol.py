"""OpenAI's two protocols as pure functions: a question's request, and what a response or an HTTP error says."""

import base64
import email.utils
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from halo_fast.teachers.openai.config import KEY, OpenAIConfig
from halo_fast.teachers.openai.pictures import Picture
from halo_fast.teachers.openai.pricing import context_needed, fewest_tokens
from halo_fast.teachers.openai.questions import Answer, Question, parse, schema
from halo_fast.teachers.rubric import RUBRIC
from halo_fast.teachers.store import Reply

__all__ = [
    "CONTEXT",
    "Outcome",
    "endpoint",
    "make_reply",
    "read_failure",
    "read_reply",
    "request_body",
    "same_model",
    "scrub",
]

_LONGEST_WAIT = 600.0  # seconds; a server that wants more ends the run
# by which content filters of OpenAI, Azure and gateways are known, in an error's code or in its text
_POLICY = re.compile(
    r"content.?policy|content.?filter|content management policy|responsible.?ai|invalid_prompt|data_?inspection|safety",
    re.IGNORECASE,
)
# by which servers say that a question is longer than the model's context
_TOO_LONG = re.compile(
    r"context.?(length|size|window)|maximum.{0,20}(length|tokens)|exceed_context|longer than the model"
    r"|context.{0,20}overflow|prompt is too long|max_model_len",
    re.IGNORECASE,
)
CONTEXT = (
    "give it a larger context: num_ctx or OLLAMA_CONTEXT_LENGTH (Ollama), --max-model-len (vLLM), --context-length "
    "(SGLang), -c (llama.cpp), Context Length (LM Studio); or lower annotate.openai.max_images and max_frames"
)
_SHORTEST_SECRET = 8  # characters; cutting out a shorter key would spoil words and numbers
_MOST_TOKENS = 10**9  # a larger count is a fault of the server


@dataclass(frozen=True)
class Outcome:
    """What came of a request.

    Args:
        reply: what is stored.
        wait: seconds to wait before the next request, if the server names them.
        fatal: whether any other question would fare the same.
    """

    reply: Reply
    wait: float | None = None
    fatal: bool = False


class _Fields(NamedTuple):
    """The parts of a response that both APIs have under different names."""

    model: str
    text: str
    refusal: str | None
    finish: str | None
    tokens: tuple[int, int] | None


class _Api(NamedTuple):
    """One API: the client's endpoint, a request's body beside the model, a response's fields, and a cure for a 404."""

    endpoint: Callable[[Any], Any]
    body: Callable[[Question, OpenAIConfig], dict[str, Any]]
    fields: Callable[[Any], _Fields]
    cure: str


def endpoint(client: Any, config: OpenAIConfig) -> Any:
    """The client's part that sends requests of the configured API."""
    return _APIS[config.api].endpoint(client)


def request_body(question: Question, config: OpenAIConfig) -> dict[str, Any]:
    """The JSON document of a request."""
    body: dict[str, Any] = {"model": config.model}
    if config.temperature is not None:
        body["temperature"] = config.temperature
    return body | _APIS[config.api].body(question, config)


def read_reply(question: Question | None, document: object, config: OpenAIConfig) -> Reply:
    """What a response says.

    Args:
        question: that was asked; if it is None, the text is stored unread and parsed later.
        document: the response's JSON.
        config: the model and API that were asked.
    """
    try:
        model, text, refusal, finish, tokens = _APIS[config.api].fields(document)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        return make_reply("malformed", f"not a response of this API: {type(error).__name__} {error}")
    text = scrub(text)
    if not same_model(config, model):
        return make_reply("wrong_model", f"asked {config.model}, {model!r} answered", text, model, tokens)
    if question and tokens and 0 < tokens[0] < fewest_tokens(question, config):
        return make_reply("cut", _cut_reason(question, tokens[0], config), text, model, tokens)
    if finish in ("length", "max_output_tokens"):
        return make_reply("truncated", f"longer than {config.max_output_tokens} tokens", text, model, tokens)
    if refusal or finish == "content_filter":
        return make_reply("refused", refusal or finish, text, model, tokens)
    answer = parse(question, text) if question else Answer("ok")
    return make_reply(answer.status, answer.reason, text, model, tokens)


def read_failure(status: int, document: object, headers: Mapping[str, str], config: OpenAIConfig) -> Outcome:
    """What an HTTP error means: a refusal or rejection of this question, a reason to wait, or one to stop.

    A server that rejects a request (400, 413, 415, 422) may take another one: whether several in a row were rejected is
    for the ledger to see.

    Args:
        status: HTTP status code.
        document: JSON or text of the response.
        headers: of the response.
        config: the model, address and API that were asked.
    """
    error = document.get("error", document) if isinstance(document, dict) else {}
    error = error if isinstance(error, dict) else {"message": error}
    message = scrub(error.get("message") or error.get("detail") or document or "")[:200]
    reason = f"{config.base_url} answered {status}: {message}"
    said = f"{error.get('code')} {error.get('type')} {message}"
    if status in (400, 403, 422) and _POLICY.search(said):
        return Outcome(Reply("refused", message, tokens=(0, 0)))
    if status in (400, 413, 422, 500) and _TOO_LONG.search(said):
        return Outcome(Reply("failed", f"{reason}; {CONTEXT}"), fatal=True)
    if status in (400, 413, 415, 422):
        return Outcome(Reply("rejected", f"{reason}", tokens=(0, 0)))
    if not (status in (408, 409, 425, 429) or status >= 500 and status != 501):
        return Outcome(Reply("failed", f"{reason}; {_cure(status, config)}"), fatal=True)
    wait = _retry_after(headers)
    if error.get("code") == "insufficient_quota":
        return Outcome(Reply("failed", f"{reason}; the account has no credit left"), fatal=True)
    if wait is not None and wait > _LONGEST_WAIT:
        return Outcome(Reply("failed", f"{reason}; wait {wait:.0f} s and run again"), fatal=True)
    return Outcome(Reply("failed", reason), wait)


def same_model(config: OpenAIConfig, answered: str) -> bool:
    """Whether the model that answered is the one asked for: by its name, with a date after it, or with a revision."""
    name = re.escape(config.reported_model or config.model)
    return re.fullmatch(name + r"(-\d{4}-\d\d-\d\d|@.+)?", answered) is not None


def make_reply(
    status: str, reason: object = "", text: str = "", model: str | None = None, tokens: tuple[int, int] | None = None
) -> Reply:
    """A reply without the API key; texts are cut only after that, lest a part of the key be left."""
    return Reply(status, scrub(reason)[:200], scrub(text), None if model is None else scrub(model)[:200], tokens)


def scrub(value: object) -> str:
    """What a server sent, as text that can be stored: without the API key, plain or in JSON's escapes."""
    try:
        text = str(value).encode("utf-8", "replace").decode()
    except RecursionError:
        return "nested too deeply"
    key = os.environ.get(KEY, "")
    if len(key) < _SHORTEST_SECRET:
        return text
    # an answer is stored as it came; parsing it later would put an escaped key together again
    escaped = "".join(rf"\\{{0,8}}(?:{re.escape(letter)}|u(?i:{ord(letter):04x}))" for letter in key)
    return re.sub(escaped, f"<{KEY}>", text)


def _cut_reason(question: Question, counted: int, config: OpenAIConfig) -> str:
    return (
        f"the server counted {counted} prompt tokens for {len(question.pictures)} images and their text, about "
        f"{context_needed(question, config)} tokens with the answer"
    )


def _cure(status: int, config: OpenAIConfig) -> str:
    """What to do about an error that repeating would not mend."""
    if status in (404, 405, 501):
        return f"check annotate.openai.model and base_url; annotate.openai.api: {_APIS[config.api].cure}"
    cures = {401: f"check {KEY}", 403: f"check what {KEY} may use"}
    return cures.get(status, "the server does not take such requests; check annotate.openai")


def _form(question: Question) -> dict[str, Any]:
    return {"name": "answer", "strict": True, "schema": schema(question)}


def _data_url(picture: Picture) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture.data).decode()


def _chat_body(question: Question, config: OpenAIConfig) -> dict[str, Any]:
    """The body of a request to /chat/completions, beside the model."""
    images = [
        {"type": "image_url", "image_url": {"url": _data_url(picture), "detail": picture.detail}}
        for picture in question.pictures
    ]
    user = {"role": "user", "content": [{"type": "text", "text": question.text}, *images]}
    return {
        "messages": [{"role": "system", "content": RUBRIC}, user],
        "response_format": {"type": "json_schema", "json_schema": _form(question)},
        "max_completion_tokens": config.max_output_tokens,
    }


def _responses_body(question: Question, config: OpenAIConfig) -> dict[str, Any]:
    """The body of a request to /responses, beside the model."""
    images = [
        {"type": "input_image", "image_url": _data_url(picture), "detail": picture.detail}
        for picture in question.pictures
    ]
    return {
        "instructions": RUBRIC,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": question.text}, *images]}],
        "text": {"format": {"type": "json_schema", **_form(question)}},
        "max_output_tokens": config.max_output_tokens,
        "store": False,  # the server keeps no copy of the clips
    }


def _chat_fields(document: Any) -> _Fields:
    """The fields of a chat completion; KeyError and the like if it is none."""
    choice = document["choices"][0]
    text = _checked_text(choice["message"].get("content") or "")
    tokens = _tokens(document, "prompt_tokens", "completion_tokens")
    return _Fields(str(document["model"]), text, choice["message"].get("refusal"), choice.get("finish_reason"), tokens)


def _responses_fields(document: Any) -> _Fields:
    """The fields of a response; KeyError and the like if it is none."""
    parts = [part for item in document["output"] if item["type"] == "message" for part in item["content"]]
    text = _checked_text("".join(part["text"] for part in parts if part["type"] == "output_text"))
    refusal = next((part["refusal"] for part in parts if part["type"] == "refusal"), None)
    finish = (document.get("incomplete_details") or {}).get("reason")
    return _Fields(str(document["model"]), text, refusal, finish, _tokens(document, "input_tokens", "output_tokens"))


def _checked_text(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError("the answer is no text")
    return text


def _tokens(document: Any, *names: str) -> tuple[int, int] | None:
    """Tokens of input and output, where the response has a count of both that can be."""
    usage = document.get("usage") or {}
    used, made = (usage.get(name) for name in names)
    if isinstance(used, int) and isinstance(made, int) and 0 <= min(used, made) <= max(used, made) <= _MOST_TOKENS:
        return used, made
    return None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by the header Retry-After, a number or a date."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        return seconds if math.isfinite(seconds) and seconds >= 0 else None
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(date.timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


_RESPONSES = _Api(
    lambda client: client.responses, _responses_body, _responses_fields,
    'the server may have no /responses: try "chat"',
)  # fmt: skip
_CHAT = _Api(lambda client: client.chat.completions, _chat_body, _chat_fields, "the server has no chat completions")
_APIS = {"responses": _RESPONSES, "chat": _CHAT, "batch": _RESPONSES}
