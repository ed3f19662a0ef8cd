"""The demo's teacher: the demo world's meters, put in the rubric's terms, erring on some clips as people do."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval
from torch import Tensor

from halo_fast.demo import WEIGHTS, check_clips
from halo_fast.files import hash_file, hash_text, read_json
from halo_fast.teachers.base import Clip, TeacherRequest, label_in_batches, read_options
from halo_fast.teachers.rubric import Label

__all__ = ["ERRORS_FILE", "DemoOptions", "DemoTeacher", "load_teacher"]

ERRORS_FILE = WEIGHTS / "gpt4o_errors.json"
"""How GPT-4o errs as a judge of videos, and how far true scores are apart in the demo; benchmarks/teacher_errors.py."""

_BATCH_SIZE = 32  # clips that the meters see at once
_RATER_BIASES = (-0.5, -0.25, 0.0, 0.25, 0.5)
_SLIP_SHARE = 0.1  # scores of a noisy label that are off by a whole grade
_VIDEO_SCORES = ("visual_quality", "text_alignment", "dynamic_degree")
_CLEAR_MOTION = 2.0  # pixels travelled from which motion is plain to see


@dataclass(frozen=True)
class DemoOptions:
    """What `annotate.options` holds for the demo's teacher.

    Args:
        noisy_share: share of clips on which the teacher errs.
        errors: how it errs there: "person" for slips and biases, "gpt-4o" for errors as large as GPT-4o's.
    """

    noisy_share: Annotated[float, Interval(ge=0, le=1)] = 0.2
    errors: Literal["person", "gpt-4o"] = "person"


def load_teacher(request: TeacherRequest) -> "DemoTeacher":
    """The teacher over the shipped meters.

    Raises:
        UserError: another grid or clip size than the demo's, a prompt that its world does not have, or an option that
            cannot be.
    """
    from halo_fast.demo.meters import DefectMeter, FidelityMeter

    options = read_options(DemoOptions, request.options, "annotate.options")
    check_clips("teacher", request.grid, request.video_size, request.prompts, "prompts")
    version = hash_text("".join(hash_file(WEIGHTS / f"{name}_meter.safetensors") for name in ("defect", "fidelity")))
    meter = DefectMeter.load()
    fidelity = FidelityMeter.load()
    share, seed = options.noisy_share, request.seed
    return DemoTeacher(meter, fidelity, meter.grid, share, seed, version[:12], options.errors)


class DemoTeacher:
    """Rubric scores out of the defect and the fidelity meter: patch quality is 5 - 4 severity.

    visual_quality is the same of the mean severity, text_alignment 1 + 4 times the mean probability of the digit and
    the colour that the prompt names, dynamic_degree 1 + 4 times the probability of the motion it names (less if next to
    nothing moves). A share of the clips gets the label of a fallible person instead: the bias of one of five raters,
    one score in ten a grade off, everything rounded to half grades. With errors "gpt-4o" a score s of such a clip is
    round(s + noise * spread * e), e ~ N(0, 1). Noise is that of GPT-4o's judgements of video pairs, in units of true
    differences; spread is how far the scores of two candidates are apart. Which clips and how follows from their
    pixels.

    Args:
        defects: videos, prompts -> (severity [N, f, h, w] in [0, 1], anything else).
        fidelity: videos, prompts -> digit, colour, motion (probabilities [N]) and motion_amount (pixels [N]).
        grid: patches that `defects` measures.
        noisy_share: share of clips with a fallible label, in [0, 1].
        seed: of the errors.
        version: of the meters; part of the teacher's name.
        errors: "person" or "gpt-4o".
    """

    def __init__(
        self,
        defects: Callable[[Tensor, list[str]], tuple[Tensor, Tensor]],
        fidelity: Callable[[Tensor, list[str]], Mapping[str, Tensor]],
        grid: tuple[int, int, int],
        noisy_share: float,
        seed: int,
        version: str = "",
        errors: str = "person",
    ) -> None:
        if not 0 <= noisy_share <= 1:
            raise ValueError(f"noisy_share: expected a share from 0 to 1, got {noisy_share}")
        self.name = f"demo {version} noisy_share={noisy_share} seed={seed}"
        self.grid = grid
        self._gpt4o: dict[str, Any] | None = None
        if errors == "gpt-4o":
            self.name += f" errors=gpt-4o {hash_file(ERRORS_FILE)[:12]}"
            self._gpt4o = read_json(ERRORS_FILE)
        self._defects, self._fidelity = defects, fidelity
        self._noisy_share, self._seed = noisy_share, seed

    def labels(self, clips: Sequence[Clip], compared: Sequence[tuple[Clip, Clip]] = ()) -> Iterator[tuple[int, Label]]:
        """The index of each clip and its label."""
        return label_in_batches(self.label, clips, _BATCH_SIZE)

    def label(self, videos: Tensor, prompts: Sequence[str]) -> list[Label]:
        """One label for each clip of videos, uint8 [N, F, H, W, 3]."""
        severity = self._defects(videos, list(prompts))[0].flatten(1).double().numpy()
        fidelity = {name: value.double().numpy() for name, value in self._fidelity(videos, list(prompts)).items()}
        moving = np.minimum(fidelity["motion_amount"] / _CLEAR_MOTION, 1)
        video = 1 + 4 * np.stack(
            [1 - severity.mean(1), (fidelity["digit"] + fidelity["colour"]) / 2, fidelity["motion"] * moving], axis=1
        )
        labels = []
        for index, prompt in enumerate(prompts):
            scores = np.concatenate((video[index], 5 - 4 * severity[index]))
            rng = np.random.default_rng(_clip_seed(videos[index], prompt, self._seed))
            if rng.random() < self._noisy_share:
                scores = _as_a_person(scores, rng) if self._gpt4o is None else _as_gpt4o(scores, self._gpt4o, rng)
            found = scores.clip(1, 5).tolist()
            count = len(_VIDEO_SCORES)
            labels.append(Label(dict(zip(_VIDEO_SCORES, found[:count], strict=True)), {"quality": found[count:]}))
        return labels


def _clip_seed(video: Tensor, prompt: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed} {prompt} ".encode() + video.contiguous().numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "big")


def _as_a_person(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The scores as one of five raters might have given them, before they are kept within the scale."""
    bias = rng.choice(_RATER_BIASES)
    slips = rng.choice((-1, 1), len(scores)) * (rng.random(len(scores)) < _SLIP_SHARE)
    return np.round(2 * (scores + bias + slips)) / 2


def _as_gpt4o(scores: np.ndarray, errors: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    """The scores with errors as large as GPT-4o's, in whole grades, before they are kept within the scale."""
    spread = errors["spread"]
    video = [spread[name] for name in _VIDEO_SCORES]
    apart = np.array([*video, *[spread["patch"]] * (len(scores) - len(video))])
    return np.round(scores + errors["judge"]["noise"] * apart * rng.standard_normal(len(scores)))
