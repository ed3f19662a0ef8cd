"""Questions one request each: several at once, with back-off, within the budget."""

import asyncio
import json
import logging
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from halo_fast.errors import UserError
from halo_fast.teachers.openai.client import connection_failure
from halo_fast.teachers.openai.ledger import Ledger
from halo_fast.teachers.openai.protocol import Outcome, endpoint, make_reply, read_failure, read_reply, request_body
from halo_fast.teachers.openai.questions import Answer, Job, Question, parse
from halo_fast.teachers.store import Reply, StoreBusyError

__all__ = ["answer_directly"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_STORE_TRIES, _STORE_PAUSE = 50, 0.5  # a locked store: tries, each as long as the store waits, and seconds between them
_LONGEST_DELAY = 60.0  # seconds of our own back-off
_UNAVAILABLE = 3  # questions in a row without any answer that end the run


async def answer_directly(
    client: Any, ledger: Ledger, jobs: Sequence[Job], seed: int
) -> AsyncIterator[tuple[int, list[Answer]]]:
    """The answers to every job's questions, as they come, with the job's index.

    Once the first question of a job has no usable answer, its others are not asked.

    Args:
        client: of the server.
        ledger: of requests; its config bounds requests at once, retries and attempts.
        jobs: each makes its questions when their turn comes.
        seed: of the jitter of delays.

    Raises:
        UserError: the budget is used up, the key or the request is refused, or the server is gone for good; what is
            under way then is still awaited and kept.
    """
    requests = _Requests(client, ledger, seed)
    tasks: set[asyncio.Task[tuple[int, list[Answer]]]] = set()
    done: set[asyncio.Task[tuple[int, list[Answer]]]] = set()
    waiting = enumerate(jobs)
    try:
        while True:
            while len(tasks) < ledger.config.max_concurrency and (job := next(waiting, None)) is not None:
                tasks.add(asyncio.create_task(requests.answer(*job)))
            if not tasks:
                return
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    except Exception as error:
        requests.stop(error)
        # Several can fail together: one error is raised, and asyncio would log the others if nobody took them.
        await asyncio.gather(*tasks, *done, return_exceptions=True)
        raise


class _Requests:
    """Requests under way, and what they share: a pause that the server asked for, and an error that ends all."""

    def __init__(self, client: Any, ledger: Ledger, seed: int) -> None:
        self._client, self._ledger, self._config, self._seed = client, ledger, ledger.config, seed
        self._resume_at = 0.0
        self._under_way = self._unavailable = 0
        self._stopped: BaseException | None = None
        self._halt, self._settled = asyncio.Event(), asyncio.Event()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def stop(self, error: BaseException) -> None:
        """End all delays; requests that are not sent yet raise `error`."""
        self._stopped = error
        self._halt.set()

    async def answer(self, index: int, job: Job) -> tuple[int, list[Answer]]:
        """The index of a job and the answers to its questions, up to the first question if that has none."""
        answers: list[Answer] = []
        for question in await asyncio.to_thread(job):
            # equal clips make equal questions: the second one finds the first one's answer
            async with self._locks[question.key]:
                answers.append(self._ledger.final(question) or await self._ask(question))
            if answers[0].status != "ok":
                break
        return index, answers

    async def _ask(self, question: Question) -> Answer:
        """Send a question until it has a usable answer or has used its attempts or retries."""
        failures, attempts = 0, self._ledger.answered(question)
        while True:
            outcome = await self._send_reserved(question)
            reply = outcome.reply
            if outcome.fatal:
                raise UserError(reply.reason)
            if reply.status in ("failed", "lost"):
                failures += 1
                if failures > self._config.max_retries:
                    return self._give_up(reply)
                await self._back_off(question, failures, outcome.wait)
                continue
            self._unavailable = 0
            attempts += 1
            if reply.status == "ok":
                return parse(question, reply.text)
            # the same request would be rejected again
            if attempts >= self._config.max_attempts or reply.status == "rejected":
                return Answer(reply.status, reason=reply.reason)

    async def _send_reserved(self, question: Question) -> Outcome:
        """Enter a request, send it, and settle it."""
        number = await self._reserve(question)
        try:
            outcome = await self._send(question)
            await _when_unlocked(lambda: self._ledger.settle({number: outcome.reply}))
            self._ledger.check({number: outcome.reply})
        finally:
            self._under_way -= 1
            self._settled.set()
        return outcome

    def _give_up(self, last: Reply) -> Answer:
        self._unavailable += 1
        if self._unavailable >= _UNAVAILABLE:
            raise UserError(f"{last.reason}; {_UNAVAILABLE} questions got no answer; run again to continue")
        return Answer("unavailable", reason=last.reason)

    async def _reserve(self, question: Question) -> int:
        """Enter a request at its highest cost; wait for others to settle if only they use up the budget."""
        while True:
            while (left := self._resume_at - time.monotonic()) > 0 and self._stopped is None:
                await self._sleep(left)
            if self._stopped is not None:
                raise self._stopped
            numbers = await _when_unlocked(lambda: self._ledger.reserve([question]))
            if numbers is not None:
                self._under_way += 1
                return numbers[question.key]
            if not self._under_way:
                raise UserError(
                    f"annotate.openai.budget: ${self._ledger.store.spent():.4f} of ${self._config.budget:g} are spent "
                    f"and the next request may cost ${self._ledger.cost([question]):.4f}; raise the budget and run "
                    f"again to continue"
                )
            self._settled.clear()
            await self._settled.wait()

    async def _send(self, question: Question) -> Outcome:
        """Send a question once."""
        import openai

        # before the timeout starts: the client imports what it needs on first use
        send, body = endpoint(self._client, self._config).with_raw_response, request_body(question, self._config)
        try:
            # the client's own timeout starts again with every piece that arrives
            async with asyncio.timeout(self._config.timeout):
                # explicit, because servers differ in what they do by default
                response = await send.create(**body, stream=False)
                content = response.http_response.content
        except openai.APIStatusError as error:
            return read_failure(error.status_code, error.body, error.response.headers, self._config)
        except (TimeoutError, openai.APIConnectionError) as error:
            return connection_failure(error, self._config)
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            return Outcome(make_reply("malformed", f"the response is no JSON: {content.decode('utf-8', 'replace')}"))
        if isinstance(document, dict) and document.get("status") == "failed":
            return read_failure(500, document, response.headers, self._config)
        return Outcome(read_reply(question, document, self._config))

    async def _back_off(self, question: Question, failures: int, asked: float | None) -> None:
        """Wait twice as long each time; all requests wait if the server asked for it."""
        jitter = random.Random(f"{self._seed} {question.key} {failures}").uniform(0.5, 1.0)
        if asked is not None:
            self._resume_at = max(self._resume_at, time.monotonic() + asked)
        delay = min(self._config.retry_delay * 2.0 ** (failures - 1), _LONGEST_DELAY)
        await self._sleep(jitter * delay)

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._halt.wait()
        except TimeoutError:
            return


async def _when_unlocked(write: Callable[[], Result]) -> Result:
    """What a write to the store returns; while another process has it locked, answers under way are waited with."""
    for attempt in range(_STORE_TRIES):
        try:
            return write()
        except StoreBusyError as error:
            if attempt == 0:
                logger.warning("annotate: %s; waiting for it", str(error).partition(";")[0])
            await asyncio.sleep(_STORE_PAUSE)
    return write()
