"""GPT-4o, or any vision-language model behind an OpenAI-compatible server, as the teacher."""

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from halo_fast.errors import UserError
from halo_fast.files import hash_text
from halo_fast.patches import PIXELS, LatentFactors, PatchGrid
from halo_fast.teachers.base import Clip, TeacherRequest, read_options
from halo_fast.teachers.openai.batch import answer_in_batches
from halo_fast.teachers.openai.client import key_for, open_client
from halo_fast.teachers.openai.config import OpenAIConfig, check_config, normal_address
from halo_fast.teachers.openai.direct import answer_directly
from halo_fast.teachers.openai.ledger import Ledger
from halo_fast.teachers.openai.pictures import choose_patches
from halo_fast.teachers.openai.pricing import likely_cost
from halo_fast.teachers.openai.questions import Answer, Job, Question, ask_pair, ask_patches, ask_video
from halo_fast.teachers.rubric import RUBRIC_DIMENSIONS, Label
from halo_fast.teachers.store import LabelStore

__all__ = ["OpenAIJudge", "OpenAITeacher", "consistent", "load_openai"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# what an answer depends on; prices, bounds and retries may change while a run continues
_ASKED = ("model", "base_url", "max_frames", "patch_frames", "max_images", "temperature")
_SENDERS = {"responses": answer_directly, "chat": answer_directly, "batch": answer_in_batches}


def load_openai(request: TeacherRequest) -> "OpenAITeacher":
    """The teacher that a request describes; its options are fields of OpenAIConfig."""
    config = read_options(OpenAIConfig, request.options, "annotate.openai")
    kind = OpenAIJudge if config.pairwise else OpenAITeacher
    return kind(config, request.grid, request.store, request.factors, request.seed)


class OpenAITeacher:
    """A model that scores clips by the rubric.

    A clip is one request with frames of the whole and a few with frames cut along the grid. Every request is paid for
    once: requests and answers are kept in the store.

    Args:
        config: the model, its server and what it may cost.
        grid: patches that are scored.
        store: of answers and spending.
        factors: how latents lie on the clips, by which the grid divides them.
        seed: of delays and of drawn patches.

    Raises:
        UserError: settings that cannot be.
    """

    def __init__(
        self,
        config: OpenAIConfig,
        grid: tuple[int, int, int],
        store: LabelStore,
        factors: LatentFactors = PIXELS,
        seed: int = 0,
    ) -> None:
        check_config(config)
        values = vars(config) | {"base_url": normal_address(config.base_url)}
        # labels of before know no padding
        asked = [*(values[name] for name in _ASKED), list(factors[:3]) + [pad for pad in factors[3:] if pad]]
        self.grid = (grid[0], grid[1], grid[2])
        # which patches are drawn makes other labels, but of the same questions
        drawn = config.max_patches is not None and config.max_patches < math.prod(self.grid)
        choice = [config.max_patches, seed] if drawn else []
        self._asker = f"{config.model} {hash_text(json.dumps(asked))[:12]}"
        self.name = f"{config.model} {hash_text(json.dumps(asked + choice))[:12]}"
        self._config, self._factors, self._seed = config, factors, seed
        self._ledger = Ledger(store, self._asker, config)

    def labels(self, clips: Sequence[Clip], compared: Sequence[tuple[Clip, Clip]] = ()) -> Iterator[tuple[int, Label]]:
        """Labels as they come, each with the index of its clip.

        A label's status is that of the video's question. Patches whose questions were not answered stay NaN, and the
        label's reason says so. "unavailable" means that the server never answered; asking again pays nothing twice.

        Args:
            clips: to be scored.
            compared: pairs that are to be judged afterwards and belong to the estimate of what all will cost.

        Raises:
            UserError: the budget is used up, the server refuses requests or is gone, a clip does not fit the grid.
        """
        jobs = [partial(self._questions, clip) for clip in clips]
        kinds = {"clips": jobs, "pairs": [partial(self._comparisons, pair) for pair in compared]}
        return self._results(jobs, self._label, kinds)

    def check_budget(self, clips: Sequence[Clip], compared: Sequence[tuple[Clip, Clip]] = ()) -> None:
        """Log what clips and comparisons will cost, the first of each taken for all.

        Raises:
            UserError: there is no key, or nothing is spent yet and the estimate exceeds the budget.
        """
        key_for(self._config)
        if clips:
            self.estimate(clips, compared)

    def estimate(self, clips: Sequence[Clip], compared: Sequence[tuple[Clip, Clip]] = ()) -> None:
        """As `check_budget`, without asking for a key.

        Raises:
            UserError: nothing is spent yet and the estimate exceeds the budget.
        """
        pairs = [partial(self._comparisons, pair) for pair in compared]
        self._estimate({"clips": [partial(self._questions, clip) for clip in clips], "pairs": pairs})

    def _results(
        self, jobs: Sequence[Job], combine: Callable[[list[Answer]], Result], planned: Mapping[str, Sequence[Job]]
    ) -> Iterator[tuple[int, Result]]:
        """Send the jobs' questions; the index of each job and what `combine` makes of its answers, as they come."""
        if not jobs:
            return
        self._estimate(planned)
        with asyncio.Runner() as runner:
            answers = self._answers(jobs)
            while (found := runner.run(_next(answers))) is not None:
                yield found[0], combine(found[1])

    async def _answers(self, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, list[Answer]]]:
        async with open_client(self._config) as client:
            async for found in _SENDERS[self._config.api](client, self._ledger, jobs, self._seed):
                yield found

    def _estimate(self, planned: Mapping[str, Sequence[Job]]) -> None:
        """Log what jobs will cost, the first of each kind taken for all.

        Raises:
            UserError: nothing is spent yet and the estimate exceeds the budget.
        """
        dollars, requests, images = 0.0, 0, 0
        for jobs in planned.values():
            questions = jobs[0]() if jobs else []
            dollars += len(jobs) * sum(likely_cost(question, self._config) for question in questions)
            requests += len(jobs) * len(questions)
            images += len(jobs) * sum(len(question.pictures) for question in questions)
        spent, budget = self._ledger.store.spent(), self._config.budget
        estimate = (
            f"{', '.join(f'{len(jobs)} {kind}' for kind, jobs in planned.items() if jobs)}, {requests} requests, "
            f"{images} images, about ${dollars:.2f} (spent ${spent:.2f}, budget ${budget:.2f})"
        )
        if not spent and dollars > budget:
            raise UserError(f"annotate.openai.budget: {estimate}; raise the budget or lower annotate.num_clips")
        logger.info("annotate: %s", estimate)

    def _questions(self, clip: Clip) -> list[Question]:
        """The question about the whole clip, then those about its patches."""
        video = clip.frames().numpy()
        config, seed = self._config, int(hash_text(f"{self._seed} {clip.hash}")[:12], 16)
        try:
            grid = PatchGrid(self.grid, video.shape[0], video.shape[1], video.shape[2], *self._factors)
        except ValueError as error:
            raise UserError(f"clip of {clip.prompt!r}: {error}") from None
        patches = choose_patches(video, grid, config.max_patches, seed)
        return [
            ask_video(clip.hash, clip.prompt, video, self._asker, config.max_frames),
            *ask_patches(
                clip.hash, clip.prompt, video, self._asker, grid, patches, config.patch_frames, config.max_images
            ),
        ]

    def _comparisons(self, pair: tuple[Clip, Clip]) -> list[Question]:
        videos: list[np.ndarray] = [clip.frames().numpy() for clip in pair]
        most, prompt = self._config.max_frames, pair[0].prompt
        return [
            ask_pair((pair[0].hash, pair[1].hash), prompt, videos, self._asker, most),
            ask_pair((pair[1].hash, pair[0].hash), prompt, videos[::-1], self._asker, most),
        ]

    def _label(self, answers: list[Answer]) -> Label:
        """The label that the answers about a clip make."""
        video, *patches = answers
        # the server may answer later: such a label is whole or not at all
        for answer in answers:
            if answer is video and answer.status != "ok" or answer.status == "unavailable":
                return Label(status=answer.status, reason=answer.reason)
        scores = [math.nan] * math.prod(self.grid)
        for answer in patches:
            for name, value in answer.values.items():
                scores[int(name.removeprefix("patch_")) - 1] = float(value)
        missing = [f"{answer.status}: {answer.reason}" for answer in patches if answer.status != "ok"]
        reason = f"{len(missing)} of {len(patches)} patch questions have no answer, {missing[0]}" if missing else ""
        dimensions = {name: float(video.values[name]) for name in RUBRIC_DIMENSIONS}
        return Label(dimensions, {"quality": scores}, reason=reason)


