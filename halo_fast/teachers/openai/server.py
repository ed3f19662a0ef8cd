"""Asks questions of an OpenAI-compatible server, within bounds on money, requests at once and retries."""

import asyncio
import base64
import email.utils
import json
import math
import os
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from halo_fast.errors import UserError
from halo_fast.teachers.base import RUBRIC
from halo_fast.teachers.openai.config import OpenAIConfig
from halo_fast.teachers.openai.pictures import Picture
from halo_fast.teachers.openai.questions import Answer, Question, parse, schema
from halo_fast.teachers.store import LabelStore, Reply

__all__ = ["Job", "Server", "image_tokens", "reply", "scrub"]

Job = Callable[[], list[Question]]  # the questions about one clip or pair, made when their turn comes

_KEY = "OPENAI_API_KEY"
_BATCH_SHARE = 0.5  # of the price, in the Batch API
_LONGEST_DELAY, _LONGEST_WAIT = 60.0, 600.0  # seconds: of our own back-off, and that a server may ask for
_POLICY_CODES = ("content_policy_violation", "content_filter", "invalid_prompt")
_SHORTEST_SECRET = 8  # characters; a shorter key is no secret, and cutting it out would spoil words and numbers
_MOST_TOKENS = 10**9  # that a count can mean; beyond, it is a fault of the server
_UNAVAILABLE = 3  # questions without any answer, one after another, that end the run


def image_tokens(picture: Picture, base: int, tile: int) -> int:
    """Tokens of an image by OpenAI's published rule for gpt-4o.

    Low detail costs `base`. At high detail the image is scaled to fit 2048 x 2048, then its shorter side to 768, and
    costs base + tile times the 512-pixel squares that cover it.
    """
    if picture.detail == "low":
        return base
    sides = (picture.width, picture.height)
    scale = min(1.0, 2048 / max(sides))
    scale *= 768 / (scale * min(sides))
    return base + tile * math.prod(math.ceil(round(side * scale) / 512) for side in sides)


def scrub(value: object) -> str:
    """What a server sent as text that can be stored: without the API key, plain or in JSON's escapes."""
    try:
        text = str(value).encode("utf-8", "replace").decode()
    except RecursionError:
        return "nested too deeply"
    key = os.environ.get(_KEY, "")
    if len(key) < _SHORTEST_SECRET:
        return text
    # an answer is stored as it came and parsed later, which would put an escaped key together again
    escaped = "".join(rf"\\{{0,8}}(?:{re.escape(letter)}|u(?i:{ord(letter):04x}))" for letter in key)
    return re.sub(escaped, f"<{_KEY}>", text)


def reply(
    status: str, reason: object = "", text: str = "", model: str | None = None, tokens: tuple[int, int] | None = None
) -> Reply:
    """A reply whose every text is scrubbed, and then cut, lest a part of the key be left."""
    return Reply(status, scrub(reason)[:200], scrub(text), None if model is None else scrub(model)[:200], tokens)


@dataclass(frozen=True)
class _Outcome:
    """A reply, the seconds that the server asks to wait, and whether any other question would fare the same."""

    reply: Reply
    wait: float | None = None
    fatal: bool = False


