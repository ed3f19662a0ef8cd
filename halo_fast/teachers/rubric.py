"""The rubric by which teachers score, and the label that holds a clip's scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

__all__ = ["PATCH_DIMENSIONS", "PENDING", "RUBRIC", "RUBRIC_DIMENSIONS", "VIDEO_DIMENSIONS", "Label"]

VIDEO_DIMENSIONS = ("visual_quality", "text_alignment", "dynamic_degree")  # every teacher scores these
RUBRIC_DIMENSIONS = (*VIDEO_DIMENSIONS, "temporal_consistency", "factual_consistency")
PATCH_DIMENSIONS = ("quality",)
PENDING = ("unavailable", "unlabelled")  # statuses of labels that nobody has answered yet
RUBRIC = files("halo_fast.teachers").joinpath("rubric.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Label:
    """A teacher's scores of one clip, on the rubric's scale from 1 to 5; NaN is "not scored".

    Args:
        video: score of each of RUBRIC_DIMENSIONS; a missing one is not scored.
        patches: for each of PATCH_DIMENSIONS the scores of all patches, f-major.
        status: "ok", or why there are no scores ("refused", "malformed", ...): such a label has none.
        reason: why scores are missing, in words.

    Raises:
        ValueError: a score outside 1 to 5, a dimension that the rubric does not have, scores without "ok".
    """

    video: Mapping[str, float] = field(default_factory=dict)
    patches: Mapping[str, Sequence[float]] = field(default_factory=dict)
    status: str = "ok"
    reason: str = ""

    @property
    def final(self) -> bool:
        """Whether asking again is pointless: scored without a gap, or skipped by a person."""
        return self.status in ("ok", "skipped") and not self.reason

    def __post_init__(self) -> None:
        if self.status != "ok" and (self.video or self.patches):
            raise ValueError(f"status: {self.status!r} with scores; only an ok label has scores")
        for given, known in ((self.video, RUBRIC_DIMENSIONS), (self.patches, PATCH_DIMENSIONS)):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(f"dimension: expected some of {', '.join(known)}, got {unknown[0]!r}")
        scores = [*self.video.items(), *((name, score) for name, patches in self.patches.items() for score in patches)]
        for name, score in scores:
            if not (math.isnan(score) or 1 <= score <= 5):
                raise ValueError(f"score of {name}: expected 1 to 5 or NaN, got {score}; rescale it to 1 to 5")
