"""VideoScore as a judge: Idefics2 with a linear head of five scores (He et al., arXiv:2406.15252).

Its input is that of its published code, github.com/TIGER-AI-Lab/VideoScore (MIT), whose question is in videoscore.txt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from halo_fast.errors import UserError, first_line
from halo_fast.files import progress
from halo_fast.judges.base import JudgeTable, Video, read_video
from halo_fast.judges.weights import load_network, model_folder
from halo_fast.rewards.backbones.vlm.published import VIDEO_SCORE, read_heads

__all__ = ["VideoScore", "videoscore"]

_SETTING = "evaluate.judge_options.videoscore.model"
_QUESTION = Path(__file__).with_name("videoscore.txt")


def videoscore(
    clips: Sequence[Video],
    prompts: Sequence[str],
    fps: float,
    device: str,
    *,
    model: str = "TIGER-Lab/VideoScore-v1.1",
    max_frames: Annotated[int, Ge(1)] = 48,
) -> JudgeTable:
    """Five scores from 1 to 4, as people gave them: quality, consistency, dynamics, alignment, facts.

    Args:
        clips: as in ClipJudge, likewise the next three.
        prompts: of each clip.
        fps: not read: all frames are, or `max_frames` of them at equal steps.
        device: of the computation.
        model: folder or hub name of the weights.
        max_frames: that are read; VideoScore-v1.1 was made for 48, VideoScore for 16.

    Raises:
        UserError: no such model.
    """
    judge = VideoScore(model_folder(model, _SETTING), device)
    rows = [
        judge.score(read_video(clip), prompt, max_frames)
        for clip, prompt in progress(zip(clips, prompts, strict=True), len(clips), "judge videoscore")
    ]
    return JudgeTable(f"videoscore {model}", rows)


class VideoScore:
    """The published model.

    Args:
        folder: of the weights, with the processor's files.
        device: of the computation; bfloat16 on a GPU, as published, else float32.

    Raises:
        UserError: another model than VideoScore.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoProcessor, Idefics2Model

        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{_SETTING}: expected VideoScore in {folder}, got none ({first_line(error)})") from error
        self._network: Any = load_network(Idefics2Model, folder, device, _SETTING)
        heads = read_heads(folder)
        if len(heads.get("score.weight", ())) != len(VIDEO_SCORE):
            raise UserError(
                f"{_SETTING}: expected a head of {len(VIDEO_SCORE)} scores in {folder}, got {sorted(heads)}"
            )
        weight, bias = heads["score.weight"], heads.get("score.bias")
        self._head = nn.Linear(weight.shape[1], len(weight), bias is not None)
        self._head.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        self._head.to(device, self._network.dtype)

    @torch.no_grad()
    def score(self, video: Tensor, prompt: str, max_frames: int) -> dict[str, float]:
        """The scores of a clip, uint8 [F, H, W, 3], by their names."""
        from PIL import Image

        total = len(video)
        # as numpy's arange(0, total, total / max_frames) cut to integers
        chosen = range(total) if total <= max_frames else [int(k * (total / max_frames)) for k in range(max_frames)]
        pictures = [Image.fromarray(video[index].cpu().numpy()) for index in chosen]
        text = _QUESTION.read_text().replace("{text_prompt}", prompt)
        text += "<image> " * (len(pictures) - text.count("<image>"))
        inputs = self._processor(text=text, images=pictures, return_tensors="pt").to(self._network.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._network.dtype)
        state = self._network(**inputs).last_hidden_state
        scores = self._head(state)[0, _last(inputs["input_ids"][0], self._network.config)].float()
        return dict(zip(VIDEO_SCORE, scores.tolist(), strict=True))


def _last(ids: Tensor, config: Any) -> int:
    """The token whose scores count: the one before the first padding token, the last if there is none."""
    padding = getattr(config, "pad_token_id", None)
    padding = config.get_text_config().pad_token_id if padding is None else padding
    found = (ids == padding).nonzero() if padding is not None else []
    return int(found[0]) - 1 if len(found) else len(ids) - 1
