"""A vision-language model with a regression head: the clip and all its patches in one sequence.

The sequence is [frames][prompt][one query a video dimension][for each patch: where it is, what is there, its queries].
A block mask lets every query see the frames and the prompt, and nothing of the other queries; each patch's positions go
on from the end of the prompt, as if it stood there alone. So one pass gives what a pass a patch would give, and the
frames are read once.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halo_fast.errors import UserError

if TYPE_CHECKING:
    from halo_fast.rewards.model import RewardModelConfig

__all__ = ["VisionLanguage"]

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_FRAME_SIDE = 448
_LORA_ALPHA = 2  # times the rank
# mean and deviation of VideoReward's rewards, as published with it: visual quality, motion quality, text alignment
_VIDEO_REWARD = {
    "visual_quality": ("VQ", 3.6757, 2.2476),
    "dynamic_degree": ("MQ", 1.1646, 1.3811),
    "text_alignment": ("TA", 2.8105, 2.5121),
}
_VIDEO_SCORE = ("visual_quality", "temporal_consistency", "dynamic_degree", "text_alignment", "factual_consistency")
_VIDEO_SCORE_MIDDLE = 2.5  # of its scale from 1 to 4


class Frames(NamedTuple):
    """What the vision tower says of clips.

    Args:
        tokens: [N, T, K, hidden], K tokens each of T steps in time, as the language model reads them.
        maps: [N, c, T, y, x], the same or the layer below where the tokens have no place in the picture.
        deep: what deeper layers of the language model are told of the tokens (Qwen3-VL), each [N, T * K, hidden].
        size: frames, height, width of the clips.
    """

    tokens: Tensor
    maps: Tensor
    deep: tuple[Tensor, ...]
    size: tuple[int, int, int]


def _size(videos: Tensor) -> tuple[int, int, int]:
    return videos.shape[1], videos.shape[2], videos.shape[3]


def _normalised(videos: Tensor, side: int, multiple: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, F, H, W, 3] -> float [N, F, 3, h, w]: the shorter side at most `side`, all divisible by `multiple`."""
    count, _, height, width = videos.shape[:4]
    scale = min(1.0, side / min(height, width))
    target = [max(1, round(length * scale / multiple)) * multiple for length in (height, width)]
    frames = videos.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    if target != [height, width]:
        frames = F.interpolate(frames, target, mode="bicubic", antialias=True).clamp(0, 1)
    shift, unit = (torch.tensor(values, device=videos.device).view(3, 1, 1) for values in (mean, std))
    return ((frames - shift) / unit).unflatten(0, (count, -1))


