"""VideoReward as a judge: Qwen2-VL whose reward tokens are read by one linear head (Liu et al., arXiv:2501.13918).

Its input is that of its published code, github.com/KlingAIResearch/VideoAlign (MIT), whose question is in
videoreward.txt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halo_fast.errors import UserError, first_line
from halo_fast.files import progress, read_json
from halo_fast.judges.base import JudgeTable, Video, read_video
from halo_fast.judges.qwen import MIN_PIXELS, frame_count, frame_indices, frame_size, video_inputs
from halo_fast.judges.weights import model_folder, precision
from halo_fast.rewards.backbones.vlm.published import VIDEO_REWARD

__all__ = ["VideoReward", "videoreward"]

_SETTING = "evaluate.judge_options.videoreward"
_QUESTION = Path(__file__).with_name("videoreward.txt")
_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
_NAMES = ("visual_quality", "motion_quality", "text_alignment")
_FPS, _PIXELS = 2.0, 448 * 448  # what it was trained on, where model_config.json does not say
_BASE = "Qwen/Qwen2-VL-2B-Instruct"
_LORA_SCALE = 2.0  # alpha over rank, likewise


def videoreward(
    clips: Sequence[Video],
    prompts: Sequence[str],
    fps: float,
    device: str,
    *,
    model: str = "KlingTeam/VideoReward",
    base: str | None = None,
) -> JudgeTable:
    """Visual quality, motion quality and text alignment, each less its published mean over its deviation; their sum.

    Args:
        clips: as in ClipJudge, likewise the next three.
        prompts: of each clip.
        fps: of the clips, which are read at two frames a second.
        device: of the computation.
        model: folder or hub name: as published (model_config.json and checkpoint-*), or a folder of transformers with
            the head's weights in it.
        base: folder or hub name of the model that was trained, for its config and tokenizer; None for the one that
            model_config.json names.

    Raises:
        UserError: no such model.
    """
    judge = VideoReward(model_folder(model, f"{_SETTING}.model"), base, device)
    rows = [
        judge.score(read_video(clip), prompt, fps)
        for clip, prompt in progress(zip(clips, prompts, strict=True), len(clips), "judge videoreward")
    ]
    return JudgeTable(f"videoreward {model}", rows)


class VideoReward:
    """The published model, its LoRA merged.

    Args:
        folder: of its files.
        base: see `videoreward`.
        device: of the computation; bfloat16 on a GPU, as published, else float32.

    Raises:
        UserError: another model than VideoReward.
    """

    def __init__(self, folder: Path, base: str | None, device: str) -> None:
        settings: dict[str, Any] = read_json(folder / "model_config.json") or {}
        data, self._norm = settings.get("data_config", {}), settings.get("inference_config")
        self._fps, self._pixels = data.get("fps") or _FPS, data.get("max_frame_pixels") or _PIXELS
        kind = data.get("prompt_template_type", "detailed_special"), data.get("sample_type", "uniform")
        if kind != ("detailed_special", "uniform") or data.get("num_frames"):
            raise UserError(f"{folder / 'model_config.json'}: expected VideoReward's question and sampling, got {data}")
        own = str(folder) if (folder / "config.json").exists() else None
        base = base or own or settings.get("model_config", {}).get("model_name_or_path") or _BASE
        tensors, scale = _read_weights(folder), _lora_scale(settings.get("peft_lora_config", {}))
        self._network, self._head = _build(folder, _merged(tensors, scale), base, device)
        self._tokenizer = _tokenizer(folder, base)
        self._tokens = self._tokenizer.convert_tokens_to_ids(list(_TOKENS))

    @torch.no_grad()
    def score(self, video: Tensor, prompt: str, fps: float) -> dict[str, float]:
        """The scores of a clip, uint8 [F, H, W, 3], of `fps` frames a second."""
        chosen = frame_indices(len(video), frame_count(len(video), fps, self._fps))
        size = frame_size(video.shape[1], video.shape[2], MIN_PIXELS, self._pixels)
        frames = video[chosen].to(self._head.device)
        question = _QUESTION.read_text().replace("{text_prompt}", prompt)
        inputs = video_inputs(frames, size, question, self._tokenizer, self._network.config)
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(self._head.dtype)
        # the published code gives its language model no positions, which then counts all tokens one by one
        positions = torch.arange(inputs["input_ids"].shape[1], device=frames.device).expand(3, 1, -1)
        state = self._network(**inputs, position_ids=positions).last_hidden_state[0]
        places = torch.isin(inputs["input_ids"][0], torch.tensor(self._tokens, device=state.device))
        if int(places.sum()) != len(_NAMES):
            raise UserError(f"prompt {prompt!r}: expected none of {', '.join(_TOKENS)} in it; remove them")
        read = (state[places] @ self._head.T).float()
        rewards = read.diagonal() if read.shape[1] == len(_NAMES) else read[:, 0]
        row = {}
        for name, token, reward in zip(_NAMES, _TOKENS, rewards.tolist(), strict=True):
            mean, deviation = self._scale(token[2:4])
            row[name] = (reward - mean) / deviation
        return row | {"overall": sum(row.values())}

    def _scale(self, short: str) -> tuple[float, float]:
        if self._norm is None:
            return next((mean, deviation) for name, mean, deviation in VIDEO_REWARD.values() if name == short)
        return self._norm[f"{short}_mean"], self._norm[f"{short}_std"]


def _lora_scale(settings: Mapping[str, Any]) -> float:
    if not settings:
        return _LORA_SCALE
    rank, alpha = settings["lora_r"], settings["lora_alpha"]
    return float(alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint-*, or of the folder's safetensors, without the name of PEFT's wrapper."""
    from safetensors.torch import load_file

    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    places = [steps[-1]] if steps else []
    files = [file for place in (*places, folder) for file in sorted(place.glob("*.safetensors"))]
    pickles = [file for place in places for file in sorted(place.glob("*.pth"))]
    if not files and not pickles:
        raise UserError(f"{_SETTING}.model: expected checkpoint-*/model.pth or *.safetensors in {folder}, got neither")
    found: dict[str, Tensor] = {}
    for file in files:
        found |= load_file(file)
    for file in pickles:
        # tensors alone are read, nothing in the file is run
        found |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name.removeprefix("base_model.model."): value for name, value in found.items()}


