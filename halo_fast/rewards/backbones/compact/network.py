"""The compact backbone: a space-time trunk on pixels for the fine scale, pretrained frame features for the coarse one.

Frames are read by EfficientNet-Lite0, words and prompts by MiniLM; both are frozen and shipped in packages. Which words
a clip shows is predicted from the frame features by a ridge regression, in closed form.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halo_fast.rewards.backbones.compact.blocks import Equalized, Residual, Trunk, shrink
from halo_fast.rewards.backbones.compact.motion import Motion
from halo_fast.rewards.backbones.compact.palette import COLOURS, palette_distance
from halo_fast.rewards.backbones.compact.word_probe import WordProbe, fit_word_probe, summary, summary_size
from halo_fast.rewards.base import RewardModelConfig
from halo_fast.rewards.pretrained import STAGE_CHANNELS, TEXT_WIDTH, frame_stages, read_text, words_of

__all__ = ["Compact", "CompactFeatures"]

_EDGES, _PARTS = 2, 4  # stages of the frame network that are kept: strides 8 and 16
_FROZEN = STAGE_CHANNELS[_EDGES] + STAGE_CHANNELS[_PARTS]
_ENLARGEMENT = 3  # of frames before the frame network
_MOST_FRAMES, _LARGEST_SIDE = 17, 256  # that the trunk reads; its memory grows with every pixel
_LARGE = 3 * 2**20  # values of a clip's pixels, beyond which the trunk computes again in the backward pass
_VOCABULARY = 2048  # buckets of words where no encoder reads them
_HEADS = 4  # of the attention from words to the clip
_READINGS = 4  # weighted sums of the word evidence
_DROP_VIDEO, _DROP_PATCH = 0.3, 0.25  # a few hundred labelled clips are memorised otherwise


def _seen(videos: Tensor) -> Tensor:
    """What the trunk reads of videos [N, F, H, W, 3]: up to 17 evenly spread frames, the shorter side up to 256."""
    length, sides = videos.shape[1], videos.shape[2:4]
    scale = _LARGEST_SIDE / min(sides)
    if length > _MOST_FRAMES:
        videos = videos[:, torch.linspace(0, length - 1, _MOST_FRAMES).round().long()]
    if scale >= 1:
        return videos
    size = [max(1, round(side * scale / 8)) * 8 for side in sides]
    frames = videos.flatten(0, 1).movedim(-1, 1).float()
    small = F.interpolate(frames, size, mode="bilinear", antialias=True).movedim(1, -1)
    return small.unflatten(0, videos.shape[:2])


class CompactFeatures(NamedTuple):
    """Features of N clips, whatever the prompt.

    Args:
        maps: [N, c, F, H/s, W/s] at s = 2, 4, 8.
        pixels: [N, 3, F, H, W] in [-1, 1], as the trunk reads them.
        whole: [N, hidden].
        motion: [N, hidden].
        frozen: frame features [N, 152, f', y, x], or None without pretrained networks.
        word_evidence: [N, 384], the words that the clip shows, in the space of words; or None.
        size: frames, height, width.
    """

    maps: tuple[Tensor, Tensor, Tensor]
    pixels: Tensor
    whole: Tensor
    motion: Tensor
    frozen: Tensor | None
    word_evidence: Tensor | None
    size: tuple[int, int, int]


class _Words(NamedTuple):
    """The U different words of M prompts.

    Args:
        states: [U, hidden].
        share: [M, U], of each prompt.
        prompts: [M, hidden].
        embedded: [U, 384] by the encoder; None where words are hashed.
    """

    states: Tensor
    share: Tensor
    prompts: Tensor
    embedded: Tensor | None


class Compact(nn.Module):
    """Multi-scale space-time network that reads the clip word by word, with a video head and a patch head.

    With c = width, and the shapes of one clip of F frames of H x W (boxes in brackets need `pretrained`):

        pixels [3, F, H, W]                              [EfficientNet-Lite0, frozen, 5 frames]
             |                                                         | frozen [152, f', y, x]
        +----v------------ Trunk ----------------+                     |
        | fine   [c,    F, H/2, W/2]             |              [word probe: ridge regression]
        | middle [3c/2, F, H/4, W/4]             |                     | word evidence [384]
        | coarse [2c,   F, H/8, W/8]             |                     |
        +--+-----------+---------------+---------+                     |
           |           |               |                               |
        Motion      averages     4-head attention <-- words of the prompt (MiniLM, or hashed)
           | [2c]      | whole [2c]    | [U, 2c]                       |
           +-----------+-------+-------+-------------------------------+
                               v
                     match, word by word; mean over the prompt's words -> video head -> D logits
                                                                               + mean patch score
        fine, middle, coarse -- mean and root mean square in each patch --+
        distance to the 4 colours that the prompt leads to expect --------+-> local -> neighbours -> patch head
        [frozen features, averaged over each patch] ----------------------+              ^        -> Q logits a patch
                                                            whole and prompt, by FiLM ---+

    Constants: blocks.py holds the trunk's, motion.py the reach and resolution of the motion correlation, palette.py the
    number of colours, word_probe.py the ridge penalties; this file the stages of the frame network, heads and dropout.
    """

    features_by_frame = True
    negatives = 15  # all prompts share one pass, so many are cheap
    probe_mean: Tensor
    probe_scale: Tensor
    probe_weight: Tensor

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.width, config.width * 3 // 2, config.width * 2
        fine, middle, coarse = widths
        hidden, pretrained = coarse, config.pretrained
        video, patch = len(config.video_dimensions), len(config.patch_dimensions)
        # the clip
        self.trunk = Trunk(widths)
        self.motion = Motion(fine, hidden)
        self.whole = nn.Linear(2 * (fine + middle) + 3 * coarse, hidden)
        # the prompt
        self.words: nn.Module = Equalized(TEXT_WIDTH, hidden) if pretrained else nn.Embedding(_VOCABULARY, hidden)
        self.text = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
        # video scores
        self.query, self.memory = nn.Linear(hidden, hidden), nn.Linear(coarse, 2 * hidden)
        self.whole_to_words = nn.Linear(hidden, hidden)
        self.norm_attended, self.norm_whole, self.norm_motion = (nn.LayerNorm(hidden) for _ in range(3))
        self.match = nn.Sequential(nn.Linear((4 + pretrained) * hidden, hidden), nn.GELU())
        self.video_head = nn.Sequential(
            nn.Linear(3 * hidden + _READINGS * pretrained, hidden), nn.GELU(), nn.Linear(hidden, video)
        )
        self.drop_video, self.drop_patch = nn.Dropout(_DROP_VIDEO), nn.Dropout(_DROP_PATCH)
        self.from_patches = nn.Parameter(torch.full((video, patch), 0.3))
        # patch scores
        self.expect = nn.Linear(hidden, 2 * middle)
        self.palette = nn.Linear(hidden, 3 * COLOURS)
        self.from_palette = nn.Conv3d(COLOURS + 1, middle, 1)
        self.compare = Residual(middle)
        self.local = nn.Linear(fine + 2 * middle + COLOURS + 1 + coarse * (1 + pretrained), hidden)
        self.neighbours = Residual(hidden, separable=False)
        self.modulate = nn.Linear(2 * hidden, 2 * hidden)
        self.patch_head = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, patch))
        for film in (self.expect, self.modulate):
            nn.init.zeros_(film.weight)
            nn.init.zeros_(film.bias)
        if pretrained:
            self._add_pretrained(hidden, coarse, video)

    def _add_pretrained(self, hidden: int, coarse: int, video: int) -> None:
        """The layers that read the pretrained networks."""
        size = summary_size(_FROZEN)
        self.sentence = Equalized(TEXT_WIDTH, hidden)
        self.norm_frozen, self.from_frozen = nn.LayerNorm(_FROZEN), nn.Linear(_FROZEN, coarse)
        self.word_weights = nn.Linear(hidden, _READINGS)
        self.from_evidence = nn.Parameter(torch.full((video, _READINGS), 0.1))
        self.register_buffer("probe_mean", torch.zeros(size))
        self.register_buffer("probe_scale", torch.zeros(size))
        self.register_buffer("probe_weight", torch.zeros(size, TEXT_WIDTH))

    @torch.no_grad()
    def frozen_features(self, videos: Tensor) -> Tensor | None:
        """Frame features at strides 8 and 16 of frames enlarged to 224 or threefold, whichever is less.

        Args:
            videos: uint8 [N, F, H, W, 3].

        Returns:
            float32 [N, 152, f', y, x] at stride 8; a mirrored clip's are nearly mirrored. None without `pretrained`.
        """
        if not self.config.pretrained:
            return None
        stages = list(islice(frame_stages(videos, "bilinear", _ENLARGEMENT), _PARTS + 1))
        edges = stages[_EDGES]
        both = torch.cat((edges, F.interpolate(stages[_PARTS], edges.shape[-2:])), dim=1)
        return both.unflatten(0, (len(videos), -1)).transpose(1, 2)

    @torch.no_grad()
    def fit_closed_form(self, frozen: Tensor | None, prompts: Sequence[str], weight: Tensor) -> Tensor | None:
        """Fit the word probe; see `fit_word_probe`.

        Args:
            frozen: of all training clips.
            prompts: of each.
            weight: [N], how far each clip shows what its prompt says.

        Returns:
            the leave-one-out word evidence [N, 384]; None without `pretrained`.
        """
        if frozen is None:
            return None
        summaries = torch.cat([summary(part.float()) for part in frozen.split(32)])
        probe, left_out = fit_word_probe(summaries, prompts, weight)
        for buffer, value in zip((self.probe_mean, self.probe_scale, self.probe_weight), probe, strict=True):
            buffer.copy_(value)
        return left_out

    def exchange_words(self, evidence: Tensor, words: Mapping[str, str]) -> Tensor:
        """The word evidence [N, 384] of mirrored clips, which show each of the words where they showed its opposite.

        Evidence of a word is a product with its embedding, so this is the smallest change that exchanges the products.
        """
        embedded = torch.stack([read_text(word) for word in words]).to(evidence)
        others = torch.stack([read_text(word) for word in words.values()]).to(evidence)
        change = evidence @ (others - embedded).T
        return evidence + change @ torch.linalg.pinv(embedded).T

    def encode(self, videos: Tensor, frozen: Tensor | None, word_evidence: Tensor | None = None) -> CompactFeatures:
        """Features of uint8 videos [N, F, H, W, 3]; `word_evidence` [N, 384] stands in for the word probe's."""
        pixels = _seen(videos).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        maps = self._maps(pixels)
        # the mean over time hides motion, the mean temporal difference shows it
        changes = [x.diff(dim=2).abs().sum(dim=(2, 3, 4)) / x[0, 0].numel() for x in maps]
        averages = [*(x.mean(dim=(2, 3, 4)) for x in maps), maps[2].amax(dim=(2, 3, 4)), *changes]
        if frozen is not None and word_evidence is None:
            probe = WordProbe(self.probe_mean, self.probe_scale, self.probe_weight)
            word_evidence = (summary(frozen) - probe.mean) * probe.scale @ probe.weight
        size = (videos.shape[1], videos.shape[2], videos.shape[3])
        whole = self.whole(torch.cat(averages, dim=1))
        return CompactFeatures(maps, pixels, whole, self.motion(maps[0]), frozen, word_evidence, size)

    def _maps(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The trunk's maps; in training those of large clips one at a time, so that a batch of them fits."""
        if not (torch.is_grad_enabled() and pixels[0].numel() > _LARGE):
            fine, middle, coarse = self.trunk(pixels)
            return fine, middle, coarse
        found = [checkpoint(self.trunk, clip, use_reentrant=False) for clip in pixels.split(1)]
        fine, middle, coarse = (torch.cat(maps) for maps in zip(*found, strict=True))
        return fine, middle, coarse

    def logits(self, features: CompactFeatures, prompts: Sequence[str], grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits of the video scores [N, D] and of the patch scores [N, Q, f, h, w]."""
        words = self._read_words(prompts)
        own = torch.arange(len(prompts))[:, None]
        patches = self._patch_logits(features, words.prompts, grid)
        # detached: patch scores learn from their own labels, not from a score of the whole clip
        overall = patches.detach().sigmoid().mean(dim=(2, 3, 4)).logit(eps=1e-4)
        return self._video_logits(features, words, own)[:, 0] + overall @ self.from_patches.T, patches

    def video_logits_for(self, features: CompactFeatures, prompts: Sequence[str], others: Tensor) -> Tensor:
        """Video logits [N, M, D] of clip n with prompts[others[n, m]], less what the patches add to each alike."""
        return self._video_logits(features, self._read_words(prompts), others)

    def _read_words(self, prompts: Sequence[str]) -> _Words:
        """Embed the different words of M prompts, and the prompts; without pretrained networks words are hashed."""
        rows = [words_of(prompt) or [""] for prompt in prompts]
        known = sorted({word for row in rows for word in row})
        share = torch.tensor([[row.count(word) / len(row) for word in known] for row in rows])
        share = share.to(self.whole.weight.device)
        if not self.config.pretrained:
            buckets = [zlib.crc32(word.encode()) % _VOCABULARY for word in known]
            states = self.text(self.words(torch.tensor(buckets, device=share.device)))
            return _Words(states, share, share @ states, None)
        embedded = torch.stack([read_text(word) for word in known]).to(share.device)
        states = self.text(self.words(embedded))
        sentences = torch.stack([read_text(" ".join(row)) for row in rows]).to(share.device)
        return _Words(states, share, self.sentence(sentences) + share @ states, embedded)

    def _video_logits(self, features: CompactFeatures, words: _Words, others: Tensor) -> Tensor:
        """[N, M, D] of clip n with prompt others[n, m] [N, M]."""
        memory = features.maps[2].flatten(2).transpose(1, 2)
        key, value = (x.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for x in self.memory(memory).chunk(2, dim=-1))
        query = self.query(words.states).unflatten(-1, (_HEADS, -1)).transpose(0, 1).expand(len(memory), -1, -1, -1)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        whole, motion = self.norm_whole(self.whole_to_words(features.whole)), self.norm_motion(features.motion)
        per_word = [words.states * x for x in (self.norm_attended(attended), whole[:, None], motion[:, None])]
        per_word.append(words.states.expand_as(attended))
        if features.word_evidence is not None and words.embedded is not None:
            evidence = features.word_evidence @ words.embedded.T * TEXT_WIDTH**-0.5
            per_word.append(words.states * evidence[..., None])
        share = words.share[others]
        matched = torch.einsum("nuh,nmu->nmh", self.match(torch.cat(per_word, dim=-1)), share)
        clip = torch.cat((features.whole, features.motion), dim=1)[:, None].expand(-1, others.shape[1], -1)
        if features.word_evidence is None:
            return self.video_head(self.drop_video(torch.cat((clip, matched), dim=-1)))
        # attention over the prompt's words; words that are absent from it are masked
        weights = self.word_weights(words.states).expand(*share.shape, _READINGS)
        weights = weights.masked_fill(share[..., None] == 0, -torch.inf)
        read = torch.einsum("nu,nmur->nmr", evidence, weights.softmax(dim=2))
        logits = self.video_head(self.drop_video(torch.cat((clip, matched, read), dim=-1)))
        return logits + read @ self.from_evidence.T

    def _patch_logits(self, features: CompactFeatures, prompts: Tensor, grid: Sequence[int]) -> Tensor:
        """[N, Q, f, h, w] for prompts [N, hidden]."""
        fine, middle, coarse = features.maps
        # the prompt is compared before averaging over patches: afterwards a wrong colour is a mere tint
        scale, shift = self.expect(prompts)[:, :, None, None, None].chunk(2, dim=1)
        distance = palette_distance(features.pixels, self.palette(prompts).unflatten(1, (COLOURS, 3)))
        middle = F.gelu(self.compare(middle * (1 + scale) + shift + self.from_palette(distance)))
        patches = self.config.patches(grid, features.size)
        power = torch.cat((shrink(distance.square(), 2), shrink(middle.square(), 2)), dim=1)
        means = torch.cat((shrink(fine, 4), shrink(middle, 2), coarse), dim=1)
        means, roots = patches.pool_complete(means), (patches.pool_complete(power) + 1e-4).sqrt()
        pooled = torch.cat((means, roots), dim=1).movedim(1, -1)
        if features.frozen is not None:
            frozen = self.from_frozen(self.norm_frozen(patches.pool_complete(features.frozen).movedim(1, -1)))
            pooled = torch.cat((pooled, frozen), dim=-1)
        local = self.local(self.drop_patch(pooled))
        local = self.neighbours(local.movedim(-1, 1)).movedim(1, -1)
        scale, shift = self.modulate(torch.cat((features.whole, prompts), dim=1))[:, None, None, None].chunk(2, dim=-1)
        return self.patch_head(F.gelu(local * (1 + scale) + shift)).movedim(-1, 1)
