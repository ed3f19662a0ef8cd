"""Labelled clips that a reward model trains on, and the mirrors that multiply them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    *("MIRRORS", "PROMPT_DIMENSION", "LabelledClips", "Mirror", "heldout_prompts", "mirror_clips", "names_direction"),
    *("split_heldout", "turned_prompt"),
]

PROMPT_DIMENSION = "text_alignment"
"""The video dimension that says how well a clip shows its prompt."""


@dataclass(frozen=True)
class LabelledClips:
    """Clips with scores from 1 to 5; NaN is "not scored".

    Args:
        videos: uint8 [N, F, H, W, 3].
        prompts: of each clip.
        video_scores: [N, D].
        patch_scores: [N, Q, f, h, w].
        video_dimensions: names of the D video scores.
        patch_dimensions: names of the Q patch scores.
    """

    videos: Tensor
    prompts: list[str]
    video_scores: Tensor
    patch_scores: Tensor
    video_dimensions: tuple[str, ...]
    patch_dimensions: tuple[str, ...] = ("quality",)

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Tensor) -> LabelledClips:
        """The clips with the given indices, int64 [M]."""
        return replace(
            self,
            videos=self.videos[rows],
            prompts=[self.prompts[row] for row in rows.tolist()],
            video_scores=self.video_scores[rows],
            patch_scores=self.patch_scores[rows],
        )

    def to(self, device: torch.device) -> LabelledClips:
        """The same clips on a device."""
        videos, video, patches = (x.to(device) for x in (self.videos, self.video_scores, self.patch_scores))
        return replace(self, videos=videos, video_scores=video, patch_scores=patches)

    def without_frames(self) -> LabelledClips:
        """The prompts and scores alone: clips of no frames."""
        return replace(self, videos=self.videos[:, :0])

    def prompt_confidence(self, rows: Tensor) -> Tensor:
        """How far some of the clips show what their prompts say, [M] in [0, 1].

        (text_alignment - 1) / 4; the mean of all of them where a clip has no such score; 1 where none has one.

        Args:
            rows: indices of the clips, int64 [M].
        """
        if PROMPT_DIMENSION not in self.video_dimensions:
            return torch.ones(len(rows))
        scores = self.video_scores[rows, self.video_dimensions.index(PROMPT_DIMENSION)]
        confidence = (scores - 1) / 4
        return torch.where(confidence.isnan(), confidence.nanmean().nan_to_num(1.0), confidence)


def split_heldout(prompts: Sequence[str], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the clips that train, and of those of a random share of the prompts, which are held out."""
    chosen = heldout_prompts(prompts, share, seed)
    heldout = torch.tensor([prompt in chosen for prompt in prompts], dtype=torch.bool)
    return (~heldout).nonzero()[:, 0], heldout.nonzero()[:, 0]


def heldout_prompts(prompts: Iterable[str], share: float, seed: int) -> set[str]:
    """A random share of the distinct prompts, which `split_heldout` holds out."""
    distinct = sorted(set(prompts))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    return {distinct[index] for index in order[: round(share * len(distinct))]}


class Mirror(NamedTuple):
    """A mirror of clips.

    Args:
        axis: of the patch scores [N, Q, f, h, w], counted from the end.
        words: words of direction and what they become.
    """

    axis: int
    words: Mapping[str, str]


def _exchanged(one: str, other: str) -> dict[str, str]:
    """Both words with every ending that the words of direction have."""
    pairs = [(one + ending, other + ending) for ending in ("", "ward", "wards")]
    return dict(pairs) | {b: a for a, b in pairs}


MIRRORS = {
    "horizontal": Mirror(-1, _exchanged("left", "right")),
    "vertical": Mirror(-2, _exchanged("up", "down")),
}


# of a motion; "his right hand", "top left", "left the room", "right next to", "close-up", "upside down" name none
_BEFORE = "".join(
    rf"(?<!\b{word}[ -])"
    for word in (
        "the", "top", "bottom", "upper", "lower", "his", "her", "its", "their", "my", "your", "all", "close", "upside",
        "thumbs", "made", "lined", "dressed", "grown",
    )
)  # fmt: skip
_PARTS = "of|side|hand|arm|leg|foot|eye|ear|shoulder|wing|paw|corner|half|edge|jacket|coat|feather|pillow"
_LEFT = r"left(?! (?:the|an?|behind|alone|open|empty)\b)"
_RIGHT = (
    r"right(?! (?:now|away|next|behind|beside|before|after|at|here|there|in (?:the )?(?:front|middle|cent(?:er|re)))\b)"
)
_DIRECTIONS = re.compile(
    rf"(?:{_BEFORE}\b|\b(?:to|towards?) the )({_LEFT}|{_RIGHT}|up|down)(?:wards?)?\b(?!-| (?:{_PARTS})s?\b)",
    re.IGNORECASE,
)


_IDIOM = re.compile(rf"(?!(?:{_LEFT}|{_RIGHT})\b)(?:left|right)\b", re.IGNORECASE)
_PLACE = re.compile(r"\b(?:the|his|her|its|their|my|your|on|to|from|at)\s+$", re.IGNORECASE)


def names_direction(prompt: str) -> bool:
    """Whether a prompt names a direction of motion, and not its opposite, so that its clip backwards shows another."""
    found = {word.lower() for word in _DIRECTIONS.findall(prompt)}
    return bool(found) and not ({"left", "right"} <= found or {"up", "down"} <= found)


def turned_prompt(prompt: str) -> str:
    """The prompt of the opposite motion: "it drifts right, on the left" for "it drifts left, on the left"."""
    opposite = {word: other for mirror in MIRRORS.values() for word, other in mirror.words.items()}

    def turned(match: re.Match[str]) -> str:
        start, end = (place - match.start() for place in match.span(1))
        return match[0][:start] + opposite[match[1].lower()] + match[0][end:]

    return _DIRECTIONS.sub(turned, prompt)


def mirrored_prompt(prompt: str, words: Mapping[str, str]) -> str:
    """The prompt with each of the words exchanged, in its case, but not the verb in "has left the room" or "right now".

    Args:
        prompt: the prompt.
        words: each word, in small letters, and what stands for it in the mirror.
    """

    def exchanged(match: re.Match[str]) -> str:
        word, other = match[0], words.get(match[0].lower())
        if other is None or (_IDIOM.match(prompt, match.start()) and not _PLACE.search(prompt[: match.start()])):
            return word
        return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other

    return re.sub(r"\w+", exchanged, prompt)


def mirror_clips(clips: LabelledClips, which: Tensor, mirror: Mirror) -> LabelledClips:
    """Mirror some of the clips, with their patch scores; their prompts exchange the words of direction.

    What a prompt names may not look the same in a mirror (a digit), so text_alignment becomes unknown. Damage and
    motion stay what they are.

    Args:
        clips: N clips.
        which: bool [N].
        mirror: the axis and its words.
    """
    video_scores = clips.video_scores.clone()
    if PROMPT_DIMENSION in clips.video_dimensions:
        video_scores[which, clips.video_dimensions.index(PROMPT_DIMENSION)] = math.nan
    chosen, (axis, words) = which.view(-1, 1, 1, 1, 1), mirror
    return replace(
        clips,
        videos=torch.where(chosen, clips.videos.flip(axis - 1), clips.videos),
        patch_scores=torch.where(chosen, clips.patch_scores.flip(axis), clips.patch_scores),
        prompts=[
            mirrored_prompt(prompt, words) if mirrored else prompt
            for prompt, mirrored in zip(clips.prompts, which.tolist(), strict=True)
        ],
        video_scores=video_scores,
    )
