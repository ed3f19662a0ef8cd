"""A vision-language model with a regression head: the clip and all its patches in one sequence.

The sequence is

    [frames][prompt][video query 1][video query 2]...[patch 1: place, content, queries][patch 2: ...]...

with a query for each dimension. Each bracket after the prompt is a block. A block sees the frames, the prompt and
itself, and its positions go on from the end of the prompt, as if it stood there alone. So one pass gives what a pass
for each patch would give, and the frames are read once.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError, first_line
from halo_fast.families.quantization import plain_tensors, read_quantized
from halo_fast.files import no_loading_bars
from halo_fast.rewards.backbones import shared_prefix
from halo_fast.rewards.backbones.shared_prefix import Blocks
from halo_fast.rewards.backbones.vlm.frames import READERS, Frames
from halo_fast.rewards.backbones.vlm.published import published_scores
from halo_fast.rewards.base import RewardModelConfig

__all__ = ["VisionLanguage"]

_FRAME_SIDE = 448  # pixels of the shorter side, at most
_LORA_ALPHA = 2  # times the rank
_KEYS = {r"^base_model\.model\.": ""}  # VideoReward was saved inside PEFT's wrapper


class VisionLanguage(nn.Module):
    """A transformers vision-language model that reads scores off queries at the end of its sequence.

    The vision tower is frozen; the language model is trained whole, by LoRA or not at all. A folder of VideoScore or
    VideoReward starts from its published head.

    With `precision` "bf16" weights and products of the frozen language model are bfloat16; what is trained is float32.
    With `quantization` the linear layers of the frozen language model are in 8 or 4 bits, and everything else is in
    float32. The state dict of such a model holds what is trained; `save_pretrained` writes the rest.

    Args:
        config: dimensions, `backbone` (folder or hub name), `quantization`, `precision`, `lora_rank` (0 trains the
            whole language model, None the head alone).
        weights: whether to read the weights; without, they are drawn at random, for `RewardModel.load` to fill in.
            Those of a quantised network are then read from what `save_pretrained` wrote.

    Raises:
        UserError: a model or weights that are missing, or of a family whose frames cannot be read here.
    """

    negatives = 1  # each other prompt costs a pass of the language model

    def __init__(self, config: RewardModelConfig, weights: bool = True) -> None:
        super().__init__()
        self.config = config
        self.network, self.tokenizer = _load_network(config, weights)
        self.network.requires_grad_(False)
        decoder = self.network.get_decoder().requires_grad_(config.lora_rank == 0)
        if config.lora_rank:
            from peft import LoraConfig, inject_adapter_in_model

            rank, layers = config.lora_rank, _language_layers(self.network)
            # the whole network tells peft how its layers are quantised
            inject_adapter_in_model(
                LoraConfig(r=rank, lora_alpha=_LORA_ALPHA * rank, target_modules=layers), self.network
            )
        if config.precision == "bf16":
            for weight in decoder.parameters():  # buffers stay: rotary frequencies need all their digits
                if not weight.requires_grad:
                    weight.data = weight.data.bfloat16()
        settings = self.network.config
        hidden = self.network.get_input_embeddings().embedding_dim
        count = len(config.video_dimensions) + len(config.patch_dimensions)
        deviation = getattr(settings.get_text_config(), "initializer_range", 0.02)
        self.queries = nn.Parameter(deviation * torch.randn(count, hidden))
        self.head = nn.Parameter(hidden**-0.5 * torch.randn(count, hidden))
        self.offset = nn.Parameter(torch.zeros(count))
        resampled = hasattr(settings, "perceiver_config")
        self.place = nn.Linear(settings.vision_config.hidden_size if resampled else hidden, hidden)
        if not resampled:
            nn.init.eye_(self.place.weight)
            nn.init.zeros_(self.place.bias)
        if weights:
            self._start_from_published()
        if config.quantization:
            trained = {name for name, value in self.named_parameters() if value.requires_grad}
            self.register_state_dict_post_hook(partial(_drop_others, trained))

    @torch.no_grad()
    def _start_from_published(self) -> None:
        """Copy the head of a published reward model, if that is what the folder holds."""
        name, dimensions = self.config.backbone, self.config.video_dimensions
        embeddings = self.network.get_input_embeddings().weight
        published = published_scores(name, dimensions, self.tokenizer, embeddings)
        for row, dimension in enumerate(dimensions):
            if dimension in published:
                score = published[dimension]
                self.head[row], self.offset[row] = score.head, score.offset
                if score.query is not None:
                    self.queries[row] = score.query

    def save_pretrained(self, folder: Path) -> None:
        """Write the network's config and the tokenizer, from which `weights=False` builds the network again.

        The weights of a quantised network are written too, by transformers and as they are.
        """
        if self.config.quantization:
            part = folder / ".part"  # files that are read at this moment keep their content
            shutil.rmtree(part, ignore_errors=True)
            with _without_adapter(self.network), no_loading_bars("transformers"):
                self.network.save_pretrained(part, save_original_format=False)
            for file in part.iterdir():
                file.replace(folder / file.name)
            part.rmdir()
        else:
            self.network.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def frozen_tensors(self) -> list[Tensor]:
        """The tensors that hold the network's weights, without the LoRA; those of quantised ones with their scales."""
        with _without_adapter(self.network):
            return list(plain_tensors(self.network))

    def frozen_features(self, videos: Tensor) -> Tensor | None:
        """None: the vision tower's output is too large to keep; `encode` computes it."""
        return None

    def fit_closed_form(self, frozen: Tensor | None, prompts: Sequence[str], weight: Tensor) -> Tensor | None:
        """None: nothing here has a closed form."""
        return None

    @torch.no_grad()
    def encode(self, videos: Tensor, frozen: Tensor | None, word_evidence: Tensor | None = None) -> Frames:
        """The frozen vision tower's output on uint8 videos [N, F, H, W, 3]; the shorter side at most 448 pixels."""
        return READERS[self.network.config.model_type](self.network, videos, _FRAME_SIDE)

    def logits(self, features: Frames, prompts: Sequence[str], grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[N, D] logits of the video scores and [N, Q, f, h, w] of the patch scores, from one sequence a clip."""
        read = self._score_sequence(features, prompts, self._patch_blocks(features, grid))
        video, patch = len(self.config.video_dimensions), len(self.config.patch_dimensions)
        patches = read[:, video:].unflatten(1, (-1, patch)).transpose(1, 2).unflatten(-1, tuple(grid))
        return read[:, :video], patches

    def video_logits_for(self, features: Frames, prompts: Sequence[str], others: Tensor) -> Tensor:
        """Video logits [N, M, D] of clip n with prompts[others[n, m]], a pass for each m."""
        passes = [self._score_sequence(features, [prompts[n] for n in column], []) for column in others.T.tolist()]
        return torch.stack(passes, dim=1)

    def video_logits(self, features: Frames, prompts: Sequence[str]) -> Tensor:
        """[N, D] of the video scores alone: what a pass costs without patches."""
        return self._score_sequence(features, prompts, [])

    def patch_logits(self, features: Frames, prompts: Sequence[str], grid: Sequence[int], patch: int) -> Tensor:
        """[N, Q] of one patch (f-major) from a pass of its own; `logits` gives the same for all of them at once."""
        block = self._patch_blocks(features, grid)[patch]
        return self._score_sequence(features, prompts, [block])[:, len(self.config.video_dimensions) :]

    def _patch_blocks(self, features: Frames, grid: Sequence[int]) -> list[Tensor]:
        """The tokens of each patch's block, [N, L, hidden]: its place, its content, the queries of its scores."""
        patches = self.config.patches(grid, features.size)
        content = self.place(
            patches.pool_complete(features.maps.float()).flatten(2).transpose(1, 2).to(self.place.weight.dtype)
        )
        video, blocks = len(self.config.video_dimensions), []
        for index in range(content.shape[1]):
            f, rest = divmod(index, grid[1] * grid[2])
            h, w = divmod(rest, grid[2])
            where = self._embed(f"{f + 1} {h + 1} {w + 1}")
            fixed = [x.expand(len(content), -1, -1) for x in (where, self.queries[video:])]
            blocks.append(torch.cat((fixed[0], content[:, index : index + 1], fixed[1]), dim=1))
        return blocks

    def _embed(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.long()
        embeddings = self.network.get_input_embeddings()
        return embeddings(ids[0].to(embeddings.weight.device))

    def _score_sequence(self, features: Frames, prompts: Sequence[str], patches: Sequence[Tensor]) -> Tensor:
        """Logits [N, D + P * Q] from one sequence a clip: frames, prompt, a block a video dimension, a block a patch.

        Args:
            features: of N clips.
            prompts: of each.
            patches: the tokens of each patch's block, [N, L, hidden].
        """
        count, device = len(prompts), features.tokens.device
        frames = features.tokens.flatten(1, 2).to(self.queries.dtype)
        texts = [self._embed(prompt) for prompt in prompts]
        lengths = torch.tensor([len(text) for text in texts], device=device)
        text = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(frames.dtype)
        video = len(self.config.video_dimensions)
        blocks = [*(query.expand(count, 1, -1) for query in self.queries[:video]), *patches]
        sizes = torch.tensor([block.shape[1] for block in blocks], device=device)
        prefix = frames.shape[1] + text.shape[1]
        known = torch.arange(prefix, device=device) < frames.shape[1] + lengths[:, None]
        position = self._positions(features, text.shape[1], lengths, sizes)
        decoder = self.network.get_decoder()
        computed = torch.bfloat16 if self.config.precision == "bf16" else frames.dtype
        sequence = torch.cat((frames, text, *blocks), dim=1).to(computed)
        without_mask = shared_prefix.usable(sequence)
        layout = Blocks(prefix, tuple(known.sum(dim=1).tolist()), tuple(sizes.tolist())) if without_mask else None
        with shared_prefix.attention(decoder, layout) if layout else nullcontext():
            state = decoder(
                inputs_embeds=sequence,
                attention_mask=None if layout else block_mask(known, sizes),
                position_ids=position if len(position) > 1 else position[0],
                use_cache=False,
                **self._deep_inputs(features, sequence),
            ).last_hidden_state[:, prefix:]
        return self._read_queries(state.to(self.head.dtype), sizes)

    def _read_queries(self, state: Tensor, sizes: Tensor) -> Tensor:
        """Logits [N, D + P * Q] of the queries, which are the last tokens of their blocks.

        Args:
            state: [N, sum of sizes, hidden], behind the prompt.
            sizes: tokens of each block.
        """
        video, patch = len(self.config.video_dimensions), len(self.config.patch_dimensions)
        ends, each = sizes.cumsum(0), torch.arange(patch, device=state.device)
        place = torch.cat((ends[:video] - 1, (ends[video:, None] - patch + each).flatten()))
        row = torch.cat((torch.arange(video), video + torch.arange(patch).repeat(len(sizes) - video))).to(state.device)
        return (state[:, place] * self.head[row]).sum(dim=-1) + self.offset[row]

    def _deep_inputs(self, features: Frames, sequence: Tensor) -> dict[str, Any]:
        """Features that Qwen3-VL adds to the frames' tokens in deeper layers."""
        if not features.deep:
            return {}
        visual = torch.zeros(sequence.shape[:2], dtype=torch.bool, device=sequence.device)
        visual[:, : features.tokens.shape[1] * features.tokens.shape[2]] = True
        deep = [layer.flatten(0, 1).to(sequence.dtype) for layer in features.deep]
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": deep}

    def _positions(self, features: Frames, words: int, lengths: Tensor, sizes: Tensor) -> Tensor:
        """Positions [A, N, L] of the sequence; every block's go on from the end of its clip's prompt.

        Args:
            features: of N clips.
            words: tokens of the longest prompt.
            lengths: [N], tokens of each prompt.
            sizes: tokens of each block.
        """
        position, begin = self.prefix_positions(features, words)
        inside = torch.cat([torch.arange(int(size), device=sizes.device) for size in sizes])
        after = (begin + lengths)[:, None] + inside
        prefix = position.expand(-1, len(lengths), -1)
        return torch.cat((prefix, after.expand(len(position), -1, -1)), dim=2)

    def prefix_positions(self, features: Frames, words: int) -> tuple[Tensor, int]:
        """Positions [A, 1, prefix] of frames and prompt, and where the prompt begins.

        Qwen's models count in time, row and column (A = 3), as multimodal rotary positions do (arXiv:2409.12191); the
        others one by one (A = 1).
        """
        device = features.tokens.device
        if not self.network.config.model_type.startswith("qwen"):
            begin = features.tokens.shape[1] * features.tokens.shape[2]
            return torch.arange(begin + words, device=device)[None, None], begin
        steps, rows, columns = features.maps.shape[2:]
        axes = [torch.arange(side, device=device) for side in (steps, rows, columns)]
        frames = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        begin = max(rows, columns)
        text = (begin + torch.arange(words, device=device)).expand(3, -1)
        return torch.cat((frames, text), dim=1)[:, None], begin


def block_mask(known: Tensor, sizes: Tensor) -> Tensor:
    """Attention mask [N, 1, L, L], True where a query (row) sees a key (column).

    For two tokens of frames, a prompt of two tokens that is padded to three, and two blocks of two tokens:

                      frames  prompt   block 1  block 2
            frames    x .     . . .    . .      . .
                      x x     . . .    . .      . .      causal
            prompt    x x     x . .    . .      . .
                      x x     x x .    . .      . .
            padding   x x     x x x    . .      . .      sees itself, or its softmax is empty; nothing else sees it
            block 1   x x     x x .    x .      . .
                      x x     x x .    x x      . .
            block 2   x x     x x .    . .      x .      sees frames, prompt and itself, not block 1
                      x x     x x .    . .      x x

    Args:
        known: bool [N, prefix], which tokens of frames and prompt are no padding.
        sizes: int64 [B], tokens of each block.
    """
    (count, prefix), device = known.shape, known.device
    lengths = torch.cat((torch.tensor([prefix], device=device), sizes))
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)  # 0: frames and prompt
    order = torch.arange(len(owner), device=device)
    allowed = (order[:, None] >= order) & ((owner == 0) | (owner[:, None] == owner))
    mask = allowed.expand(count, 1, -1, -1).clone()
    mask[..., :prefix] &= known[:, None, None] | torch.eye(len(owner), prefix, dtype=torch.bool, device=device)
    return mask


def _language_layers(network: Any) -> list[str]:
    """The names of the linear layers of the language model: what is quantised, and what gets a LoRA."""
    inside = {id(layer) for layer in network.get_decoder().modules() if isinstance(layer, nn.Linear)}
    return [name for name, layer in network.named_modules() if id(layer) in inside]


@contextmanager
def _without_adapter(network: nn.Module) -> Iterator[None]:
    """Inside the block the network has its own layers in place of those that PEFT has wrapped around them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = {name: layer for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)}
    try:
        for name, layer in wrapped.items():
            network.set_submodule(name, layer.get_base_layer())
        yield
    finally:
        for name, layer in wrapped.items():
            network.set_submodule(name, layer)


def _drop_others(kept: Collection[str], module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Remove from a module's state whatever is not among `kept`; a hook of `state_dict`."""
    for name in [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in kept]:
        del state[name]


def _load_network(config: RewardModelConfig, weights: bool) -> tuple[Any, Any]:
    """A transformers model and its tokenizer; UserError if there is none, or none that can be read here."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    name, quantization = config.backbone, config.quantization

    def read(**how: Any) -> Any:
        with no_loading_bars("transformers"):
            network, found = AutoModelForImageTextToText.from_pretrained(
                name,
                attn_implementation="sdpa",
                dtype=torch.float32,
                key_mapping=_KEYS,
                output_loading_info=True,
                **how,
            )
        # the layer from states to words is not used: reward models are published without it
        absent = sorted(key for key in found["missing_keys"] if not key.startswith("lm_head."))
        if absent:
            raise ValueError(f"{len(absent)} of its weights are missing, such as {absent[0]}")
        return network

    try:
        settings = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        if settings.model_type not in READERS:
            raise UserError(
                f"reward.backbone: expected one of {', '.join(READERS)}, got {name!r}, a {settings.model_type}"
            )
        if weights and getattr(settings, "quantization_config", None):
            raise UserError(
                f"reward.backbone: expected a model that is not stored quantised, got {name!r}; name the one that it "
                "was made from, and set reward.quantization"
            )
        if quantization:
            from accelerate import init_empty_weights

            with init_empty_weights():
                empty = AutoModelForImageTextToText.from_config(settings)
            layers, setting = _language_layers(empty), "reward.quantization"
            network: Any = read_quantized(
                read, empty, layers, quantization, torch.float32, "transformers", stored=not weights, setting=setting
            )
            network.lm_head = nn.Identity()  # from states to words, which nobody reads
            return network, tokenizer
        if not weights:
            return AutoModelForImageTextToText.from_config(settings, attn_implementation="sdpa"), tokenizer
        return read(), tokenizer
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"reward.backbone: expected a model of transformers, got {name!r} ({first_line(error)})"
        ) from error
