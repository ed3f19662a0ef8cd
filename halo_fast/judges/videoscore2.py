"""VideoScore2 as a judge: Qwen2.5-VL that reasons in words and ends with three scores (He et al., arXiv:2509.22799).

Its input and the reading of its answer are those of its model card, huggingface.co/TIGER-Lab/VideoScore2 (Apache-2.0),
whose question is in videoscore2.txt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halo_fast.errors import UserError, first_line
from halo_fast.files import progress
from halo_fast.judges.base import JudgeTable, Video, read_video
from halo_fast.judges.qwen import MIN_PIXELS, frame_count, frame_indices, frame_size, video_inputs
from halo_fast.judges.weights import load_network, model_folder

__all__ = ["VideoScore2", "videoscore2"]

_SETTING = "evaluate.judge_options.videoscore2.model"
_QUESTION = Path(__file__).with_name("videoscore2.txt")
_FPS, _LONGEST, _TEMPERATURE = 2.0, 1024, 0.7
_MOST_PIXELS = 768 * 28 * 28  # of a frame
_ALL_PIXELS = 128000 * 28 * 28 * 0.9  # of a clip
_SCORES = "12345"
# A heading may be followed by words before its colon: the released model repeats what the question says of it.
_ANSWER = re.compile(
    r"visual quality[^:]*:\s*(\d+).*?text-to-video alignment[^:]*:\s*(\d+).*?"
    r"physical/common-sense consistency[^:]*:\s*(\d+)",
    re.DOTALL | re.IGNORECASE,
)
_NAMES = ("visual_quality", "text_alignment", "physical_consistency")


def videoscore2(
    clips: Sequence[Video],
    prompts: Sequence[str],
    fps: float,
    device: str,
    *,
    model: str = "TIGER-Lab/VideoScore2",
    seed: int = 0,
) -> JudgeTable:
    """Three scores from 0 to 5: quality, alignment with the prompt, physics and common sense.

    Args:
        clips: as in ClipJudge, likewise the next three.
        prompts: of each clip.
        fps: of the clips, which are read at two frames a second.
        device: of the computation.
        model: folder or hub name of the weights.
        seed: of the answers, which are sampled; each clip has the same.

    Raises:
        UserError: no such model.
    """
    judge = VideoScore2(model_folder(model, _SETTING), device)
    rows = [
        judge.score(read_video(clip), prompt, fps, seed)
        for clip, prompt in progress(zip(clips, prompts, strict=True), len(clips), "judge videoscore2")
    ]
    return JudgeTable(f"videoscore2 {model}", rows)


class VideoScore2:
    """The published model.

    Args:
        folder: of the weights and the tokenizer.
        device: of the computation; bfloat16 on a GPU, else float32.

    Raises:
        UserError: no Qwen2.5-VL there.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{_SETTING}: expected VideoScore2 in {folder}, got none ({first_line(error)})") from error
        self._network: Any = load_network(Qwen2_5_VLForConditionalGeneration, folder, device, _SETTING)

    @torch.no_grad()
    def score(self, video: Tensor, prompt: str, fps: float, seed: int) -> dict[str, float]:
        """The scores of a clip, uint8 [F, H, W, 3]; NaN where the answer has none."""
        network, tokenizer = self._network, self._tokenizer
        count = frame_count(len(video), fps, _FPS, math.floor)
        most = max(min(_MOST_PIXELS, _ALL_PIXELS / count * 2), int(1.05 * MIN_PIXELS))
        size = frame_size(video.shape[1], video.shape[2], MIN_PIXELS, most)
        frames = video[frame_indices(len(video), count)].to(network.device)
        question = _QUESTION.read_text().replace("{text_prompt}", prompt)
        inputs = video_inputs(frames, size, question, tokenizer, network.config)
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(network.dtype)
        inputs["second_per_grid_ts"] = torch.tensor([2 / _FPS])
        devices = [network.device] if network.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            made = network.generate(
                **inputs, max_new_tokens=_LONGEST, do_sample=True, temperature=_TEMPERATURE,
                output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
        answer = made.sequences[0, inputs["input_ids"].shape[1] :]
        return dict(zip(_NAMES, soft_scores(answer, made.scores, tokenizer), strict=True))


def soft_scores(answer: Tensor, logits: Sequence[Tensor], tokenizer: Any) -> list[float]:
    """The three scores of an answer: each the likeliest digit from 1 to 5 times its probability among these five.

    Args:
        answer: the tokens that were made.
        logits: from which each was drawn, [1, vocabulary].
        tokenizer: of the model.

    Returns:
        NaN where the answer does not end as it should.
    """
    digits = [tokenizer.encode(digit, add_special_tokens=False) for digit in _SCORES]
    single = [(float(digit), ids[0]) for digit, ids in zip(_SCORES, digits, strict=True) if len(ids) == 1]
    lengths = [len(tokenizer.decode(answer[: n + 1], skip_special_tokens=False)) for n in range(len(answer))]
    text = tokenizer.decode(answer, skip_special_tokens=False)
    # what it thinks before may name the headings too
    found = _ANSWER.search(text, text.rfind("</think>") + 1)
    if found is None or not single:
        return [math.nan] * len(_NAMES)
    scores = []
    for group in range(1, len(_NAMES) + 1):
        token = next(n for n, length in enumerate(lengths) if length > found.start(group))
        chances = logits[token][0].float().softmax(-1)[[number for _, number in single]]
        best = int(chances.argmax())
        scores.append(single[best][0] * float(chances[best] / chances.sum()))
    return scores