def _merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights with their LoRA added, W + scale * B A, under the names of a model without one."""
    merged = {}
    for name, value in tensors.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        layer = name.removesuffix(".weight").removesuffix(".base_layer")
        for adapter in (".default", ""):
            down = tensors.get(f"{layer}.lora_A{adapter}.weight")
            if name.endswith(".weight") and down is not None:
                value = (value.float() + scale * tensors[f"{layer}.lora_B{adapter}.weight"].float() @ down.float()).to(
                    value.dtype
                )
        merged[plain] = value
    return merged


def _build(folder: Path, tensors: dict[str, Tensor], base: str, device: str) -> tuple[Any, Tensor]:
    """The network without its word layer, and the head, [scores, hidden]."""
    from transformers import AutoConfig, Qwen2VLModel

    head = tensors.pop("rm_head.weight", None)
    if head is None:
        raise UserError(f"{_SETTING}.model: expected VideoReward's rm_head.weight in {folder}, got none")
    names = {name: _current_name(name) for name in tensors if not name.startswith("lm_head.")}
    weights = {current: tensors[name] for name, current in names.items()}
    try:
        config = AutoConfig.from_pretrained(base)
        config.get_text_config().vocab_size = len(weights["language_model.embed_tokens.weight"])
        dtype = precision(device)
        network = Qwen2VLModel._from_config(config, dtype=dtype)
        network.load_state_dict(weights)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"{_SETTING}: expected VideoReward on {base} in {folder} ({first_line(error)})") from error
    return network.eval().to(device), head.to(device, dtype)


def _current_name(name: str) -> str:
    """The name of a weight in Qwen2VLModel of today; the published one is of an older transformers."""
    name = re.sub(r"^model\.(?=visual\.|language_model\.)", "", name)
    return re.sub(r"^model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.", name)


def _tokenizer(folder: Path, base: str) -> Any:
    """The published tokenizer, or the base model's with the reward tokens added."""
    from transformers import AutoTokenizer

    kept = sorted(folder.glob("checkpoint-*/tokenizer"))
    place = kept[-1] if kept else folder if (folder / "tokenizer_config.json").exists() else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(f"{_SETTING}.base: expected a tokenizer in {place}, got none ({first_line(error)})") from error
    tokenizer.add_special_tokens({"additional_special_tokens": list(_TOKENS)})
    return tokenizer
