"""Triton kernels for GPUs (and, with TRITON_INTERPRET=1, for CPU tensors in tests).

Every function takes 5-D strided views [N, C, F, H, W] whose device and dtype have been checked; nothing here is
differentiable.

A program of the forward kernel reads whole stretches of the (row, column) plane, not patches: its loads are as wide as
the memory layout allows, however short and ragged the patches are. It keeps one sum per position over channels and
frames, and adds them patch by patch at the end. The program that arrives last at a slab adds the slab's parts in their
fixed order, so there is one launch, no float atomic, and the same bits on every run.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


class LaunchConfig(NamedTuple):
    """block: positions of the plane per program; lines: (channel, frame) planes per program."""

    block: int
    lines: int
    num_warps: int


def launch_config(positions: int, lines: int, align_bytes: int, itemsize: int) -> LaunchConfig:
    """Launch sizes for slabs of `positions` plane positions with `lines` (channel, frame) planes each.

    A thread holds eight positions, four in float64, and two where nothing is aligned and each needs an address of its
    own. Sums are cut by these sizes, so they depend on the shape alone: the bits do not change from one NVIDIA GPU to
    the next.
    """
    widest = 256 if align_bytes < 8 else 512 if itemsize == 8 else 1024
    block = min(widest, max(128, triton.next_power_of_2(positions)))
    if INTERPRETED:
        return LaunchConfig(block, 64, 1)
    per_program = 8 if lines * math.ceil(positions / block) <= 512 else 32
    threads = triton.runtime.driver.active.get_current_target().warp_size
    return LaunchConfig(block, per_program, max(1, block * 128 // widest // threads))


def forward_bytes(shape: Sequence[int], grid: Sequence[int], itemsize: int, inputs: int = 3) -> int:
    """Bytes that patch_log_ratio (inputs 3) or patch_error (2) must move: every input once, the table once."""
    return inputs * math.prod(shape) * itemsize + shape[0] * math.prod(grid) * max(4, itemsize)


def backward_bytes(shape: Sequence[int], grid: Sequence[int], itemsize: int) -> int:
    """Bytes that gran_dpo_backward must move: two inputs and the gradient once, the table and its factor once."""
    return forward_bytes(shape, grid, itemsize, 3) + max(4, itemsize)


def unavailable(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`, or None."""
    if device.type == "cpu" and not INTERPRETED:
        return (
            "Triton has no code generator for CPUs: there it only runs interpreted, with TRITON_INTERPRET=1 (for tests)"
        )
    return None


def describe() -> str:
    """Version and mode, in words."""
    return f"Triton {triton.__version__}, {'interpreted (for tests, slow)' if INTERPRETED else 'compiled'}"


# ---- device code

# Sizes and strides are plain numbers to the compiler, so that a new shape does not compile a new kernel; what loads
# need to know about alignment is in ALIGN.
_SIZES = ["C", "F", "H", "W", "B", "P", "grid_f", "grid_h", "grid_w", "chunks", "splits"]
_VIEWS = ["policy", "reference", "target", "prediction", "gradient"]
_STRIDES = [f"{view}_{side}" for view in _VIEWS for side in "ncfhw"]


def _jit(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in (*_SIZES, *_STRIDES)])


@triton.jit
def _length(index, side, parts):
    return (index + 1) * side // parts - index * side // parts


