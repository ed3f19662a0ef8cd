"""Questions through the Batch API: half the price, answers within a day, and a killed run finds its batches again."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

from halo_fast.errors import UserError
from halo_fast.teachers.openai.questions import Answer, Question
from halo_fast.teachers.openai.server import Server, reply, scrub
from halo_fast.teachers.store import Reply

__all__ = ["answers_in_batches"]

# of one batch, below OpenAI's 50 000 requests and 200 MB
_MOST_REQUESTS, _MOST_BYTES = 50_000, 150_000_000
_ENDED = {"completed", "expired", "cancelled", "failed"}
_NAME = "halo_fast"  # of the metadata field by which a batch is found again
_SLOWEST_POLL = 60.0  # seconds


async def answers_in_batches(
    server: Server, client: Any, jobs: Sequence[Callable[[], list[Question]]]
) -> AsyncIterator[tuple[int, list[Answer]]]:
    """The answers to every job's questions, with the job's index, when the batches that hold them have ended.

    A batch is entered in the store before it is uploaded, at its full cost, and named there as soon as the server has
    taken it; one that was taken just before a kill is found at the server by its metadata. Questions whose answers are
    unusable go into another batch, max_attempts in all.

    Raises:
        UserError: the budget does not hold a batch, or the server refuses it.
    """
    # uploads and polls cost nothing, so the client may repeat them
    patient = client.with_options(max_retries=server.config.max_retries)
    await _find_again(server, patient)
    # without pictures, which are made anew when they are sent: those of all clips together may not fit into memory
    waiting = {
        index: [replace(question, pictures=()) for question in await asyncio.to_thread(job)]
        for index, job in enumerate(jobs)
    }
    known = {question.key: question for questions in waiting.values() for question in questions}
    failed: dict[str, str] = {}
    for attempt in range(server.config.max_attempts + 1):
        await _collect(server, patient, known, failed)
        for index, questions in list(waiting.items()):
            answers = [server.final(question) for question in questions]
            if attempt == server.config.max_attempts:
                answers = [
                    answer or Answer("unavailable", reason=failed.get(question.key, "no answer in any batch"))
                    for answer, question in zip(answers, questions, strict=True)
                ]
            if answers[0] is not None and answers[0].status != "ok":
                answers = answers[:1]
            found = [answer for answer in answers if answer is not None]
            if len(found) == len(answers):
                del waiting[index]
                yield index, found
        if not waiting:
            return
        await _submit_all(server, client, patient, [jobs[index] for index in waiting])


async def _submit_all(server: Server, client: Any, patient: Any, jobs: Sequence[Callable[[], list[Question]]]) -> None:
    """Send the jobs' questions that have no answer yet, in as few batches as their size allows."""
    part: list[Question] = []
    size, taken = 0, set[str]()
    for job in jobs:
        for question in await asyncio.to_thread(job):
            if question.key in taken or server.final(question) is not None:
                continue
            taken.add(question.key)
            volume = sum(len(picture.data) for picture in question.pictures) * 4 // 3 + 20_000
            if part and (size + volume > _MOST_BYTES or len(part) == _MOST_REQUESTS):
                await _submit(server, client, patient, part)
                part, size = [], 0
            part.append(question)
            size += volume
    if part:
        await _submit(server, client, patient, part)


async def _submit(server: Server, client: Any, patient: Any, questions: Sequence[Question]) -> None:
    key = uuid4().hex
    costs = {question.key: server.cost(question) for question in questions}
    if server.store.reserve(costs, server.teacher, server.config.budget, batch=key) is None:
        raise UserError(
            f"annotate.openai.budget: a batch of {len(costs)} requests may cost ${sum(costs.values()):.2f}, "
            f"${server.store.spent():.2f} of ${server.config.budget:g} are spent; raise it or lower annotate.num_clips"
        )
    lines = [
        json.dumps({"custom_id": question.key, "method": "POST", "url": "/v1/responses", "body": server.body(question)})
        for question in questions
    ]
    with _told(server, "the batch was not uploaded"):
        file = await patient.files.create(file=(f"{key}.jsonl", "\n".join(lines).encode()), purpose="batch")
    # never repeated unseen: a second batch would be paid for as well
    with _told(server, "it is unknown whether the batch was taken; run again, and it is looked up"):
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/responses", completion_window="24h", metadata={_NAME: key}
        )
    server.store.name_batch(key, batch.id)
    print(f"annotate: batch {batch.id} of {len(questions)} requests", file=sys.stderr)


async def _find_again(server: Server, client: Any) -> None:
    """Look up batches that were entered but not named; those that the server never took cost nothing."""
    entered = server.store.open_batches(server.teacher)
    nameless = {key: requests for key, (number, requests) in entered.items() if number is None}
    if not nameless:
        return
    with _told(server, "run again to continue"):
        async for batch in client.batches.list(limit=100):
            key = (batch.metadata or {}).get(_NAME)
            if key in nameless:
                server.store.name_batch(key, batch.id)
                del nameless[key]
    for key, requests in nameless.items():
        never = Reply("failed", "the batch was never taken")
        server.store.settle(dict.fromkeys(requests.values(), never), server.prices)
        server.store.end_batch(key)


async def _collect(server: Server, client: Any, known: Mapping[str, Question], failed: dict[str, str]) -> None:
    """Wait until every open batch has ended and settle its requests; `failed` is told why some have no answer."""
    for key, (number, requests) in server.store.open_batches(server.teacher).items():
        delay = server.config.retry_delay
        while True:
            with _told(server, "run again to continue"):
                batch = await client.batches.retrieve(number)
            if batch.status in _ENDED:
                break
            await asyncio.sleep(delay)
            delay = min(2 * delay, _SLOWEST_POLL)
        replies: dict[int, Reply] = {}
        for file in (batch.output_file_id, batch.error_file_id):
            if file:
                with _told(server, "run again to continue"):
                    content = (await client.files.content(file)).content
                replies |= _replies(server, content.decode("utf-8", "replace"), requests, known)
        for question, request in requests.items():
            never = Reply("failed", f"batch {batch.status} without an answer")
            failed[question] = replies.setdefault(request, never).reason
        server.store.settle(replies, server.prices)
        server.store.end_batch(key)
        if batch.status == "failed":
            errors = getattr(batch.errors, "data", None) or []
            reasons = "; ".join(str(error.message) for error in errors) or "no reason given"
            raise UserError(f"{server.config.base_url}: batch {number} was refused: {scrub(reasons)[:200]}")


def _replies(
    server: Server, content: str, requests: Mapping[str, int], known: Mapping[str, Question]
) -> dict[int, Reply]:
    """The replies in an output or error file, by request; what cannot be read is left out and so counts as failed."""
    replies = {}
    for line in content.split("\n"):
        try:
            entry = json.loads(line)
            request, response = requests[entry["custom_id"]], entry.get("response") or {}
            status, body = response.get("status_code"), response.get("body")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if status == 200:
            replies[request] = server.read(known.get(entry["custom_id"]), body)
        elif isinstance(status, int):
            replies[request] = server.failure(status, body, {}).reply
        else:
            replies[request] = reply("failed", entry.get("error"))
    return replies


@contextmanager
def _told(server: Server, cure: str) -> Iterator[None]:
    """Errors of the client as a UserError of one line, without the request that they carry."""
    import openai

    try:
        yield
    except openai.OpenAIError as error:
        raise UserError(f"{server.config.base_url}: {scrub(error)[:200]}; {cure}") from None