class Server:
    """A server and what may be spent there.

    Args:
        config: address, bounds and prices.
        store: where requests are entered before they are sent and answers kept as they come.
        teacher: name under which requests are entered.
        seed: of the jitter of delays.

    Raises:
        UserError: settings that cannot be.
    """

    def __init__(self, config: OpenAIConfig, store: LabelStore, teacher: str, seed: int) -> None:
        _check(config)
        self.config, self.store, self.teacher = config, store, teacher
        share = _BATCH_SHARE if config.api == "batch" else 1.0
        self.prices = (config.input_price * share / 1e6, config.output_price * share / 1e6)
        self._seed = seed
        self._resume_at = 0.0
        self._under_way = self._unavailable = 0
        self._stopped: BaseException | None = None

    async def answers(self, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, list[Answer]]]:
        """The answers to every job's questions, as they come, with the job's index.

        Once the first question of a job has no usable answer, its others are not asked.

        Raises:
            UserError: the budget is used up, the key or the request is refused, or the server is gone for good; what
                is under way then is still awaited and kept.
        """
        self._halt, self._settled = asyncio.Event(), asyncio.Event()
        self._asking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        async with self._client() as client:
            if self.config.api == "batch":
                from halo_fast.teachers.openai.batch import answers_in_batches

                async for index, found in answers_in_batches(self, client, jobs):
                    yield index, found
                return
            tasks: set[asyncio.Task[tuple[int, list[Answer]]]] = set()
            try:
                for index, job in enumerate(jobs):
                    if len(tasks) >= self.config.max_concurrency:
                        done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                        for task in done:
                            yield task.result()
                    tasks.add(asyncio.create_task(self._answer(client, index, job)))
                while tasks:
                    done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
            except Exception as error:
                self._stopped = error
                self._halt.set()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise

    def cost(self, question: Question, most: bool = True) -> float:
        """Dollars that a question costs at most, or about.

        No tokenizer makes more tokens than bytes; about four bytes a token is usual.
        """
        config = self.config
        size = len((RUBRIC + question.text + json.dumps(schema(question))).encode())
        images = sum(image_tokens(picture, config.image_tokens, config.tile_tokens) for picture in question.pictures)
        input_tokens = size + 100 if most else size / 4
        output_tokens = config.max_output_tokens if most else 40 + 8 * len(question.fields)
        return (images + input_tokens) * self.prices[0] + output_tokens * self.prices[1]

    def final(self, question: Question) -> Answer | None:
        """The stored answer that stands: a usable one, or the last that may be paid for; None if there is none yet."""
        answers = [
            parse(question, known.text) if known.status == "ok" else Answer(known.status, reason=known.reason)
            for known in self.store.answers(question.key)
        ]
        usable = [answer for answer in answers if answer.status == "ok"]
        return next(iter(usable or answers[self.config.max_attempts - 1 :]), None)

    def body(self, question: Question) -> dict[str, Any]:
        """The request in the form of the API that is used."""
        config = self.config
        form = {"name": "answer", "strict": True, "schema": schema(question)}
        body: dict[str, Any] = {"model": config.model}
        if config.temperature is not None:
            body["temperature"] = config.temperature
        if config.api == "chat":
            images = [
                {"type": "image_url", "image_url": {"url": _data_url(picture), "detail": picture.detail}}
                for picture in question.pictures
            ]
            user = {"role": "user", "content": [{"type": "text", "text": question.text}, *images]}
            body["messages"] = [{"role": "system", "content": RUBRIC}, user]
            body["response_format"] = {"type": "json_schema", "json_schema": form}
            body["max_completion_tokens"] = config.max_output_tokens
            return body
        images = [
            {"type": "input_image", "image_url": _data_url(picture), "detail": picture.detail}
            for picture in question.pictures
        ]
        body["instructions"] = RUBRIC
        body["input"] = [{"role": "user", "content": [{"type": "input_text", "text": question.text}, *images]}]
        body["text"] = {"format": {"type": "json_schema", **form}}
        body["max_output_tokens"] = config.max_output_tokens
        body["store"] = False  # the clips are not to stay at the server
        return body

    def read(self, question: Question | None, document: object) -> Reply:
        """What a response of the API says; without its question the text is kept, to be read by the schema later."""
        try:
            model, text, refusal, finish, tokens = _fields(document, self.config.api == "chat")
        except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            return reply("malformed", f"not a response of this API: {type(error).__name__} {error}")
        text = scrub(text)
        if not _same_model(self.config.model, model):
            return reply("wrong_model", f"asked {self.config.model}, {model} answered", text, None, tokens)
        if finish in ("length", "max_output_tokens"):
            return reply("truncated", f"longer than {self.config.max_output_tokens} tokens", text, model, tokens)
        if refusal or finish == "content_filter":
            return reply("refused", refusal or finish, text, model, tokens)
        answer = parse(question, text) if question else Answer("ok")
        return reply(answer.status, answer.reason, text, model, tokens)

    def failure(self, status: int, document: object, headers: Mapping[str, str]) -> _Outcome:
        """What an HTTP error means: a refusal, a reason to wait, or one to stop."""
        error = document.get("error", document) if isinstance(document, dict) else {}
        error = error if isinstance(error, dict) else {"message": error}
        message = scrub(error.get("message") or error.get("detail") or document or "")[:200]
        reason = f"{self.config.base_url} answered {status}: {message}"
        if status == 400 and error.get("code") in _POLICY_CODES:
            return _Outcome(Reply("refused", message, tokens=(0, 0)))
        if status in (408, 409, 425, 429) or status >= 500 and status != 501:
            wait = _retry_after(headers)
            if error.get("code") == "insufficient_quota":
                return _Outcome(Reply("failed", f"{reason}; the account has no credit left"), fatal=True)
            if wait is not None and wait > _LONGEST_WAIT:
                return _Outcome(Reply("failed", f"{reason}; wait {wait:.0f} s and run again"), fatal=True)
            return _Outcome(Reply("failed", reason), wait)
        cure = {401: f"check {_KEY}", 403: f"check what {_KEY} may use", 413: "lower annotate.openai.max_images"}
        if status in (404, 405, 501):
            other = "has no chat completions" if self.config.api == "chat" else 'may have no /responses: try "chat"'
            cure[status] = f"check annotate.openai.model and base_url; annotate.openai.api: the server {other}"
        told = cure.get(status, "the server does not take such requests; check annotate.openai")
        return _Outcome(Reply("failed", f"{reason}; {told}"), fatal=True)

    def _client(self) -> Any:
        from openai import AsyncOpenAI

        key = os.environ.get(_KEY, "")
        if not all("!" <= letter <= "~" for letter in key):
            raise UserError(
                f"{_KEY}: expected ASCII letters, digits and signs, found a space, a line end or another character; "
                f"export the key without it"
            )
        if not key and urlsplit(self.config.base_url).hostname == "api.openai.com":
            raise UserError(f"{_KEY}: expected an API key in the environment, found none; export {_KEY}=...")
        # Retries are ours: each one is entered in the store before it is sent. A server of one's own needs no key.
        return AsyncOpenAI(
            api_key=key or "none",
            base_url=self.config.base_url,
            timeout=self.config.timeout,
            max_retries=0,
        )

    async def _answer(self, client: Any, index: int, job: Job) -> tuple[int, list[Answer]]:
        answers: list[Answer] = []
        for question in await asyncio.to_thread(job):
            # equal clips make equal questions: whoever comes second finds the first one's answer
            async with self._asking[question.key]:
                answers.append(self.final(question) or await self._ask(client, question))
            if answers[0].status != "ok":
                break
        return index, answers

    async def _ask(self, client: Any, question: Question) -> Answer:
        failures, attempts = 0, len(self.store.answers(question.key))
        while True:
            number = await self._reserve(question)
            try:
                outcome = await self._send(client, question)
                self.store.settle({number: outcome.reply}, self.prices)
            finally:
                self._under_way -= 1
                self._settled.set()
            answered = outcome.reply
            if outcome.fatal:
                raise UserError(answered.reason)
            if answered.status in ("failed", "lost"):
                failures += 1
                if failures > self.config.max_retries:
                    return self._give_up(answered)
                await self._wait(question, failures, outcome.wait)
                continue
            self._unavailable = 0
            attempts += 1
            if answered.status == "ok":
                return parse(question, answered.text)
            if attempts >= self.config.max_attempts:
                return Answer(answered.status, reason=answered.reason)

    def _give_up(self, last: Reply) -> Answer:
        self._unavailable += 1
        if self._unavailable >= _UNAVAILABLE:
            raise UserError(f"{last.reason}; {_UNAVAILABLE} questions got no answer; run again to continue")
        return Answer("unavailable", reason=last.reason)

    async def _reserve(self, question: Question) -> int:
        """Enter the request at its highest cost; wait for others to settle if only they stand in the budget's way."""
        while True:
            while (left := self._resume_at - time.monotonic()) > 0 and self._stopped is None:
                await self._sleep(left)
            if self._stopped is not None:
                raise self._stopped
            cost, budget = self.cost(question), self.config.budget
            numbers = self.store.reserve({question.key: cost}, self.teacher, budget)
            if numbers is not None:
                self._under_way += 1
                return numbers[question.key]
            if not self._under_way:
                raise UserError(
                    f"annotate.openai.budget: ${self.store.spent():.4f} of ${budget:g} are spent and the next request "
                    f"may cost ${cost:.4f}; raise the budget and run again to continue"
                )
            self._settled.clear()
            await self._settled.wait()

    async def _send(self, client: Any, question: Question) -> _Outcome:
        import openai

        chat, timeout = self.config.api == "chat", self.config.timeout
        # the client imports what it needs at the first request: not on the server's time
        create, body = (client.chat.completions if chat else client.responses).with_raw_response, self.body(question)
        try:
            # the client's own timeout starts anew with every piece that arrives
            async with asyncio.timeout(timeout):
                # told outright, because servers differ in what they do by default
                response = await create.create(**body, stream=False)
                content = response.http_response.content
        except openai.APIStatusError as error:
            return self.failure(error.status_code, error.body, error.response.headers)
        except (TimeoutError, openai.APIConnectionError) as error:
            if type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout"):
                return _Outcome(Reply("failed", f"{self.config.base_url}: no connection"))
            if isinstance(error, TimeoutError | openai.APITimeoutError):
                return _Outcome(Reply("lost", f"{self.config.base_url}: no answer within {timeout:g} s"))
            return _Outcome(Reply("lost", f"{self.config.base_url}: the connection broke"))
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            return _Outcome(Reply("malformed", "the response is no JSON"))
        if isinstance(document, dict) and document.get("status") == "failed":
            return self.failure(500, document, response.headers)
        return _Outcome(self.read(question, document))

    async def _wait(self, question: Question, failures: int, asked: float | None) -> None:
        """Back off, by twice as long each time; if the server says how long, everybody waits."""
        jitter = random.Random(f"{self._seed} {question.key} {failures}").uniform(0.5, 1.0)
        if asked is not None:
            self._resume_at = max(self._resume_at, time.monotonic() + asked)
        delay = min(self.config.retry_delay * 2.0 ** (failures - 1), _LONGEST_DELAY)
        await self._sleep(jitter * delay)

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._halt.wait()
        except TimeoutError:
            return


