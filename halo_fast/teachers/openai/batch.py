"""Questions through the Batch API: half the price, answers within a day, and a killed run finds its batches again."""

import asyncio
import json
import logging
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from halo_fast.errors import UserError
from halo_fast.teachers.openai.client import named_errors
from halo_fast.teachers.openai.ledger import Ledger
from halo_fast.teachers.openai.pricing import prompt_tokens
from halo_fast.teachers.openai.protocol import make_reply, read_failure, read_reply, request_body, scrub
from halo_fast.teachers.openai.questions import Answer, Job, Question
from halo_fast.teachers.store import Reply

__all__ = ["answer_in_batches"]

logger = logging.getLogger(__name__)

# of one batch, below OpenAI's 50 000 requests and 200 MB
_MOST_REQUESTS, _MOST_BYTES = 50_000, 150_000_000
_OVERHEAD = 20_000  # bytes of a request beside its pictures
_ENDED = {"completed", "expired", "cancelled", "failed"}
_NAME = "halo_fast"  # of the metadata field by which a batch is found again
_SLOWEST_POLL = 60.0  # seconds
_QUEUE = re.compile(r"token_limit_exceeded|enqueued.token", re.IGNORECASE)  # the queue of batches is full
_AGAIN = "run again to continue"


async def answer_in_batches(
    client: Any, ledger: Ledger, jobs: Sequence[Job], seed: int
) -> AsyncIterator[tuple[int, list[Answer]]]:
    """The answers to every job's questions, with the job's index, when the batches that hold them have ended.

    A batch is entered in the store before it is uploaded, at its full cost, and named there as soon as the server has
    taken it. One that was taken just before a kill is found at the server by its metadata. Questions whose answers are
    unusable go into another batch, max_attempts in all. No more than max_queued_tokens wait at the server at once; if
    its own limit is lower, half as many do from then on.

    Args:
        client: of the server.
        ledger: of requests.
        jobs: each makes its questions, twice: pictures are made again when they are sent.
        seed: not used; there are no random delays.

    Raises:
        UserError: the budget does not hold a batch, or the server refuses it.
    """
    # uploads and polls cost nothing, so the client may repeat them
    batches = _Batches(client, client.with_options(max_retries=ledger.config.max_retries), ledger)
    await batches.find_again()
    waiting = {}
    for index, job in enumerate(jobs):
        questions = await asyncio.to_thread(job)
        batches.tokens |= {question.key: prompt_tokens(question, ledger.config) for question in questions}
        # without pictures: those of all clips together may not fit into memory
        waiting[index] = [replace(question, pictures=()) for question in questions]
    known = {question.key: question for questions in waiting.values() for question in questions}
    while True:
        await batches.collect(known)
        for index, questions in list(waiting.items()):
            answers = batches.answers(questions)
            if answers is not None:
                del waiting[index]
                yield index, answers
        if not waiting:
            return
        await batches.submit_some([jobs[index] for index in waiting])