@_jit
def _forward_kernel(
    policy,
    reference,
    target,
    out,  # [N, f, h, w]
    parts,  # [N, f, h, parts, w]
    arrivals,  # [N, f, h], zero before and after
    policy_n: tl.int64,
    policy_c: tl.int64,
    policy_f: tl.int64,
    policy_h: tl.int64,
    policy_w: tl.int64,
    reference_n: tl.int64,
    reference_c: tl.int64,
    reference_f: tl.int64,
    reference_h: tl.int64,
    reference_w: tl.int64,
    target_n: tl.int64,
    target_c: tl.int64,
    target_f: tl.int64,
    target_h: tl.int64,
    target_w: tl.int64,
    C,
    F,
    H,
    W,
    grid_f,
    grid_h,
    grid_w,
    chunks,
    splits,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    FLAT: tl.constexpr,
    POSITIONS: tl.constexpr,
    SINGLE: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    if WIDE:
        H = H.to(tl.int64)
        W = W.to(tl.int64)
    count = chunks * splits
    program = tl.program_id(0).to(tl.int64)
    slab = program // count
    part = (program % count).to(tl.int32)
    chunk, split = part % chunks, part // chunks
    kh = (slab % grid_h).to(tl.int32)
    kf = (slab // grid_h % grid_f).to(tl.int32)
    n = slab // grid_h // grid_f
    first_frame = kf * F // grid_f
    frames = _length(kf, F, grid_f)
    begin, end = kh * H // grid_h * W, (kh + 1) * H // grid_h * W

    # A mask by aligned units keeps the loads wide; what lies outside the slab is left out below.
    unit = begin // ALIGN + chunk * (BLOCK // ALIGN) + tl.arange(0, BLOCK) // ALIGN
    readable = unit * ALIGN < end
    position = (begin // ALIGN + chunk * (BLOCK // ALIGN)) * ALIGN + tl.arange(0, BLOCK)
    column = position % W
    if FLAT:
        policy += position
        reference += position
        target += position
    else:
        row = position // W
        policy += row * policy_h + column * policy_w
        reference += row * reference_h + column * reference_w
        target += row * target_h + column * target_w

    total = tl.zeros([BLOCK], ACCUMULATE)
    lines = C * frames
    share = (lines + splits - 1) // splits
    for line in range(split * share, min(lines, (split + 1) * share)):
        c = (line // frames).to(tl.int64)
        f = (first_frame + line % frames).to(tl.int64)
        o = tl.load(policy + (n * policy_n + c * policy_c + f * policy_f) * ALIGN, mask=readable, other=0.0)
        tau = tl.load(target + (n * target_n + c * target_c + f * target_f) * ALIGN, mask=readable, other=0.0)
        o, tau = o.to(ACCUMULATE), tau.to(ACCUMULATE)
        if HAS_REFERENCE:
            o_ref = tl.load(
                reference + (n * reference_n + c * reference_c + f * reference_f) * ALIGN, mask=readable, other=0.0
            )
            o_ref = o_ref.to(ACCUMULATE)
            total += (o_ref - o) * ((o - tau) + (o_ref - tau))
        else:
            total += (o - tau) * (o - tau)

    live = (position >= begin) & (position < end)
    depth = lines.to(ACCUMULATE)
    if POSITIONS:
        tl.store(out + slab * grid_w + position, total / depth, mask=live)
    else:
        area = _length(kh, H, grid_h).to(ACCUMULATE)
        kw = ((column + 1) * grid_w - 1) // W
        for k in range(grid_w):
            value = tl.sum(tl.where(live & (kw == k), total, 0.0))
            if SINGLE:
                tl.store(out + slab * grid_w + k, value / (depth * area * _length(k, W, grid_w).to(ACCUMULATE)))
            else:
                tl.store(parts + (slab * count + part) * grid_w + k, value)
        if not SINGLE:
            # The barrier puts every thread's stores before the release; the acquire lets the last program see all
            # parts.
            tl.debug_barrier()
            if tl.atomic_add(arrivals + slab, 1, sem="acq_rel") == count - 1:
                for k in range(grid_w):
                    value = tl.zeros([128], ACCUMULATE)
                    for at in range(0, count, 128):
                        which = at + tl.arange(0, 128)
                        value += tl.load(
                            parts + (slab * count + which) * grid_w + k,
                            mask=which < count,
                            other=0.0,
                            cache_modifier=".cg",
                        )
                    tl.store(
                        out + slab * grid_w + k, tl.sum(value) / (depth * area * _length(k, W, grid_w).to(ACCUMULATE))
                    )
                tl.store(arrivals + slab, 0)


@_jit
def _backward_kernel(
    factor,  # 0-d, or None for 1
    grad,  # [N, f, h, w]
    prediction,
    target,
    gradient,
    prediction_n: tl.int64,
    prediction_c: tl.int64,
    prediction_f: tl.int64,
    prediction_h: tl.int64,
    prediction_w: tl.int64,
    target_n: tl.int64,
    target_c: tl.int64,
    target_f: tl.int64,
    target_h: tl.int64,
    target_w: tl.int64,
    gradient_n: tl.int64,
    gradient_c: tl.int64,
    gradient_f: tl.int64,
    gradient_h: tl.int64,
    gradient_w: tl.int64,
    C,
    F,
    H,
    W,
    grid_f,
    grid_h,
    grid_w,
    chunks,
    splits,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    FLAT: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    if WIDE:
        H = H.to(tl.int64)
        W = W.to(tl.int64)
    program = tl.program_id(0).to(tl.int64)
    chunk = (program % chunks).to(tl.int32)
    split = (program // chunks % splits).to(tl.int32)
    kf = (program // chunks // splits % grid_f).to(tl.int32)
    n = program // chunks // splits // grid_f
    first_frame = kf * F // grid_f
    frames = _length(kf, F, grid_f)

    unit = chunk * (BLOCK // ALIGN) + tl.arange(0, BLOCK) // ALIGN
    live = unit * ALIGN < H * W
    position = chunk * (BLOCK // ALIGN) * ALIGN + tl.arange(0, BLOCK)
    row, column = position // W, position % W
    if POSITIONS:
        patch = position
        size = (C * frames).to(ACCUMULATE)
    else:
        kh, kw = ((row + 1) * grid_h - 1) // H, ((column + 1) * grid_w - 1) // W
        patch = kh * grid_w + kw
        size = (
            (C * frames).to(ACCUMULATE) * _length(kh, H, grid_h).to(ACCUMULATE) * _length(kw, W, grid_w).to(ACCUMULATE)
        )
    scale = tl.load(grad + (n * grid_f + kf) * grid_h * grid_w + patch, mask=live, other=0.0)
    if factor is not None:
        scale = tl.load(factor) * scale
    scale = 2.0 * scale / size
    if FLAT:
        prediction += position
        target += position
        gradient += position
    else:
        prediction += row * prediction_h + column * prediction_w
        target += row * target_h + column * target_w
        gradient += row * gradient_h + column * gradient_w

    lines = C * frames
    share = (lines + splits - 1) // splits
    for line in range(split * share, min(lines, (split + 1) * share)):
        c = (line // frames).to(tl.int64)
        f = (first_frame + line % frames).to(tl.int64)
        o = tl.load(prediction + (n * prediction_n + c * prediction_c + f * prediction_f) * ALIGN, mask=live, other=0.0)
        tau = tl.load(target + (n * target_n + c * target_c + f * target_f) * ALIGN, mask=live, other=0.0)
        value = (o.to(ACCUMULATE) - tau.to(ACCUMULATE)) * scale
        at = gradient + (n * gradient_n + c * gradient_c + f * gradient_f) * ALIGN
        tl.store(at, value.to(gradient.dtype.element_ty), mask=live)


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _softplus(z):
    # log1p(e) by log(1 + e) e / ((1 + e) - 1): the rounding of 1 + e cancels.
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    one = u == 1.0
    return tl.where(z > 0, z, 0.0) + tl.where(one, e, tl.log(u) * (e / tl.where(one, 1.0, u - 1.0)))


@triton.jit
def _link(z, LINK: tl.constexpr, E: tl.constexpr):
    if LINK == "conservative":
        value = (1 - E) * _softplus(-z) + E * _softplus(z)
        slope = -(1 - E) * _sigmoid(-z) + E * _sigmoid(z)
    elif LINK == "robust":
        value = ((1 - E) * _softplus(-z) - E * _softplus(z)) / (1 - 2 * E)
        slope = (-(1 - E) * _sigmoid(-z) - E * _sigmoid(z)) / (1 - 2 * E)
    elif LINK == "hinge":
        value = tl.where(z >= 1, 0.0, 1 - z)
        slope = tl.where(z < 1, z * 0.0 - 1.0, 0.0)
    elif LINK == "ipo":
        value = (z - 0.5) * (z - 0.5)
        slope = 2 * (z - 0.5)
    elif LINK == "kto":
        value = _sigmoid(-z)
        slope = -_sigmoid(z) * _sigmoid(-z)
    else:
        value = _softplus(-z)
        slope = -_sigmoid(-z)
    return value, slope


@triton.jit
def _signed_weight(a, b, GAMMA: tl.constexpr, DELTA: tl.constexpr):
    # A comparison with NaN is false, so an unlabelled entry is a tie.
    margin = a - b
    size = tl.abs(margin)
    labelled = size > DELTA
    if GAMMA == 0.0:
        size = tl.where(labelled, 1.0, size)
    elif GAMMA != 1.0:
        size = tl.exp(GAMMA * tl.log(tl.where(labelled, size, 1.0)))
    return tl.where(labelled, tl.where(margin > 0, size, -size), 0.0)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _patch_tile(log_ratio, patch_rewards, pair, p, live, B, P, GAMMA: tl.constexpr, DELTA: tl.constexpr):
    """Margins -D_p and signed weights [pairs, patches]."""
    a = pair[:, None] * P + p[None, :]
    b = a + B * P
    margin = tl.load(log_ratio + a, mask=live, other=0.0) - tl.load(log_ratio + b, mask=live, other=0.0)
    weight = tl.zeros_like(margin)
    if patch_rewards is not None:
        r_a = tl.load(patch_rewards + a, mask=live, other=0.0)
        r_b = tl.load(patch_rewards + b, mask=live, other=0.0)
        weight = _signed_weight(r_a, r_b, GAMMA, DELTA).to(margin.dtype)
    return margin, weight


@triton.jit
def _volume(p, F, H, W, grid_f, grid_h, grid_w, ACCUMULATE: tl.constexpr):
    kf, kh, kw = p // grid_w // grid_h, p // grid_w % grid_h, p % grid_w
    share = _length(kf, F, grid_f).to(ACCUMULATE) / F * (_length(kh, H, grid_h).to(ACCUMULATE) / H)
    return share * (_length(kw, W, grid_w).to(ACCUMULATE) / W)


@triton.jit
def _pair_sums(
    log_ratio, patch_rewards, pair, B, P, F, H, W, grid_f, grid_h, grid_w, patch_gamma: tl.constexpr, patch_delta:
    tl.constexpr, PAIRS: tl.constexpr, PATCHES: tl.constexpr, ACCUMULATE: tl.constexpr
):  # fmt: skip
    """Video margin, sum of patch weights and number of labelled patches of each pair [pairs]."""
    margin_sum = tl.zeros([PAIRS], ACCUMULATE)
    weight_sum = tl.zeros([PAIRS], ACCUMULATE)
    labelled = tl.zeros([PAIRS], ACCUMULATE)
    for first in range(0, P, PATCHES):
        p = first + tl.arange(0, PATCHES)
        live = (pair < B)[:, None] & (p < P)[None, :]
        margin, weight = _patch_tile(log_ratio, patch_rewards, pair, p, live, B, P, patch_gamma, patch_delta)
        volume = _volume(p, F, H, W, grid_f, grid_h, grid_w, ACCUMULATE)
        margin_sum += tl.sum(tl.where(live, volume[None, :] * margin, 0.0), 1)
        weight_sum += tl.sum(tl.abs(weight), 1)
        labelled += tl.sum((weight != 0).to(ACCUMULATE), 1)
    return margin_sum, weight_sum, labelled


@triton.jit
def _video_weights(video_rewards, pair, B, like, GAMMA: tl.constexpr, DELTA: tl.constexpr):
    weight = tl.zeros_like(like)
    if video_rewards is not None:
        r_a = tl.load(video_rewards + pair, mask=pair < B, other=0.0)
        r_b = tl.load(video_rewards + B + pair, mask=pair < B, other=0.0)
        weight = _signed_weight(r_a, r_b, GAMMA, DELTA).to(like.dtype)
    return weight


@_jit
def _table_kernel(
    log_ratio,
    patch_rewards,
    video_rewards,
    kappa,
    error,
    loser_scale,
    loss,
    coefficients,
    video_logits,
    patch_logits,
    active,
    B: tl.int64,
    P: tl.int64,
    F,
    H,
    W,
    grid_f,
    grid_h,
    grid_w,
    LINK: tl.constexpr,
    label_smoothing: tl.constexpr,
    video_weight: tl.constexpr,
    patch_weight: tl.constexpr,
    video_beta: tl.constexpr,
    patch_beta: tl.constexpr,
    video_gamma: tl.constexpr,
    video_delta: tl.constexpr,
    patch_gamma: tl.constexpr,
    patch_delta: tl.constexpr,
    sft_weight: tl.constexpr,
    patch_sft_weight: tl.constexpr,
    PAIRS: tl.constexpr,
    PATCHES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    by_video: tl.constexpr = video_weight != 0 or sft_weight != 0
    by_patch: tl.constexpr = patch_weight != 0 or patch_sft_weight != 0

    count = tl.zeros([PAIRS], ACCUMULATE)
    for first_pair in range(0, B, PAIRS):
        pair = first_pair + tl.arange(0, PAIRS)
        margin_sum, weight_sum, labelled = _pair_sums(
            log_ratio, patch_rewards, pair, B, P, F, H, W, grid_f, grid_h, grid_w, patch_gamma, patch_delta,
            PAIRS, PATCHES, ACCUMULATE
        )  # fmt: skip
        video = _video_weights(video_rewards, pair, B, margin_sum, video_gamma, video_delta)
        used = ((video != 0) & by_video) | ((labelled > 0) & by_patch)
        tl.store(active + pair, used.to(ACCUMULATE), mask=pair < B)
        count += used.to(ACCUMULATE)
    pairs_in_mean = tl.sum(count)
    pairs_in_mean = tl.where(pairs_in_mean > 1, pairs_in_mean, 1.0)

    loss_sum = tl.zeros([PAIRS], ACCUMULATE)
    for first_pair in range(0, B, PAIRS):
        pair = first_pair + tl.arange(0, PAIRS)
        margin_sum, weight_sum, labelled = _pair_sums(
            log_ratio, patch_rewards, pair, B, P, F, H, W, grid_f, grid_h, grid_w, patch_gamma, patch_delta,
            PAIRS, PATCHES, ACCUMULATE
        )  # fmt: skip
        video = _video_weights(video_rewards, pair, B, margin_sum, video_gamma, video_delta)
        used = (((video != 0) & by_video) | ((labelled > 0) & by_patch)).to(ACCUMULATE)
        share = used / pairs_in_mean
        video_scale = tl.zeros_like(margin_sum) + 0.5 * video_beta
        patch_scale = tl.zeros_like(margin_sum) + 0.5 * patch_beta
        if kappa is not None:
            video_scale *= tl.load(kappa + pair, mask=pair < B, other=0.0)
            patch_scale *= tl.load(kappa + B + pair, mask=pair < B, other=0.0)
        video_logit = video_scale * _sign(video) * margin_sum
        tl.store(video_logits + pair, video_logit, mask=pair < B)
        video_value, video_derivative = _link(video_logit, LINK, label_smoothing)
        pair_loss = video_weight * tl.abs(video) * video_value
        video_slope = -video_weight * video * video_derivative * video_scale
        patch_share = patch_weight / tl.where(weight_sum > 0, weight_sum, 1.0)
        patch_rho = patch_sft_weight / tl.where(labelled > 1, labelled, 1.0)

        for first in range(0, P, PATCHES):
            p = first + tl.arange(0, PATCHES)
            live = (pair < B)[:, None] & (p < P)[None, :]
            a = pair[:, None] * P + p[None, :]
            b = a + B * P
            margin, weight = _patch_tile(log_ratio, patch_rewards, pair, p, live, B, P, patch_gamma, patch_delta)
            volume = _volume(p, F, H, W, grid_f, grid_h, grid_w, ACCUMULATE)[None, :]
            logit = patch_scale[:, None] * _sign(weight) * margin
            tl.store(patch_logits + a, logit, mask=live)
            value, derivative = _link(logit, LINK, label_smoothing)
            term = patch_share[:, None] * tl.abs(weight) * value
            slope = video_slope[:, None] * volume - (patch_share * patch_scale)[:, None] * weight * derivative
            c_a, c_b = slope, -slope
            if loser_scale is not None:
                c_a = tl.where(c_a < 0, c_a * tl.load(loser_scale + a, mask=live, other=0.0), c_a)
                c_b = tl.where(c_b < 0, c_b * tl.load(loser_scale + b, mask=live, other=0.0), c_b)
            if error is not None:
                rho = sft_weight * volume
                rho_a = tl.where(weight > 0, patch_rho[:, None], 0.0) + tl.where(video[:, None] > 0, rho, 0.0)
                rho_b = tl.where(weight < 0, patch_rho[:, None], 0.0) + tl.where(video[:, None] < 0, rho, 0.0)
                term += rho_a * tl.load(error + a, mask=live, other=0.0) + rho_b * tl.load(
                    error + b, mask=live, other=0.0
                )
                c_a += rho_a
                c_b += rho_b
            tl.store(coefficients + a, c_a * share[:, None], mask=live)
            tl.store(coefficients + b, c_b * share[:, None], mask=live)
            pair_loss += tl.sum(tl.where(live, term, 0.0), 1)
        loss_sum += tl.where(pair < B, pair_loss * share, 0.0)
    tl.store(loss, tl.sum(loss_sum))


# ---- launchers

_ACCUMULATE = {torch.float64: (torch.float64, tl.float64)}
_ARRIVALS: dict[tuple[torch.device, int], Tensor] = {}


def _accumulate(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    return _ACCUMULATE.get(dtype, (torch.float32, tl.float32))


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


def _arrivals(count: int, device: torch.device) -> Tensor:
    """Counters at zero. The kernel leaves them at zero, so one stream's launches, which never overlap, share them."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.accelerator.current_stream(device).stream_id)
    if key not in _ARRIVALS or _ARRIVALS[key].numel() < count:
        _ARRIVALS[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return _ARRIVALS[key]


def _flat(*views: Tensor) -> bool:
    """Whether rows follow each other without gaps in every view."""
    height, width = views[0].shape[3:]
    return all((width == 1 or v.stride(4) == 1) and (height == 1 or v.stride(3) == width) for v in views)


def _alignment(*views: Tensor) -> int:
    """Elements, at most 16 bytes, in whose multiples every plane of every view begins and ends."""
    steps = [s for v in views for s, size in zip(v.stride()[:3], v.shape[:3], strict=True) if size > 1]
    plane = views[0].shape[3] * views[0].shape[4]
    return math.gcd(16 // views[0].element_size(), plane, *steps)


def _strides(view: Tensor, align: int) -> tuple[int, ...]:
    n, c, f, h, w = view.stride()
    shape = view.shape
    return (*(s // align if size > 1 else 0 for s, size in zip((n, c, f), shape[:3], strict=True)), h, w)


def _plane(shape: Sequence[int], grid: Sequence[int], flat: bool) -> tuple[bool, int, int, int, int]:
    """(one patch per position, H, W, h, w); such planes are treated as one long row."""
    (height, width), (grid_h, grid_w) = shape[3:], grid[1:]
    if flat and (height, width) == (grid_h, grid_w):
        return True, 1, height * width, 1, height * width
    return False, height, width, grid_h, grid_w


def _wide(height: int, width: int, grid_h: int, grid_w: int, positions: bool) -> bool:
    """Whether index arithmetic within a plane needs 64 bits."""
    products = (
        [(height + 1) * width + 2048] if positions else [(height + 2) * (width + 2048), height * height, width * width]
    )
    return max(products) >= 2**31


def _forward(policy: Tensor, reference: Tensor | None, target: Tensor, grid: Sequence[int]) -> Tensor:
    samples, channels, frames = policy.shape[:3]
    torch_dtype, dtype = _accumulate(policy.dtype)
    out = policy.new_empty((samples, *grid), dtype=torch_dtype)
    if out.numel() == 0:
        return out
    views = [view for view in (policy, reference, target) if view is not None]
    flat = _flat(*views)
    align = _alignment(*views) if flat else 1
    positions, height, width, grid_h, grid_w = _plane(policy.shape, grid, flat)
    lines = channels * math.ceil(frames / grid[0])
    # The slab may begin up to align - 1 positions before its own first one.
    stretch = math.ceil(height / grid_h) * width + (align - 1 if grid_h > 1 else 0)
    config = launch_config(stretch, lines, align * policy.element_size(), policy.element_size())
    chunks = math.ceil(stretch / config.block)
    splits = 1 if positions else math.ceil(lines / config.lines)
    slabs = samples * grid[0] * grid_h
    single = positions or chunks * splits == 1
    with _on(policy.device):
        parts = out if single else out.new_empty(slabs * chunks * splits * grid_w)
        arrivals = out if single else _arrivals(slabs, policy.device)
        other = policy if reference is None else reference
        _forward_kernel[(slabs * chunks * splits,)](
            policy,
            other,
            target,
            out,
            parts,
            arrivals,
            *_strides(policy, align),
            *_strides(other, align),
            *_strides(target, align),
            channels,
            frames,
            height,
            width,
            grid[0],
            grid_h,
            grid_w,
            chunks,
            splits,
            BLOCK=config.block,
            ALIGN=align,
            FLAT=flat,
            POSITIONS=positions,
            SINGLE=single,
            WIDE=_wide(height, width, grid_h, grid_w, positions),
            HAS_REFERENCE=reference is not None,
            ACCUMULATE=dtype,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return out


def patch_log_ratio(policy: Tensor, reference: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    """E_p(reference) - E_p(policy) in the factored form, [N, f, h, w]."""
    return _forward(policy, reference, target, grid)


def patch_error(prediction: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    """Mean squared error of each patch, [N, f, h, w]."""
    return _forward(prediction, None, target, grid)


def patch_error_backward(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """2 (prediction - target) grad_p / Z_p, in the dtype and memory order of prediction; grad is [N, f, h, w]."""
    return gran_dpo_backward(None, grad, prediction, target)


def gran_dpo_backward(factor: Tensor | None, grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """As patch_error_backward, of factor * grad with a 0-d factor (None is 1)."""
    gradient = torch.empty_like(prediction)
    if gradient.numel() == 0:
        return gradient
    torch_dtype, dtype = _accumulate(prediction.dtype)
    grad = grad.to(torch_dtype).contiguous()
    factor = None if factor is None else factor.to(torch_dtype)
    grid = grad.shape[1:]
    samples, channels, frames = prediction.shape[:3]
    views = (prediction, target, gradient)
    flat = _flat(*views)
    align = _alignment(*views) if flat else 1
    positions, height, width, grid_h, grid_w = _plane(prediction.shape, grid, flat)
    lines = channels * math.ceil(frames / grid[0])
    config = launch_config(height * width, lines, align * prediction.element_size(), prediction.element_size())
    chunks, splits = math.ceil(height * width / config.block), math.ceil(lines / config.lines)
    with _on(prediction.device):
        _backward_kernel[(samples * grid[0] * chunks * splits,)](
            factor,
            grad,
            prediction,
            target,
            gradient,
            *_strides(prediction, align),
            *_strides(target, align),
            *_strides(gradient, align),
            channels,
            frames,
            height,
            width,
            grid[0],
            grid_h,
            grid_w,
            chunks,
            splits,
            BLOCK=config.block,
            ALIGN=align,
            FLAT=flat,
            POSITIONS=positions,
            WIDE=_wide(height, width, grid_h, grid_w, positions),
            ACCUMULATE=dtype,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return gradient


def gran_dpo_table(
    log_ratio: Tensor,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    kappa: Tensor | None,
    error: Tensor | None,
    loser_scale: Tensor | None,
    latent_shape: Sequence[int],
    link_name: str,
    label_smoothing: float,
    video_weight: float,
    patch_weight: float,
    video_beta: float,
    patch_beta: float,
    video_gamma: float,
    video_delta: float,
    patch_gamma: float,
    patch_delta: float,
    sft_weight: float,
    patch_sft_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The H1 loss and its coefficients from the table of log-ratios: see halo_fast.loss.reference.gran_dpo_table."""
    samples, *grid = log_ratio.shape
    pairs, patches = samples // 2, math.prod(grid)
    loss, coefficients, video_logits, patch_logits, active = (
        log_ratio.new_empty(shape) for shape in ((), (samples, *grid), (pairs,), (pairs, *grid), (pairs,))
    )
    tables = [
        None if table is None else table.contiguous()
        for table in (log_ratio, patch_rewards, video_rewards, kappa, error, loser_scale)
    ]
    pair_block = min(32, triton.next_power_of_2(max(1, pairs)))
    with _on(log_ratio.device):
        _table_kernel[(1,)](
            *tables,
            loss,
            coefficients,
            video_logits,
            patch_logits,
            active,
            pairs,
            patches,
            *latent_shape[1:],
            *grid,
            LINK=link_name,
            label_smoothing=label_smoothing,
            video_weight=video_weight,
            patch_weight=patch_weight,
            video_beta=video_beta,
            patch_beta=patch_beta,
            video_gamma=video_gamma,
            video_delta=video_delta,
            patch_gamma=patch_gamma,
            patch_delta=patch_delta,
            sft_weight=sft_weight,
            patch_sft_weight=patch_sft_weight,
            PAIRS=pair_block,
            PATCHES=min(1024 // pair_block, max(16, triton.next_power_of_2(patches))),
            ACCUMULATE=_accumulate(log_ratio.dtype)[1],
            num_warps=8,
            enable_fp_fusion=True,
        )
    return loss, coefficients, video_logits, patch_logits, active