def _check(config: OpenAIConfig) -> None:
    if config.api not in ("responses", "chat", "batch"):
        raise UserError(f'annotate.openai.api: expected "responses", "chat" or "batch", got {config.api!r}')
    address = urlsplit(config.base_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(f"annotate.openai.base_url: expected http(s)://host/v1, got {config.base_url!r}")
    if address.username or address.password or address.query:
        raise UserError(f"annotate.openai.base_url: expected an address without credentials; keys belong in {_KEY}")
    near = address.hostname in ("localhost", "127.0.0.1", "::1")
    if address.scheme == "http" and not near and os.environ.get(_KEY):
        raise UserError(f"annotate.openai.base_url: {_KEY} would travel unencrypted; use https, or unset {_KEY}")
    for name, least in (("max_concurrency", 1), ("max_attempts", 1), ("max_frames", 1), ("patch_frames", 1),
                        ("max_images", 1), ("max_output_tokens", 1), ("max_retries", 0), ("retry_delay", 0),
                        ("budget", 0), ("input_price", 0), ("output_price", 0)):  # fmt: skip
        if not getattr(config, name) >= least:
            raise UserError(f"annotate.openai.{name}: expected at least {least}, got {getattr(config, name)}")
    if config.max_frames > config.max_images:
        raise UserError(
            f"annotate.openai.max_frames: expected at most max_images = {config.max_images}, got {config.max_frames}"
        )
    if not config.timeout > 0:
        raise UserError(f"annotate.openai.timeout: expected seconds above 0, got {config.timeout}")
    if config.max_patches is not None and config.max_patches < 1:
        raise UserError(f"annotate.openai.max_patches: expected at least 1 or null, got {config.max_patches}")


def _data_url(picture: Picture) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture.data).decode()