def _read_qwen(network: Any, videos: Tensor, side: int) -> Frames:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: tubes of two frames, merged two by two."""
    vision = network.config.vision_config
    patch, merge, tube = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    deep_tower = hasattr(vision, "deepstack_visual_indexes")
    mean, std = (_HALF, _HALF) if deep_tower else (_CLIP_MEAN, _CLIP_STD)
    x = _normalised(videos, side, patch * merge, mean, std)
    if x.shape[1] % tube:
        x = torch.cat((x, x[:, -1:].expand(-1, tube - x.shape[1] % tube, -1, -1, -1)), dim=1)
    count, frames, channels, height, width = x.shape
    steps, rows, columns = frames // tube, height // patch // merge, width // patch // merge
    x = x.reshape(count, steps, tube, channels, rows, merge, patch, columns, merge, patch)
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, channels * tube * patch * patch)
    thw = torch.tensor([[steps, rows * merge, columns * merge]] * count, device=videos.device)
    seen = network.model.get_video_features(x.to(network.dtype), thw, return_dict=True)
    tokens = torch.stack(list(seen.pooler_output)).unflatten(1, (steps, rows * columns))
    maps = tokens.unflatten(2, (rows, columns)).movedim(-1, 1)
    layers = seen.deepstack_features if deep_tower else []
    deep = [torch.cat(list(layer)) if isinstance(layer, list | tuple) else layer for layer in layers]
    return Frames(tokens, maps, tuple(layer.unflatten(0, (count, -1)) for layer in deep), _size(videos))


def _read_idefics(network: Any, videos: Tensor, side: int) -> Frames:
    """Idefics2, Idefics3 and SmolVLM: each frame an image."""
    config, patch = network.config, network.config.vision_config.patch_size
    resampled = hasattr(config, "perceiver_config")
    merge = 1 if resampled else config.scale_factor
    x = _normalised(videos, side, patch * merge, _HALF, _HALF)
    rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
    seen = network.model.get_image_features(x.to(network.dtype), return_dict=True)
    tokens = seen.pooler_output
    tokens = torch.cat(list(tokens)) if isinstance(tokens, list | tuple) else tokens
    tokens = tokens.reshape(*x.shape[:2], -1, tokens.shape[-1])
    if resampled:  # its tokens are no places: the picture is in the tower's own output
        maps = seen.last_hidden_state.unflatten(1, (rows, columns)).unflatten(0, x.shape[:2])
    else:
        maps = tokens.unflatten(2, (rows // merge, columns // merge))
    return Frames(tokens, maps.movedim(-1, 1), (), _size(videos))


def _read_llava(network: Any, videos: Tensor, side: int) -> Frames:
    """LLaVA-OneVision: each frame a square image, pooled two by two."""
    config, vision = network.config, network.config.vision_config
    size = vision.image_size  # its positions are learned for squares of this size
    frames = videos.flatten(0, 1).permute(0, 3, 1, 2)
    frames = F.interpolate(frames.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    x = (frames / 127.5 - 1).unflatten(0, videos.shape[:2])
    seen = network.model.get_video_features(
        x.to(network.dtype),
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        return_dict=True,
    )
    tokens = seen.pooler_output[:, :-1].unflatten(1, (videos.shape[1], -1))
    edge = -(-(size // vision.patch_size) // 2)
    return Frames(tokens, tokens.unflatten(2, (edge, edge)).movedim(-1, 1), (), _size(videos))


_READERS = {
    "qwen2_vl": _read_qwen,
    "qwen2_5_vl": _read_qwen,
    "qwen3_vl": _read_qwen,
    "idefics2": _read_idefics,
    "idefics3": _read_idefics,
    "smolvlm": _read_idefics,
    "llava_onevision": _read_llava,
}


_KEYS = {r"^base_model\.model\.": ""}  # VideoReward was saved inside PEFT's wrapper
_HEADS = ("score.weight", "score.bias", "rm_head.weight")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


class VisionLanguage(nn.Module):
    """A transformers vision-language model that reads scores off queries at the end of its sequence.

    The vision tower is frozen; the language model is trained whole or by LoRA. A folder of VideoScore (Idefics2 with
    five regression outputs, arXiv:2406.15252) or VideoReward (Qwen2-VL with reward tokens, arXiv:2501.13918) starts
    from its published head; the scales of both are mapped onto logits, which keeps their order.

    Args:
        config: dimensions, `backbone` (folder or hub name), `lora_rank` (0 trains the whole language model).
        weights: whether to read the weights; without, they are drawn at random, for `RewardModel.load` to fill in.

    Raises:
        UserError: a model or weights that are missing, or of a family whose frames cannot be read here.
    """

    negatives = 1  # each other prompt costs a pass of the language model

    def __init__(self, config: RewardModelConfig, weights: bool = True) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

        self.config, name = config, config.backbone
        try:
            settings = AutoConfig.from_pretrained(name)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
            if settings.model_type not in _READERS:
                raise UserError(
                    f"reward.backbone: expected one of {', '.join(_READERS)}, got {name!r}, a {settings.model_type}"
                )
            if weights:
                network: Any
                network, found = AutoModelForImageTextToText.from_pretrained(
                    name, attn_implementation="sdpa", dtype=torch.float32, key_mapping=_KEYS, output_loading_info=True
                )
                # what turns states into words is not used: reward models are published without it
                absent = sorted(key for key in found["missing_keys"] if not key.startswith("lm_head."))
                if absent:
                    raise ValueError(f"{len(absent)} of its weights are missing, such as {absent[0]}")
            else:
                network = AutoModelForImageTextToText.from_config(settings, attn_implementation="sdpa")
        except (OSError, ValueError) as error:
            raise UserError(
                f"reward.backbone: expected a model of transformers, got {name!r} ({_first_line(error)})"
            ) from error
        network.requires_grad_(False)
        network.get_decoder().requires_grad_(not config.lora_rank)
        if config.lora_rank:
            from peft import LoraConfig, inject_adapter_in_model

            adapter = LoraConfig(
                r=config.lora_rank, lora_alpha=_LORA_ALPHA * config.lora_rank, target_modules="all-linear"
            )
            inject_adapter_in_model(adapter, network.get_decoder())
        self.network = network
        hidden = network.get_input_embeddings().embedding_dim
        video, patch = len(config.video_dimensions), len(config.patch_dimensions)
        deviation = getattr(settings.get_text_config(), "initializer_range", 0.02)
        self.queries = nn.Parameter(deviation * torch.randn(video + patch, hidden))
        self.head = nn.Parameter(hidden**-0.5 * torch.randn(video + patch, hidden))
        self.offset = nn.Parameter(torch.zeros(video + patch))
        resampled = hasattr(settings, "perceiver_config")
        self.place = nn.Linear(settings.vision_config.hidden_size if resampled else hidden, hidden)
        if not resampled:
            nn.init.eye_(self.place.weight)
            nn.init.zeros_(self.place.bias)
        if weights:
            self._start(name)

    @torch.no_grad()
    def _start(self, name: str) -> None:
        """Take the heads of a published reward model by the names of its scores, if that is what the folder holds."""
        from huggingface_hub import snapshot_download
        from safetensors import safe_open

        try:
            # of a hub model the weights were fetched just now, and are found again without asking
            folder = (
                Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns="*.safetensors"))
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"reward.backbone: expected the weights of {name}, got none ({_first_line(error)})"
            ) from error
        heads: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                names = {key: key.removeprefix("base_model.model.") for key in tensors.keys()}  # noqa: SIM118
                heads |= {name: tensors.get_tensor(key).float() for key, name in names.items() if name in _HEADS}
        published: Collection[str] = ()
        if len(heads.get("score.weight", ())) == len(_VIDEO_SCORE):
            published = _VIDEO_SCORE
        elif "rm_head.weight" in heads:
            published = _VIDEO_REWARD
        if heads and not published:
            raise UserError(f"{folder}: expected VideoScore's head of 5 scores or VideoReward's, got {sorted(heads)}")
        for row, dimension in enumerate(self.config.video_dimensions):
            if published and dimension not in published:
                print(f"reward.backbone: {folder} does not score {dimension}, it starts at random", file=sys.stderr)
            elif published is _VIDEO_SCORE:
                place = _VIDEO_SCORE.index(dimension)
                self.head[row] = heads["score.weight"][place]
                self.offset[row] = (heads["score.bias"][place] if "score.bias" in heads else 0) - _VIDEO_SCORE_MIDDLE
            elif published is _VIDEO_REWARD:
                word, mean, deviation = _VIDEO_REWARD[dimension]
                token = self.tokenizer.convert_tokens_to_ids(f"<|{word}_reward|>")
                if token in (None, self.tokenizer.unk_token_id):
                    raise UserError(
                        f"{folder}: expected a tokenizer with VideoReward's <|{word}_reward|>, got one without; save "
                        "the published tokenizer beside the weights"
                    )
                self.queries[row] = self.network.get_input_embeddings().weight[token]
                self.head[row] = heads["rm_head.weight"][0] / deviation
                self.offset[row] = -mean / deviation

    def look(self, videos: Tensor) -> Tensor | None:
        """None: what the vision tower sees is large, and is not kept."""
        return None

    def prepare(self, looks: Tensor | None, prompts: Sequence[str], weight: Tensor) -> Tensor | None:
        """Nothing is fitted beforehand."""
        return None

    @torch.no_grad()
    def encode(self, videos: Tensor, looks: Tensor | None, shown: Tensor | None = None) -> Frames:
        """What the frozen vision tower says of uint8 videos [N, F, H, W, 3]; the shorter side at most 448 pixels."""
        return _READERS[self.network.config.model_type](self.network, videos, _FRAME_SIDE)

    def logits(self, features: Frames, prompts: Sequence[str], grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[N, D] logits of the video scores and [N, Q, f, h, w] of the patch scores, from one sequence a clip."""
        read = self._read(features, prompts, self._patch_blocks(features, grid))
        video, patch = len(self.config.video_dimensions), len(self.config.patch_dimensions)
        patches = read[:, video:].unflatten(1, (-1, patch)).transpose(1, 2).unflatten(-1, tuple(grid))
        return read[:, :video], patches

    def against(self, features: Frames, prompts: Sequence[str], others: Tensor) -> Tensor:
        """Video logits [N, M, D] of clip n with prompts others[n, m], a pass for each m."""
        passes = [self._read(features, [prompts[n] for n in column], []) for column in others.T.tolist()]
        return torch.stack(passes, dim=1)

    def video_logits(self, features: Frames, prompts: Sequence[str]) -> Tensor:
        """[N, D] of the video scores alone: what a pass costs without patches."""
        return self._read(features, prompts, [])

    def patch_logits(self, features: Frames, prompts: Sequence[str], grid: Sequence[int], patch: int) -> Tensor:
        """[N, Q] of one patch (f-major) from a pass of its own: what `logits` gives for all at once."""
        block = self._patch_blocks(features, grid)[patch]
        return self._read(features, prompts, [block])[:, len(self.config.video_dimensions) :]

    def _patch_blocks(self, features: Frames, grid: Sequence[int]) -> list[Tensor]:
        """The tokens of each patch's block, [N, L, hidden]: where it is, what is there, the queries of its scores."""
        patches = self.config.patches(grid, features.size)
        there = self.place(patches.pool(features.maps.float()).flatten(2).transpose(1, 2).to(self.place.weight.dtype))
        video, blocks = len(self.config.video_dimensions), []
        for index in range(there.shape[1]):
            f, rest = divmod(index, grid[1] * grid[2])
            h, w = divmod(rest, grid[2])
            where = self._embed(f"{f + 1} {h + 1} {w + 1}")
            fixed = [x.expand(len(there), -1, -1) for x in (where, self.queries[video:])]
            blocks.append(torch.cat((fixed[0], there[:, index : index + 1], fixed[1]), dim=1))
        return blocks

    def _embed(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.long()
        embeddings = self.network.get_input_embeddings()
        return embeddings(ids[0].to(embeddings.weight.device))

    def _read(self, features: Frames, prompts: Sequence[str], blocks: Sequence[Tensor]) -> Tensor:
        """Logits [N, D + P * Q] off one sequence a clip: frames, prompt, a block a video dimension, a block a patch."""
        count, device = len(prompts), features.tokens.device
        video, patch = len(self.config.video_dimensions), len(self.config.patch_dimensions)
        seen = features.tokens.flatten(1, 2).to(self.queries.dtype)
        texts = [self._embed(prompt) for prompt in prompts]
        lengths = torch.tensor([len(text) for text in texts], device=device)
        text = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        queries = [query.expand(count, 1, -1) for query in self.queries[:video]]
        blocks = [*queries, *blocks]
        sequence = torch.cat((seen, text, *blocks), dim=1)
        prefix, frames = seen.shape[1] + text.shape[1], seen.shape[1]
        known = torch.arange(prefix, device=device) < frames + lengths[:, None]
        owner = torch.repeat_interleave(
            torch.arange(len(blocks) + 1, device=device),
            torch.tensor([prefix, *(block.shape[1] for block in blocks)], device=device),
        )
        order = torch.arange(len(owner), device=device)
        causal = order[:, None] >= order
        allowed = causal & ((owner == 0) | (owner[:, None] == owner))
        mask = allowed.expand(count, 1, -1, -1).clone()
        mask[..., :prefix] &= known[:, None, None] | torch.eye(len(owner), prefix, dtype=torch.bool, device=device)
        starts = torch.cat([torch.arange(block.shape[1], device=device) for block in blocks])
        position, end = self._positions(features, text.shape[1])
        after = (end + lengths)[:, None] + starts
        position = torch.cat((position.expand(-1, count, -1), after.expand(len(position), -1, -1)), dim=2)
        extra: dict[str, Any] = {}
        if features.deep:
            visual = torch.zeros(sequence.shape[:2], dtype=torch.bool, device=device)
            visual[:, :frames] = True
            deep = [layer.flatten(0, 1).to(sequence.dtype) for layer in features.deep]
            extra = {"visual_pos_masks": visual, "deepstack_visual_embeds": deep}
        state = self.network.get_decoder()(
            inputs_embeds=sequence,
            attention_mask=mask,
            position_ids=position if len(position) > 1 else position[0],
            use_cache=False,
            **extra,
        ).last_hidden_state[:, prefix:]
        ends = torch.tensor([block.shape[1] for block in blocks], device=device).cumsum(0)
        asked = torch.cat(
            (ends[:video] - 1, (ends[video:, None] - patch + torch.arange(patch, device=device)).flatten())
        )
        row = torch.cat((torch.arange(video), video + torch.arange(patch).repeat(len(blocks) - video))).to(device)
        return (state[:, asked] * self.head[row]).sum(dim=-1) + self.offset[row]

    def _positions(self, features: Frames, words: int) -> tuple[Tensor, int]:
        """Positions [A, 1, prefix] of frames and prompt, and where the prompt begins.

        Qwen's models count in time, row and column (A = 3), as multimodal rotary positions do; the others one by one.
        """
        device = features.tokens.device
        if not self.network.config.model_type.startswith("qwen"):
            begin = features.tokens.shape[1] * features.tokens.shape[2]
            return torch.arange(begin + words, device=device)[None, None], begin
        steps, rows, columns = features.maps.shape[2:]
        axes = [torch.arange(side, device=device) for side in (steps, rows, columns)]
        seen = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        begin = max(rows, columns)
        text = (begin + torch.arange(words, device=device)).expand(3, -1)
        return torch.cat((seen, text), dim=1)[:, None], begin