class OpenAIJudge(OpenAITeacher):
    """A model that also compares clips: a comparison is two requests, one in each order."""

    def judge(self, pairs: Sequence[tuple[Clip, Clip]]) -> Iterator[tuple[int, dict[str, str]]]:
        """Judgements of pairs of clips of one prompt, as they come, each with the index of its pair.

        A judgement holds status, reason and for each dimension "a", "b" or "tie", or "inconsistent" where the two
        answers differ; it holds no dimension unless its status is "ok".
        """
        jobs = [partial(self._comparisons, pair) for pair in pairs]
        return self._results(jobs, consistent, {"pairs": jobs})


def consistent(answers: Sequence[Answer]) -> dict[str, str]:
    """The judgement on which two answers about one pair agree, the second given in swapped order.

    Judges prefer what they see first (Zheng et al., arXiv:2306.05685), so a verdict that changes with the order says
    nothing about the clips.
    """
    unusable = [answer for answer in answers if answer.status != "ok"]
    if unusable:
        return {"status": unusable[0].status, "reason": unusable[0].reason}
    names: tuple[Mapping[Any, str], ...] = (
        {"first": "a", "second": "b", "tie": "tie"},
        {"first": "b", "second": "a", "tie": "tie"},
    )
    judgement = {"status": "ok", "reason": ""}
    for dimension in RUBRIC_DIMENSIONS:
        verdicts = {name[answer.values[dimension]] for name, answer in zip(names, answers, strict=True)}
        judgement[dimension] = verdicts.pop() if len(verdicts) == 1 else "inconsistent"
    return judgement


async def _next(items: AsyncIterator[Result]) -> Result | None:
    return await anext(items, None)