def _fields(document: Any, chat: bool) -> tuple[str, str, str | None, str | None, tuple[int, int] | None]:
    """Model, text, refusal, why it ended and tokens of a response; KeyError and the like if it is none."""
    if chat:
        choice = document["choices"][0]
        text, refusal = choice["message"].get("content") or "", choice["message"].get("refusal")
        finish, names = choice.get("finish_reason"), ("prompt_tokens", "completion_tokens")
    else:
        parts = [part for item in document["output"] if item["type"] == "message" for part in item["content"]]
        text = "".join(part["text"] for part in parts if part["type"] == "output_text")
        refusal = next((part["refusal"] for part in parts if part["type"] == "refusal"), None)
        finish, names = (document.get("incomplete_details") or {}).get("reason"), ("input_tokens", "output_tokens")
    usage = document.get("usage") or {}
    used, made = (usage.get(name) for name in names)
    tokens = None
    if isinstance(used, int) and isinstance(made, int) and 0 <= min(used, made) <= max(used, made) <= _MOST_TOKENS:
        tokens = (used, made)
    if not isinstance(text, str):
        raise TypeError("the text is none")
    return str(document["model"]), text, refusal, finish, tokens


def _same_model(asked: str, answered: str) -> bool:
    """Whether it is the model asked for: by its name, with a date after it, or with a revision."""
    return re.fullmatch(re.escape(asked) + r"(-\d{4}-\d\d-\d\d|@.+)?", answered) is not None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait."""
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


def announce(server: Server, jobs: Mapping[str, Sequence[Job]]) -> None:
    """Tell on stderr what jobs will cost, the first of each kind taken for all; what cannot be paid for is refused.

    Raises:
        UserError: nothing is spent yet and the estimate exceeds the budget.
    """
    dollars, requests, images = 0.0, 0, 0
    for some in jobs.values():
        questions = some[0]() if some else []
        dollars += len(some) * sum(server.cost(question, most=False) for question in questions)
        requests += len(some) * len(questions)
        images += len(some) * sum(len(question.pictures) for question in questions)
    spent = server.store.spent()
    told = (
        f"{', '.join(f'{len(some)} {kind}' for kind, some in jobs.items() if some)}, {requests} requests, "
        f"{images} images, about ${dollars:.2f} (spent ${spent:.2f}, budget ${server.config.budget:.2f})"
    )
    print(f"annotate: {told}", file=sys.stderr)
    if not spent and dollars > server.config.budget:
        raise UserError(f"annotate.openai.budget: {told}; raise the budget or lower annotate.num_clips")
