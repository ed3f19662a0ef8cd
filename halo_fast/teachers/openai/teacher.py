"""GPT-4o, or any vision-language model behind an OpenAI-compatible server, as the teacher."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from halo_fast.errors import UserError
from halo_fast.files import hash_bytes, hash_text
from halo_fast.patches import PatchGrid
from halo_fast.teachers.base import RUBRIC_DIMENSIONS, Label
from halo_fast.teachers.openai.config import OpenAIConfig
from halo_fast.teachers.openai.pictures import choose_patches
from halo_fast.teachers.openai.questions import Answer, Question, ask_pair, ask_patches, ask_video
from halo_fast.teachers.openai.server import Job, Server, announce
from halo_fast.teachers.store import LabelStore

__all__ = ["Clip", "OpenAITeacher", "consistent"]

Result = TypeVar("Result")

# what an answer depends on; prices, bounds and retries may change while a run continues
_ASKED = ("model", "base_url", "max_frames", "patch_frames", "max_images", "temperature")


@dataclass(frozen=True)
class Clip:
    """A clip to be asked about: hash of its bytes, prompt, and how to get its frames, uint8 [F, H, W, 3]."""

    hash: str
    prompt: str
    frames: Callable[[], Tensor]


class OpenAITeacher:
    """A model that scores clips by the rubric and compares them.

    A clip is one request with frames of the whole and a few with frames cut along the grid; a comparison is two, one in
    each order. Every request is paid for once: requests and answers are kept in the store.

    Args:
        config: the model, its server and what it may cost.
        grid: patches that are scored.
        store: of answers and spending.
        factors: spatial_factor, temporal_factor and causal of PatchGrid, by which the grid cuts the clips.
        seed: of delays and of drawn patches.

    Raises:
        UserError: settings that cannot be.
    """

    def __init__(
        self,
        config: OpenAIConfig,
        grid: tuple[int, int, int],
        store: LabelStore,
        factors: tuple[int, int, bool] = (1, 1, False),
        seed: int = 0,
    ) -> None:
        asked = [*(getattr(config, name) for name in _ASKED), list(factors)]
        self.grid = (grid[0], grid[1], grid[2])
        # which patches are drawn makes other labels, but of the same questions
        drawn = config.max_patches is not None and config.max_patches < math.prod(self.grid)
        choice = [config.max_patches, seed] if drawn else []
        self._asker = f"{config.model} {hash_text(json.dumps(asked))[:12]}"
        self.name = f"{config.model} {hash_text(json.dumps(asked + choice))[:12]}"
        self._config, self._factors, self._seed = config, factors, seed
        self._server = Server(config, store, self._asker, seed)

    def label(self, videos: Tensor, prompts: Sequence[str]) -> list[Label]:
        """One label for each clip of videos, uint8 [N, F, H, W, 3]."""
        clips = [
            Clip(hash_bytes(video.contiguous().numpy().tobytes()), prompt, partial(torch.clone, video))
            for video, prompt in zip(videos, prompts, strict=True)
        ]
        labels = dict(self.labels(clips))
        return [labels[index] for index in range(len(clips))]

    def labels(self, clips: Sequence[Clip], compared: Sequence[tuple[Clip, Clip]] = ()) -> Iterator[tuple[int, Label]]:
        """Labels as they come, each with the index of its clip.

        A label's status is that of the video's question; patches whose questions were not answered stay NaN, and the
        label's reason says so. "unavailable" means that the server never answered: asking again costs nothing twice.

        Args:
            clips: to be scored.
            compared: pairs that are to be judged afterwards and belong to the estimate of what all will cost.

        Raises:
            UserError: the budget is used up, the server refuses requests or is gone, a clip does not fit the grid.
        """
        jobs = [partial(self._questions, clip) for clip in clips]
        kinds = {"clips": jobs, "pairs": [partial(self._comparisons, pair) for pair in compared]}
        return self._results(jobs, self._label, kinds)

    def judge(self, pairs: Sequence[tuple[Clip, Clip]]) -> Iterator[tuple[int, dict[str, str]]]:
        """Judgements of pairs of clips of one prompt, as they come, each with the index of its pair.

        Both orders are asked. A judgement holds status, reason and for each dimension "a", "b" or "tie", or
        "inconsistent" where the two answers differ; it holds no dimension unless its status is "ok".
        """
        jobs = [partial(self._comparisons, pair) for pair in pairs]
        return self._results(jobs, consistent, {"pairs": jobs})

    def _results(
        self, jobs: Sequence[Job], combine: Callable[[list[Answer]], Result], announced: Mapping[str, Sequence[Job]]
    ) -> Iterator[tuple[int, Result]]:
        if not jobs:
            return
        announce(self._server, announced)
        with asyncio.Runner() as runner:
            answers: AsyncIterator[tuple[int, list[Answer]]] = self._server.answers(jobs)
            while (found := runner.run(_next(answers))) is not None:
                yield found[0], combine(found[1])

    def _questions(self, clip: Clip) -> list[Question]:
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
        video, *patches = answers
        # a server may be back tomorrow: such a label is whole or not at all
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


def consistent(answers: Sequence[Answer]) -> dict[str, str]:
    """The judgement that two answers about one pair, the second in swapped order, agree on.

    Judges prefer what they see first; a verdict that changes with the order says nothing about the clips
    (Zheng et al., arXiv:2306.05685).
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