@dataclass
class _Batches:
    """A teacher's batches at a server.

    Args:
        client: never repeats a request by itself.
        patient: repeats those that cost nothing.
        ledger: of requests and batches.
        failed: why questions have no answer yet, by their keys.
        tokens: of the questions' prompts, about, by their keys.
        tries: batches that each question was sent in.
        bound: tokens that may wait at the server at once; None for any number.
    """

    client: Any
    patient: Any
    ledger: Ledger
    failed: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    tries: Counter[str] = field(default_factory=Counter)
    bound: float | None = field(init=False)

    def __post_init__(self) -> None:
        self.bound = self.ledger.config.max_queued_tokens

    def answers(self, questions: Sequence[Question]) -> list[Answer] | None:
        """The answers of a job, up to the first if that is unusable; None while one is missing and a try is left."""
        answers: list[Answer] = []
        for question in questions:
            answer = self.ledger.final(question)
            if answer is None:
                if self.tries[question.key] < self.ledger.config.max_attempts:
                    return None
                answer = Answer("unavailable", reason=self.failed.get(question.key, "no answer in any batch"))
            answers.append(answer)
            if answers[0].status != "ok":
                return answers
        return answers

    async def find_again(self) -> None:
        """Look up batches that were entered but not named; those that the server never took cost nothing."""
        store = self.ledger.store
        entered = store.open_batches(self.ledger.teacher)
        nameless = {key: requests for key, (number, requests) in entered.items() if number is None}
        if not nameless:
            return
        with named_errors(self.ledger.config, _AGAIN):
            async for batch in self.patient.batches.list(limit=100):
                key = (batch.metadata or {}).get(_NAME)
                if key in nameless:
                    store.name_batch(key, batch.id)
                    del nameless[key]
        for key, requests in nameless.items():
            never = Reply("failed", "the batch was never taken")
            self.ledger.settle(dict.fromkeys(requests.values(), never))
            store.end_batch(key)

    async def submit_some(self, jobs: Sequence[Job]) -> None:
        """Send questions that have no answer yet, as many as may wait at once, in as few batches as their size allows.

        At least one is sent, however many tokens it has.
        """
        part: list[Question] = []
        size, queued, taken = 0, 0, set[str]()
        async for question in self._unanswered(jobs):
            if question.key in taken:
                continue
            queued += self.tokens[question.key]
            if taken and self.bound is not None and queued > self.bound:
                break
            taken.add(question.key)
            volume = sum(len(picture.data) for picture in question.pictures) * 4 // 3 + _OVERHEAD
            if part and (size + volume > _MOST_BYTES or len(part) == _MOST_REQUESTS):
                await self._submit(part)
                part, size = [], 0
            part.append(question)
            size += volume
        if part:
            await self._submit(part)

    async def _unanswered(self, jobs: Sequence[Job]) -> AsyncIterator[Question]:
        """The jobs' questions that have no final answer and a try left."""
        for job in jobs:
            for question in await asyncio.to_thread(job):
                if self.tries[question.key] < self.ledger.config.max_attempts and self.ledger.final(question) is None:
                    yield question

    async def _submit(self, questions: Sequence[Question]) -> None:
        """Enter a batch in the store, upload it, and name it; UserError if the budget does not hold it."""
        key, config = uuid4().hex, self.ledger.config
        if self.ledger.reserve(questions, batch=key) is None:
            raise UserError(
                f"annotate.openai.budget: a batch of {len(questions)} requests may cost "
                f"${self.ledger.cost(questions):.2f}, ${self.ledger.store.spent():.2f} of ${config.budget:g} are "
                f"spent; raise it or lower annotate.num_clips"
            )
        lines = "\n".join(_line(question, self.ledger) for question in questions).encode()
        with named_errors(config, "the batch was not uploaded"):
            file = await self.patient.files.create(file=(f"{key}.jsonl", lines), purpose="batch")
        # never repeated blindly: a second batch would be paid for as well
        with named_errors(config, "it is unknown whether the batch was taken; run again, and it is looked up"):
            batch = await self.client.batches.create(
                input_file_id=file.id, endpoint="/v1/responses", completion_window="24h", metadata={_NAME: key}
            )
        self.ledger.store.name_batch(key, batch.id)
        self.tries.update(question.key for question in questions)
        logger.info("annotate: batch %s of %d requests", batch.id, len(questions))

    async def collect(self, known: Mapping[str, Question]) -> None:
        """Wait until every open batch has ended, and settle its requests."""
        store, config = self.ledger.store, self.ledger.config
        for key, (number, requests) in store.open_batches(self.ledger.teacher).items():
            batch = await self._ended(number)
            replies: dict[int, Reply] = {}
            for file in (batch.output_file_id, batch.error_file_id):
                if file:
                    with named_errors(config, _AGAIN):
                        content = (await self.patient.files.content(file)).content
                    replies |= _replies(content.decode("utf-8", "replace"), requests, known, self.ledger)
            for question, request in requests.items():
                never = Reply("failed", f"batch {batch.status} without an answer")
                self.failed[question] = replies.setdefault(request, never).reason
            self.ledger.settle(replies)
            store.end_batch(key)
            self.ledger.check(replies)
            if batch.status == "failed":
                errors = getattr(batch.errors, "data", None) or []
                reasons = scrub("; ".join(str(error.message) for error in errors) or "no reason given")[:200]
                if not any(_QUEUE.search(f"{error.code} {error.message}") for error in errors):
                    raise UserError(f"{config.base_url}: batch {number} was refused: {reasons}")
                self._lower_bound(list(requests), reasons)

    def _lower_bound(self, keys: Sequence[str], reasons: str) -> None:
        """Let half as many tokens wait as in a batch that the server's queue did not take; nothing was charged.

        Raises:
            UserError: the batch was a single question.
        """
        if len(keys) == 1:
            raise UserError(
                f"{self.ledger.config.base_url}: the batch queue has no room for a single question: {reasons}; wait "
                f"for your other batches to end, or set annotate.openai.api: responses"
            )
        self.tries.subtract(keys)
        self.bound = min(self.bound or math.inf, sum(self.tokens.get(key, 0) for key in keys) // 2)
        logger.warning(
            "annotate: %s; from now on at most %d tokens wait at once, see annotate.openai.max_queued_tokens",
            reasons,
            self.bound,
        )

    async def _ended(self, number: str | None) -> Any:
        """The batch when it has ended."""
        delay = self.ledger.config.retry_delay
        while True:
            with named_errors(self.ledger.config, _AGAIN):
                batch = await self.patient.batches.retrieve(number)
            if batch.status in _ENDED:
                return batch
            await asyncio.sleep(delay)
            delay = min(2 * delay, _SLOWEST_POLL)


def _line(question: Question, ledger: Ledger) -> str:
    body = request_body(question, ledger.config)
    return json.dumps({"custom_id": question.key, "method": "POST", "url": "/v1/responses", "body": body})


def _replies(
    content: str, requests: Mapping[str, int], known: Mapping[str, Question], ledger: Ledger
) -> dict[int, Reply]:
    """The replies in an output or error file, by the requests' numbers; unreadable lines are left out."""
    return {requests[key]: _reply(entry, known.get(key), ledger) for key, entry in _entries(content) if key in requests}


def _entries(content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The readable lines of an output or error file, each with its question's key."""
    for line in content.split("\n"):
        try:
            entry = json.loads(line)
            key = entry["custom_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(key, str) and isinstance(entry.get("response") or {}, dict):
            yield key, entry


def _reply(entry: Mapping[str, Any], question: Question | None, ledger: Ledger) -> Reply:
    """What one line of an output or error file says."""
    response = entry.get("response") or {}
    status, body = response.get("status_code"), response.get("body")
    if status == 200:
        return read_reply(question, body, ledger.config)
    if isinstance(status, int):
        return read_failure(status, body, {}, ledger.config).reply
    return make_reply("failed", entry.get("error"))
