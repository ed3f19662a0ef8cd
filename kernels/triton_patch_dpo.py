"""Triton kernels for GPUs (and, with TRITON_INTERPRET=1, for CPU tensors in tests).

Every function takes 5-D strided views [N, C, F, H, W] whose device and dtype have been checked; nothing here is
differentiable. Each view keeps its own dtype and is widened in registers. Sums are taken in float64 if any view is
float64, else in float32.

A program of the forward kernel reads whole stretches of the (row, column) plane, not patches: its loads are as wide as
the memory layout allows, however short and ragged the patches are. It keeps one sum per element of its tile over
channels and frames, and adds them patch by patch at the end. Each program writes its parts. The next launch on the same
stream adds them in their fixed order: no atomics, no state between calls, and the same bits on every run.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LINKS = ("sigmoid", "conservative", "robust", "hinge", "ipo", "kto", "poly")
INTERPRETED = triton.knobs.runtime.interpret

# Four programs of full tiles for each of the 132 multiprocessors of an H100.
PROGRAMS = 528
# Elements of a full tile: eight for each of 128 threads.
TILE = 1024
# Lines that the backward kernel reads together.
BATCH = tl.constexpr(4)


class LaunchConfig(NamedTuple):
    """block: positions of the plane per program; lines: (channel block, frame) planes per program."""

    block: int
    lines: int
    num_warps: int


def launch_config(
    positions: int, lines: int, slabs: int, lanes: int, align_bytes: int, itemsize: int, least: int
) -> LaunchConfig:
    """Launch sizes for `slabs` slabs of `positions` plane positions with `lines` lines of `lanes` channels each.

    A thread holds eight elements, four in float64, and two where nothing is aligned and each needs an address of its
    own. A program takes as many lines as leave PROGRAMS of them, at least `least` and at most 32. Sums are cut by these
    sizes. They depend on shapes, strides and dtypes alone, so the bits do not change from one NVIDIA GPU to the next.
    """
    tile = TILE // 4 if align_bytes < 8 else TILE // 2 if itemsize == 8 else TILE
    block = min(tile // lanes, max(128 // lanes, triton.next_power_of_2(positions)))
    if block * lanes == tile and _padded(positions, block) > 1.15 * _padded(positions, block // 2):
        block //= 2  # fewer elements lie beyond the slab
    programs = slabs * _padded(positions, block) * lanes / tile
    share = 32
    while share > least and programs * math.ceil(lines / share) < PROGRAMS:
        share //= 2
    threads = 32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size
    return LaunchConfig(block, share, max(1, block * lanes * 128 // tile // threads))


def _padded(size: int, block: int) -> int:
    """The next multiple of a block."""
    return math.ceil(size / block) * block


def forward_bytes(shape: Sequence[int], grid: Sequence[int], *itemsizes: int) -> int:
    """Bytes that patch_log_ratio (three item sizes) or patch_error (two) must move: inputs and table once."""
    return sum(itemsizes) * math.prod(shape) + shape[0] * math.prod(grid) * max(4, *itemsizes)


def backward_bytes(shape: Sequence[int], grid: Sequence[int], prediction: int, target: int) -> int:
    """Bytes that gran_dpo_backward must move: two inputs and the gradient once, the table and its factor once."""
    return forward_bytes(shape, grid, prediction, target, prediction) + max(4, prediction, target)


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
_SIZES = ["C", "F", "H", "W", "B", "P", "grid_f", "grid_h", "grid_w", "share", "chunks", "count", "rows"]
_SIZES += ["patch_stride", "part_stride", "W_magic", "H_magic", "grid_h_magic", "grid_w_magic"]
_VIEWS = ["policy", "reference", "target", "prediction", "gradient"]
_STRIDES = [f"{view}_{side}" for view in _VIEWS for side in "ncfhw"]


def _jit(function):
    """A kernel that is compiled once for all sizes and strides."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in (*_SIZES, *_STRIDES)])


@triton.jit
def _length(index, side, parts):
    """How many of a side's positions its part `index` of `parts` has."""
    return (index + 1) * side // parts - index * side // parts


@triton.jit
def _divide(x, divisor, magic, WIDE: tl.constexpr):
    """x // divisor by the high half of a product; exact while x * divisor < 2^30, beyond that WIDE divides."""
    if WIDE:
        return x // divisor
    return tl.umulhi((x * 4).to(tl.uint32), magic.to(tl.uint32)).to(tl.int32)


@triton.jit
def _place(row, column, stride_h, stride_w, ALIGN: tl.constexpr, LANES: tl.constexpr):
    """Offsets of positions in a view: [BLOCK], or [BLOCK, LANES] with the channels on the lanes."""
    place = (row * stride_h + column * stride_w) * ALIGN
    if LANES > 1:
        place = place[:, None] + tl.arange(0, LANES)[None, :]
    return place


@_jit
def _forward_kernel(
    policy,
    reference,
    target,
    out,
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
    share,
    chunks,
    patch_stride: tl.int64,
    part_stride: tl.int64,
    W_magic,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
    FLAT: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Parts of -d_p (or of E_p): one program reads BLOCK positions of a slab in `share` lines.

    A slab is one row of patches of one frame group of one sample; its positions are contiguous. A line is a frame of
    LANES channels. Program (slab, chunk, split) writes its part of patch k of the slab to
    out[(slab * grid_w + k) * patch_stride + part * part_stride], already divided by the patch's size.

    | flag          | meaning                                                                             |
    |---------------|-------------------------------------------------------------------------------------|
    | BLOCK         | positions of the plane per program                                                  |
    | LANES         | 1: positions lie on the lanes; else so many channels do, whose stride is 1          |
    | ALIGN         | elements in whose multiples planes (channels, with LANES) of all views begin and end |
    | FLAT          | positions have stride 1                                                             |
    | POSITIONS     | every position is a patch; the plane is one long row                                |
    | WIDE          | arithmetic within a plane needs 64 bits                                             |
    | HAS_REFERENCE | -d_p of three views; else E_p of two                                                |
    | ACCUMULATE    | dtype of the sums                                                                   |
    """
    slab, chunk, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if WIDE:
        H = H.to(tl.int64)
        W = W.to(tl.int64)
    kh = slab % grid_h
    kf = slab // grid_h % grid_f
    n = (slab // grid_h // grid_f).to(tl.int64)
    first_frame = kf * F // grid_f
    frames = _length(kf, F, grid_f)
    begin, end = kh * H // grid_h * W, (kh + 1) * H // grid_h * W

    # A mask by aligned units keeps the loads wide; what lies outside the slab is left out below.
    UNIT: tl.constexpr = ALIGN if LANES == 1 else 1
    readable = (begin // UNIT + chunk * (BLOCK // UNIT) + tl.arange(0, BLOCK) // UNIT) * UNIT < end
    position = (begin // UNIT + chunk * (BLOCK // UNIT)) * UNIT + tl.arange(0, BLOCK)
    if POSITIONS:
        row, column = position * 0, position
    else:
        row = _divide(position, W, W_magic, WIDE)
        column = position - row * W
    if FLAT:
        policy += position
        reference += position
        target += position
    else:
        policy += _place(row, column, policy_h, policy_w, ALIGN, LANES)
        reference += _place(row, column, reference_h, reference_w, ALIGN, LANES)
        target += _place(row, column, target_h, target_w, ALIGN, LANES)
    if LANES > 1:
        total = tl.zeros([BLOCK, LANES], ACCUMULATE)
        readable = readable[:, None]
    else:
        total = tl.zeros([BLOCK], ACCUMULATE)

    # Counters in place of a division in every round.
    first_line = split * share
    channel = first_line // frames
    frame = first_line - channel * frames
    c, f = channel.to(tl.int64), (first_frame + frame).to(tl.int64)
    at_policy = n * policy_n + c * policy_c + f * policy_f
    at_reference = n * reference_n + c * reference_c + f * reference_f
    at_target = n * target_n + c * target_c + f * target_f
    for _ in tl.range(first_line, min(C // LANES * frames, first_line + share), loop_unroll_factor=4):
        o = tl.load(policy + at_policy * ALIGN, mask=readable, other=0.0, eviction_policy="evict_last")
        tau = tl.load(target + at_target * ALIGN, mask=readable, other=0.0, eviction_policy="evict_last")
        o, tau = o.to(ACCUMULATE), tau.to(ACCUMULATE)
        if HAS_REFERENCE:
            o_ref = tl.load(reference + at_reference * ALIGN, mask=readable, other=0.0, eviction_policy="evict_first")
            o_ref = o_ref.to(ACCUMULATE)
            total += (o_ref - o) * ((o - tau) + (o_ref - tau))
        else:
            total += (o - tau) * (o - tau)
        frame += 1
        wrap = frame == frames
        frame = tl.where(wrap, 0, frame)
        at_policy += tl.where(wrap, policy_c - (frames - 1) * policy_f, policy_f)
        at_target += tl.where(wrap, target_c - (frames - 1) * target_f, target_f)
        at_reference += tl.where(wrap, reference_c - (frames - 1) * reference_f, reference_f)
    if LANES > 1:
        total = tl.sum(total, 1)

    live = (position >= begin) & (position < end)
    depth = (C * frames).to(ACCUMULATE)
    out += slab.to(tl.int64) * grid_w * patch_stride
    if POSITIONS:
        tl.store(out + position * patch_stride + split * part_stride, total / depth, mask=live)
    else:
        area = depth * _length(kh, H, grid_h).to(ACCUMULATE)
        kw = _divide((column + 1) * grid_w - 1, W, W_magic, WIDE)
        for k in range(grid_w):
            value = tl.sum(tl.where(live & (kw == k), total, 0.0)) / (area * _length(k, W, grid_w).to(ACCUMULATE))
            tl.store(out + k * patch_stride + (split * chunks + chunk) * part_stride, value)


@triton.jit
def _add_parts(
    parts, row, live, count, patch_stride, part_stride, ROWS: tl.constexpr, PARTS: tl.constexpr, ACCUMULATE:
    tl.constexpr
):  # fmt: skip
    """Sums of the `count` parts of each row [ROWS], in an order fixed by the sizes."""
    total = tl.zeros([ROWS, PARTS], ACCUMULATE)
    for first in range(0, count, PARTS):
        part = first + tl.arange(0, PARTS)
        at = row.to(tl.int64)[:, None] * patch_stride + part[None, :] * part_stride
        total += tl.load(parts + at, mask=live[:, None] & (part < count)[None, :], other=0.0)
    return tl.sum(total, 1)


@_jit
def _sum_kernel(
    parts,
    out,
    rows,
    count,
    patch_stride: tl.int64,
    part_stride: tl.int64,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """out[row] = sum of its parts: the second launch of the single operators, and of tables that are large.

    | flag       | meaning                                  |
    |------------|------------------------------------------|
    | ROWS       | rows per program                         |
    | PARTS      | parts of a row that are read in one go   |
    | ACCUMULATE | dtype of the sums                        |
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    tl.store(out + row, _add_parts(parts, row, live, count, patch_stride, part_stride, ROWS, PARTS, ACCUMULATE), live)


@triton.jit
def _advance(at, frame, frames, step_c, step_f):
    """The place and frame of the next line: a counter in place of a division."""
    wrap = frame + 1 == frames
    return at + tl.where(wrap, step_c - (frames - 1) * step_f, step_f), tl.where(wrap, 0, frame + 1)


@triton.jit
def _read_batch(view, at, frame, frames, step_c, step_f, lines_left, unit, end, ALIGN: tl.constexpr):
    """The next BATCH lines of a view as a tuple, with the place and frame after them; nothing is read beyond `end`."""
    lines = ()
    for i in tl.static_range(BATCH):
        wanted = unit < tl.where(lines_left > i, end, 0)
        lines = lines + (tl.load(view + at * ALIGN, mask=wanted, other=0.0, eviction_policy="evict_first"),)  # type: ignore[assignment]
        at, frame = _advance(at, frame, frames, step_c, step_f)
    return lines, at, frame


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
    share,
    W_magic,
    H_magic,
    grid_h_magic,
    grid_w_magic,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
    FLAT: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """2 (o - tau) factor grad_p / Z_p: one program writes BLOCK positions of a frame group in `share` lines.

    Program (sample and frame group, chunk, split). The flags are those of the forward kernel.
    """
    slab, chunk, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if WIDE:
        H = H.to(tl.int64)
        W = W.to(tl.int64)
    kf = slab % grid_f
    n = (slab // grid_f).to(tl.int64)
    first_frame = kf * F // grid_f
    frames = _length(kf, F, grid_f)

    UNIT: tl.constexpr = ALIGN if LANES == 1 else 1
    end = H * W
    unit = (chunk * (BLOCK // UNIT) + tl.arange(0, BLOCK) // UNIT) * UNIT
    position = chunk * BLOCK + tl.arange(0, BLOCK)
    if POSITIONS:
        row, column = position * 0, position
    else:
        row = _divide(position, W, W_magic, WIDE)
        column = position - row * W
    if FLAT:
        prediction += position
        target += position
        gradient += position
    else:
        prediction += _place(row, column, prediction_h, prediction_w, ALIGN, LANES)
        target += _place(row, column, target_h, target_w, ALIGN, LANES)
        gradient += _place(row, column, gradient_h, gradient_w, ALIGN, LANES)
    inside = unit < end
    if LANES > 1:
        unit = unit[:, None]

    first_line = split * share
    lines = min(C // LANES * frames - first_line, share)
    channel = first_line // frames
    frame = first_line - channel * frames
    c, f = channel.to(tl.int64), (first_frame + frame).to(tl.int64)
    at_prediction = n * prediction_n + c * prediction_c + f * prediction_f
    at_target = n * target_n + c * target_c + f * target_f
    at_gradient = n * gradient_n + c * gradient_c + f * gradient_f
    # The compiler moves no load over a store, so a batch of lines is read before any of it is written, and the first
    # one before the scale of each position is computed.
    o, at_prediction, _ = _read_batch(
        prediction, at_prediction, frame, frames, prediction_c, prediction_f, lines, unit, end, ALIGN
    )
    tau, at_target, ahead = _read_batch(target, at_target, frame, frames, target_c, target_f, lines, unit, end, ALIGN)

    size = (C * frames).to(ACCUMULATE)
    if POSITIONS:
        patch = position
    else:
        kh = _divide((row + 1) * grid_h - 1, H, H_magic, WIDE)
        kw = _divide((column + 1) * grid_w - 1, W, W_magic, WIDE)
        patch = kh * grid_w + kw
        height = _divide((kh + 1) * H, grid_h, grid_h_magic, WIDE) - _divide(kh * H, grid_h, grid_h_magic, WIDE)
        width = _divide((kw + 1) * W, grid_w, grid_w_magic, WIDE) - _divide(kw * W, grid_w, grid_w_magic, WIDE)
        size = size * (height * width).to(ACCUMULATE)
    scale = tl.load(grad + slab.to(tl.int64) * grid_h * grid_w + patch, mask=inside, other=0.0)
    if factor is not None:
        scale = tl.load(factor) * scale
    scale = 2.0 * scale / size
    if LANES > 1:
        scale = scale[:, None]

    for done in range(0, lines, BATCH):
        for i in tl.static_range(BATCH):
            value = (o[i].to(ACCUMULATE) - tau[i].to(ACCUMULATE)) * scale
            if gradient.dtype.element_ty != tl.float64:
                value = value.to(tl.float32)
            value = value.to(gradient.dtype.element_ty)
            tl.store(gradient + at_gradient * ALIGN, value, mask=unit < tl.where(lines - done > i, end, 0))
            at_gradient, frame = _advance(at_gradient, frame, frames, gradient_c, gradient_f)
        left = lines - done - BATCH
        o, at_prediction, _ = _read_batch(
            prediction, at_prediction, ahead, frames, prediction_c, prediction_f, left, unit, end, ALIGN
        )
        tau, at_target, ahead = _read_batch(
            target, at_target, ahead, frames, target_c, target_f, left, unit, end, ALIGN
        )


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)), without overflow."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _softplus(z):
    """log(1 + exp(z)), without overflow and to full relative precision."""
    # log1p(e) by log(1 + e) e / ((1 + e) - 1): the rounding of 1 + e cancels.
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    one = u == 1.0
    return tl.where(z > 0, z, 0.0) + tl.where(one, e, tl.log(u) * (e / tl.where(one, 1.0, u - 1.0)))


@triton.jit
def _link(z, E, LINK: tl.constexpr):
    """phi(z) and its derivative, with E the label smoothing or, of poly, alpha."""
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
    elif LINK == "poly":
        value = _softplus(-z) + E * _sigmoid(-z)
        slope = -_sigmoid(-z) - E * _sigmoid(z) * _sigmoid(-z)
    else:
        tl.static_assert(LINK == "sigmoid", "unknown link")
        value = _softplus(-z)
        slope = -_sigmoid(-z)
    return value, slope


@triton.jit
def _capped_link(z, cap, E, LINK: tl.constexpr, CAPPED: tl.constexpr):
    """phi(min(z, cap)) and its derivative: 0 beyond the cap, phi' at the cap itself; a NaN is beyond no cap."""
    if CAPPED:
        beyond = z > cap
        value, slope = _link(tl.where(beyond, cap, z), E, LINK)
        slope = tl.where(beyond, 0.0, slope)
    else:
        value, slope = _link(z, E, LINK)
    return value, slope


@triton.jit
def _signed_weight(a, b, gamma, delta):
    """sign(a - b) |a - b|^gamma, 0 where the gap is at most delta."""
    # A comparison with NaN is false, so an unlabelled entry is a tie.
    margin = a - b
    size = tl.abs(margin)
    labelled = size > delta
    power = tl.exp(gamma * tl.log(tl.where(labelled, size, 1.0)))
    size = tl.where(gamma == 0, 1.0, tl.where(gamma == 1, size, power))
    return tl.where(labelled, tl.where(margin > 0, size, -size), 0.0)


@triton.jit
def _sign(x):
    """-1, 0 or 1."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _patch_tile(log_ratio, patch_rewards, pair, p, live, B, P, gamma, delta):
    """Margins -D_p and signed weights [pairs, patches]."""
    a = pair.to(tl.int64)[:, None] * P + p[None, :]
    b = a + B.to(tl.int64) * P
    margin = tl.load(log_ratio + a, mask=live, other=0.0) - tl.load(log_ratio + b, mask=live, other=0.0)
    weight = tl.zeros_like(margin)
    if patch_rewards is not None:
        r_a = tl.load(patch_rewards + a, mask=live, other=0.0)
        r_b = tl.load(patch_rewards + b, mask=live, other=0.0)
        weight = _signed_weight(r_a, r_b, gamma, delta).to(margin.dtype)
    return margin, weight


@triton.jit
def _volume(p, F, H, W, grid_f, grid_h, grid_w, ACCUMULATE: tl.constexpr):
    """Share of patch p in the latent."""
    rows = p // grid_w
    kf = rows // grid_h
    kh, kw = rows - kf * grid_h, p - rows * grid_w
    share = _length(kf, F, grid_f).to(ACCUMULATE) / F * (_length(kh, H, grid_h).to(ACCUMULATE) / H)
    return share * (_length(kw, W, grid_w).to(ACCUMULATE) / W)


@triton.jit
def _pair_sums(sums, pair, quantity, B, chunks, PAIRS: tl.constexpr, CHUNKS: tl.constexpr, ACCUMULATE: tl.constexpr):
    """A quantity's sums over the chunks of a pair's patches [PAIRS]; sums is [chunks, 3, B]."""
    return _add_parts(
        sums + quantity * B, pair, pair < B, chunks, 1, 3 * B, PAIRS, CHUNKS, ACCUMULATE
    )  # fmt: skip


@triton.jit
def _video_weights(video_rewards, pair, B, like, gamma, delta):
    """Signed weights of the videos [PAIRS], 0 without video rewards."""
    weight = tl.zeros_like(like)
    if video_rewards is not None:
        r_a = tl.load(video_rewards + pair, mask=pair < B, other=0.0)
        r_b = tl.load(video_rewards + B + pair, mask=pair < B, other=0.0)
        weight = _signed_weight(r_a, r_b, gamma, delta).to(like.dtype)
    return weight


@_jit
def _table_kernel(
    log_ratio,
    error,
    parts,  # of the log-ratios or, with a reference_error, of the errors
    reference_error,
    patch_rewards,
    video_rewards,
    logit_scale,
    loser_scale,
    sums,  # [chunks, 3, B]: video margin, patch weights, labelled patches
    loss,  # [] or, of several programs, its parts
    coefficients,
    video_logits,
    patch_logits,
    active,
    link_parameter: tl.float64,
    video_weight: tl.float64,
    patch_weight: tl.float64,
    video_beta: tl.float64,
    patch_beta: tl.float64,
    video_gamma: tl.float64,
    video_delta: tl.float64,
    patch_gamma: tl.float64,
    patch_delta: tl.float64,
    sft_weight: tl.float64,
    patch_sft_weight: tl.float64,
    video_cap: tl.float64,
    patch_cap: tl.float64,
    B,
    P,
    F,
    H,
    W,
    grid_f,
    grid_h,
    grid_w,
    count,
    chunks,
    share,
    patch_stride: tl.int64,
    part_stride: tl.int64,
    LINK: tl.constexpr,
    SUPERVISED: tl.constexpr,
    CAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUMS: tl.constexpr,
    RESULTS: tl.constexpr,
    PAIRS: tl.constexpr,
    PATCHES: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """The H1 loss and its coefficients: one program for a small table, two launches of several for a large one.

    Tables are [2B, P]. Parts, if they are given, are added to the table of log-ratios or errors first.

    | flag       | meaning                                                              |
    |------------|----------------------------------------------------------------------|
    | LINK       | phi, one of LINKS                                                    |
    | SUPERVISED | the loss has a supervised term, and `error` its errors               |
    | CAPPED     | a logit of the video or of the patches has a cap                     |
    | WEIGHTED   | logit_scale has a third row, which weights each pair's preferences   |
    | SUMS       | this launch adds the parts, and the sums over each pair's patches    |
    | RESULTS    | this launch computes the results from those sums; both: one program  |
    | PAIRS      | pairs of a tile                                                      |
    | PATCHES    | patches of a tile                                                    |
    | CHUNKS     | chunks of a pair whose sums are read in one go                       |
    | ROWS       | patches whose parts are added in one go                              |
    | PARTS      | parts of a patch that are read in one go                             |
    | ACCUMULATE | dtype of every table                                                 |
    """
    ALONE: tl.constexpr = SUMS and RESULTS
    link_parameter = tl.full([1], link_parameter, ACCUMULATE)
    video_weight = tl.full([1], video_weight, ACCUMULATE)
    patch_weight = tl.full([1], patch_weight, ACCUMULATE)
    video_beta = tl.full([1], video_beta, ACCUMULATE)
    patch_beta = tl.full([1], patch_beta, ACCUMULATE)
    video_gamma = tl.full([1], video_gamma, ACCUMULATE)
    video_delta = tl.full([1], video_delta, ACCUMULATE)
    patch_gamma = tl.full([1], patch_gamma, ACCUMULATE)
    patch_delta = tl.full([1], patch_delta, ACCUMULATE)
    sft_weight = tl.full([1], sft_weight, ACCUMULATE)
    patch_sft_weight = tl.full([1], patch_sft_weight, ACCUMULATE)
    video_cap = tl.full([1], video_cap, ACCUMULATE)
    patch_cap = tl.full([1], patch_cap, ACCUMULATE)
    by_video = (video_weight != 0) | (sft_weight != 0)
    by_patch = (patch_weight != 0) | (patch_sft_weight != 0)
    chunk = tl.program_id(1)
    first_patch = chunk * share
    last_patch = min(P, first_patch + share)
    first_pair = tl.program_id(0) * PAIRS
    last_pair = B if ALONE else min(B, first_pair + PAIRS)

    if SUMS:
        if parts is not None:
            for first in range(0, 2 * B * P, ROWS):
                row = first + tl.arange(0, ROWS)
                in_table = row < 2 * B * P
                value = _add_parts(parts, row, in_table, count, patch_stride, part_stride, ROWS, PARTS, ACCUMULATE)
                if reference_error is not None:
                    tl.store(error + row, value, mask=in_table)
                    value = tl.load(reference_error + row, mask=in_table, other=0.0) - value
                tl.store(log_ratio + row, value, mask=in_table)
            tl.debug_barrier()
        for at in range(first_pair, last_pair, PAIRS):
            pair = at + tl.arange(0, PAIRS)
            margin_sum = tl.zeros([PAIRS], ACCUMULATE)
            weight_sum = tl.zeros([PAIRS], ACCUMULATE)
            labelled = tl.zeros([PAIRS], ACCUMULATE)
            for first in range(first_patch, last_patch, PATCHES):
                p = first + tl.arange(0, PATCHES)
                live = (pair < B)[:, None] & (p < last_patch)[None, :]
                margin, weight = _patch_tile(log_ratio, patch_rewards, pair, p, live, B, P, patch_gamma, patch_delta)
                volume = _volume(p, F, H, W, grid_f, grid_h, grid_w, ACCUMULATE)
                margin_sum += tl.sum(tl.where(live, volume[None, :] * margin, 0.0), 1)
                weight_sum += tl.sum(tl.abs(weight), 1)
                labelled += tl.sum((weight != 0).to(ACCUMULATE), 1)
            of_chunk = sums + chunk * 3 * B + pair
            tl.store(of_chunk, margin_sum, mask=pair < B)
            tl.store(of_chunk + B, weight_sum, mask=pair < B)
            tl.store(of_chunk + 2 * B, labelled, mask=pair < B)
    if ALONE:
        tl.debug_barrier()

    if RESULTS:
        # Every program counts all pairs: the mean is over those that have a group which is not a tie.
        counted = tl.zeros([PAIRS], ACCUMULATE)
        for at in range(0, B, PAIRS):
            pair = at + tl.arange(0, PAIRS)
            labelled = _pair_sums(sums, pair, 2, B, chunks, PAIRS, CHUNKS, ACCUMULATE)
            video = _video_weights(video_rewards, pair, B, labelled, video_gamma, video_delta)
            counted += (((video != 0) & by_video) | ((labelled > 0) & by_patch)).to(ACCUMULATE)
        pairs_in_mean = tl.sum(counted)
        pairs_in_mean = tl.where(pairs_in_mean > 1, pairs_in_mean, 1.0)

        loss_sum = tl.zeros([PAIRS], ACCUMULATE)
        for at in range(first_pair, last_pair, PAIRS):
            pair = at + tl.arange(0, PAIRS)
            margin_sum = _pair_sums(sums, pair, 0, B, chunks, PAIRS, CHUNKS, ACCUMULATE)
            weight_sum = _pair_sums(sums, pair, 1, B, chunks, PAIRS, CHUNKS, ACCUMULATE)
            labelled = _pair_sums(sums, pair, 2, B, chunks, PAIRS, CHUNKS, ACCUMULATE)
            video = _video_weights(video_rewards, pair, B, margin_sum, video_gamma, video_delta)
            used = (((video != 0) & by_video) | ((labelled > 0) & by_patch)).to(ACCUMULATE)
            mean_share = used / pairs_in_mean
            video_scale = tl.zeros_like(margin_sum) + 0.5 * video_beta
            patch_scale = tl.zeros_like(margin_sum) + 0.5 * patch_beta
            if logit_scale is not None:
                video_scale *= tl.load(logit_scale + pair, mask=pair < B, other=0.0)
                patch_scale *= tl.load(logit_scale + B + pair, mask=pair < B, other=0.0)
            video_logit = video_scale * _sign(video) * margin_sum
            first_chunk = pair < tl.where(chunk == 0, B, 0)
            tl.store(active + pair, used, mask=first_chunk)
            tl.store(video_logits + pair, video_logit, mask=first_chunk)
            video_value, video_derivative = _capped_link(video_logit, video_cap, link_parameter, LINK, CAPPED)
            pair_loss = tl.where(first_chunk, video_weight * tl.abs(video) * video_value, 0.0)
            video_slope = -video_weight * video * video_derivative * video_scale
            patch_share = patch_weight / tl.where(weight_sum > 0, weight_sum, 1.0)
            if WEIGHTED:
                omega = tl.load(logit_scale + 2 * B + pair, mask=pair < B, other=0.0)
                pair_loss *= omega
                video_slope *= omega
                patch_share *= omega
            patch_rho = patch_sft_weight / tl.where(labelled > 1, labelled, 1.0)

            for first in range(first_patch, last_patch, PATCHES):
                p = first + tl.arange(0, PATCHES)
                live = (pair < B)[:, None] & (p < last_patch)[None, :]
                a = pair.to(tl.int64)[:, None] * P + p[None, :]
                b = a + B.to(tl.int64) * P
                margin, weight = _patch_tile(log_ratio, patch_rewards, pair, p, live, B, P, patch_gamma, patch_delta)
                volume = _volume(p, F, H, W, grid_f, grid_h, grid_w, ACCUMULATE)[None, :]
                logit = patch_scale[:, None] * _sign(weight) * margin
                tl.store(patch_logits + a, logit, mask=live)
                value, derivative = _capped_link(logit, patch_cap, link_parameter, LINK, CAPPED)
                term = patch_share[:, None] * tl.abs(weight) * value
                slope = video_slope[:, None] * volume - (patch_share * patch_scale)[:, None] * weight * derivative
                c_a, c_b = slope, -slope
                if loser_scale is not None:
                    c_a = tl.where(c_a < 0, c_a * tl.load(loser_scale + a, mask=live, other=0.0), c_a)
                    c_b = tl.where(c_b < 0, c_b * tl.load(loser_scale + b, mask=live, other=0.0), c_b)
                if SUPERVISED:
                    rho = sft_weight * volume
                    rho_a = tl.where(weight > 0, patch_rho[:, None], 0.0) + tl.where(video[:, None] > 0, rho, 0.0)
                    rho_b = tl.where(weight < 0, patch_rho[:, None], 0.0) + tl.where(video[:, None] < 0, rho, 0.0)
                    term += rho_a * tl.load(error + a, mask=live, other=0.0)
                    term += rho_b * tl.load(error + b, mask=live, other=0.0)
                    c_a += rho_a
                    c_b += rho_b
                tl.store(coefficients + a, c_a * mean_share[:, None], mask=live)
                tl.store(coefficients + b, c_b * mean_share[:, None], mask=live)
                pair_loss += tl.sum(tl.where(live, term, 0.0), 1)
            loss_sum += tl.where(pair < B, pair_loss * mean_share, 0.0)
        tl.store(loss + tl.program_id(0) * chunks + chunk, tl.sum(loss_sum))


# ---- launchers


def _accumulate(*dtypes: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """The dtype of sums over these dtypes, for torch and for Triton."""
    return (torch.float64, tl.float64) if torch.float64 in dtypes else (torch.float32, tl.float32)


class _Plan:
    """A launch but for its tensors: what depends on shapes, strides, dtypes, alignment and the device is found once.

    Called with the leading arguments. The first call compiles; later ones go to the compiled kernel itself.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], rest: tuple[Any, ...], warps: int, device: torch.device):
        self._kernel, self._grid, self._rest, self._warps, self._device = kernel, grid, rest, warps, device
        self._run: Callable[..., None] | None = None

    def __call__(self, *first: Any) -> None:
        with _on(self._device):
            if self._run is not None:
                self._run(*first, *self._rest)
                return
            compiled = self._kernel[self._grid](*first, *self._rest, num_warps=self._warps, enable_fp_fusion=True)
            # the interpreter has none
            self._run = compiled and compiled[self._grid]


_plans = functools.lru_cache(maxsize=1024)
_HERE = contextlib.nullcontext()


def forget_plans() -> None:
    """Plan every launch anew: for whoever changes the launch sizes or the compiler's target."""
    for planned in (_forward_plan, _sum_plan, _backward_plan, _table_plan):
        planned.cache_clear()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cpu" or torch.accelerator.current_device_index() == device.index:
        return _HERE
    return torch.accelerator.device_index(device.index)


def _aligned(tensor: Tensor | None) -> bool | None:
    """Whether a tensor begins at a multiple of 16 bytes, for which kernels are compiled apart; None if absent."""
    return None if tensor is None else tensor.data_ptr() % 16 == 0


class _View(NamedTuple):
    """What a plan depends on of a tensor."""

    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool | None


def _views(*tensors: Tensor) -> tuple[_View, ...]:
    """The tensors without their data."""
    return tuple(_View(tensor.stride(), tensor.dtype, _aligned(tensor)) for tensor in tensors)


class _Layout(NamedTuple):
    """How the views lie in memory; a plane of patches of one position each is treated as one long row."""

    lanes: int
    align: int
    flat: bool
    positions: bool
    height: int
    width: int
    grid_h: int
    grid_w: int
    align_bytes: int

    @property
    def unit(self) -> int:
        """Positions by which loads are masked."""
        return self.align if self.lanes == 1 else 1

    @property
    def wide(self) -> bool:
        """Whether arithmetic within a plane needs 64 bits and true divisions."""
        height, width = self.height + 1, self.width + 1
        if self.positions:
            return width + 2 * TILE >= 2**31
        largest = (height * width + 2 * TILE) * width, height * height * self.grid_h, width * width * self.grid_w
        return max(*largest, height * self.grid_h**2, width * self.grid_w**2) >= 2**30

    def strides(self, shape: Sequence[int], view: _View) -> tuple[int, ...]:
        """The kernels' strides of a view: in units of `align`, for channels by whole lines."""
        steps = [step if size > 1 else 0 for step, size in zip(view.stride, shape, strict=True)]
        steps[1] *= self.lanes
        return tuple(step if self.flat and side > 2 else step // self.align for side, step in enumerate(steps))


def _layout(shape: Sequence[int], grid: Sequence[int], views: Sequence[_View]) -> _Layout:
    """The layout that all views share; loads are as wide as the least aligned one allows."""
    channels, height, width = shape[1], *shape[3:]
    strides = [view.stride for view in views]
    itemsize = min(view.dtype.itemsize for view in views)
    flat = all((width == 1 or s[4] == 1) and (height == 1 or s[3] == width) for s in strides)
    lanes = min(128, channels & -channels)
    if flat or lanes < 8 or any(s[1] != 1 for s in strides):
        lanes = 1
    align = 1
    if flat or lanes > 1:
        # planes, or with channels on the lanes positions, begin and end at multiples of this in every view
        outer = [0, 1, 2] if flat else [0, 2, 3, 4]
        steps = [s[side] for s in strides for side in outer if shape[side] > 1]
        align = math.gcd(16 // itemsize, height * width if flat else lanes, *steps)
    positions = (height, width) == tuple(grid[1:]) and all(
        (flat or lanes > 1) and (height == 1 or s[3] == width * s[4]) for s in strides
    )
    plane = (1, height * width, 1, height * width) if positions else (height, width, grid[1], grid[2])
    return _Layout(lanes, align, flat, positions, *plane, align * itemsize)


def _magic(divisor: int) -> int:
    """The factor whose product's high half divides; see `_divide`."""
    return 2**30 // divisor + 1


class _Parts(NamedTuple):
    """Where the parts of a patch lie: at patch * patch_stride + part * part_stride, `number` of them."""

    number: int
    patch_stride: int
    part_stride: int


_WHOLE = _Parts(1, 1, 1)


@_plans
def _forward_plan(
    shape: tuple[int, ...], grid: tuple[int, ...], views: tuple[_View, ...], device: torch.device
) -> tuple[_Plan, _Parts]:
    """The forward launch for (policy, reference, target) or, of errors, (prediction, target); where its parts lie."""
    samples, channels, frames = shape[:3]
    layout = _layout(shape, grid, views)
    dtype, accumulate = _accumulate(*(view.dtype for view in views))
    lines = channels // layout.lanes * math.ceil(frames / grid[0])
    # The slab may begin up to one unit before its own first position.
    stretch = math.ceil(layout.height / layout.grid_h) * layout.width + (layout.unit - 1 if layout.grid_h > 1 else 0)
    slabs = samples * grid[0] * layout.grid_h
    config = launch_config(
        stretch, lines, slabs, layout.lanes, layout.align_bytes, dtype.itemsize, 16 if layout.positions else 4
    )
    chunks, splits = math.ceil(stretch / config.block), math.ceil(lines / config.lines)
    patches = samples * math.prod(grid)
    parts = _Parts(splits, 1, patches) if layout.positions else _Parts(chunks * splits, chunks * splits, 1)
    policy, reference, target = views if len(views) == 3 else (views[0], *views)
    rest = (
        *(step for view in (policy, reference, target) for step in layout.strides(shape, view)),
        channels, frames, layout.height, layout.width, grid[0], layout.grid_h, layout.grid_w, config.lines, chunks,
        parts.patch_stride, parts.part_stride, _magic(layout.width), config.block, layout.lanes, layout.align,
        layout.flat, layout.positions, layout.wide, len(views) == 3, accumulate,
    )  # fmt: skip
    return _Plan(_forward_kernel, (slabs, chunks, splits), rest, config.num_warps, device), parts


def _parts(policy: Tensor, reference: Tensor | None, target: Tensor, grid: Sequence[int]) -> tuple[Tensor, _Parts]:
    """The parts of each patch, [N, f, h, w] itself if there is one of each."""
    views = (policy, target) if reference is None else (policy, reference, target)
    samples = policy.shape[0]
    dtype, _ = _accumulate(*(view.dtype for view in views))
    if samples == 0:
        return policy.new_empty((0, *grid), dtype=dtype), _WHOLE
    plan, parts = _forward_plan(policy.shape, tuple(grid), _views(*views), policy.device)
    shape = (samples, *grid) if parts.number == 1 else (samples * math.prod(grid) * parts.number,)
    out = policy.new_empty(shape, dtype=dtype)
    plan(policy, target if reference is None else reference, target, out)
    return out, parts


@_plans
def _sum_plan(rows: int, parts: _Parts, dtype: torch.dtype, device: torch.device) -> _Plan:
    """The launch that adds the parts of `rows` patches."""
    together = min(64 if parts.part_stride == 1 else 8, triton.next_power_of_2(parts.number))
    block = TILE // together
    rest = (rows, *parts, block, together, _accumulate(dtype)[1])
    return _Plan(_sum_kernel, (math.ceil(rows / block), 1, 1), rest, 4, device)


def _summed(parts: Tensor, where: _Parts, shape: Sequence[int]) -> Tensor:
    """The sums of parts, [*shape]."""
    if where.number == 1:
        return parts
    out = parts.new_empty(shape)
    _sum_plan(out.numel(), where, out.dtype, out.device)(parts, out)
    return out


def patch_log_ratio(policy: Tensor, reference: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    """E_p(reference) - E_p(policy) in the factored form, [N, f, h, w]."""
    return _summed(*_parts(policy, reference, target, grid), (policy.shape[0], *grid))


def patch_error(prediction: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    """Mean squared error of each patch, [N, f, h, w]."""
    return _summed(*_parts(prediction, None, target, grid), (prediction.shape[0], *grid))


def patch_error_backward(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """2 (prediction - target) grad_p / Z_p, in the dtype and memory order of prediction; grad is [N, f, h, w]."""
    return gran_dpo_backward(None, grad, prediction, target)


@_plans
def _backward_plan(
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    views: tuple[_View, ...],
    tables: tuple[bool | None, ...],
    device: torch.device,
) -> _Plan:
    """The backward launch for (prediction, target, gradient); `tables` is the alignment of factor and coefficients."""
    samples, channels, frames = shape[:3]
    layout = _layout(shape, grid, views)
    dtype, accumulate = _accumulate(*(view.dtype for view in views))
    lines = channels // layout.lanes * math.ceil(frames / grid[0])
    positions, slabs = layout.height * layout.width, samples * grid[0]
    config = launch_config(positions, lines, slabs, layout.lanes, layout.align_bytes, dtype.itemsize, 4)
    magics = (_magic(side) for side in (layout.width, layout.height, layout.grid_h, layout.grid_w))
    rest = (
        *(step for view in views for step in layout.strides(shape, view)),
        channels, frames, layout.height, layout.width, grid[0], layout.grid_h, layout.grid_w, config.lines, *magics,
        config.block, layout.lanes, layout.align, layout.flat, layout.positions, layout.wide, accumulate,
    )  # fmt: skip
    launch = slabs, math.ceil(positions / config.block), math.ceil(lines / config.lines)
    return _Plan(_backward_kernel, launch, rest, config.num_warps, device)


def gran_dpo_backward(factor: Tensor | None, grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """As patch_error_backward, of factor * grad with a 0-d factor (None is 1)."""
    gradient = torch.empty_like(prediction)
    if gradient.numel() == 0:
        return gradient
    dtype, _ = _accumulate(prediction.dtype, target.dtype)
    grad = grad.to(dtype).contiguous()
    factor = None if factor is None else factor.to(dtype)
    plan = _backward_plan(
        prediction.shape, grad.shape[1:], _views(prediction, target, gradient), (_aligned(factor), _aligned(grad)),
        prediction.device,
    )  # fmt: skip
    plan(factor, grad, prediction, target, gradient)
    return gradient


class _TablePlan(NamedTuple):
    """The launches of a table, the shape of the sums between them, and how many parts the loss has."""

    launches: tuple[_Plan, ...]
    sums: tuple[int, ...]
    loss_parts: int


# One program computes a table of so many pairs' patches, and adds so many parts on the way.
ALONE, ALONE_PARTS = 4096, 8192


@_plans
def _table_plan(
    shape: tuple[int, ...],
    latent_shape: tuple[int, ...],
    link_name: str,
    supervised: bool,
    capped: bool,
    weighted: bool,
    parts: _Parts,
    tables: tuple[bool | None, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> _TablePlan:
    """One launch for a small table, two of several programs for a large one; `tables` is the inputs' alignment."""
    if link_name not in LINKS:
        raise ValueError(f"link must be one of {', '.join(LINKS)}; got {link_name!r}")
    samples, *grid = shape
    pairs, patches = samples // 2, math.prod(grid)
    alone = pairs * patches <= ALONE
    pair_block = min(32, triton.next_power_of_2(max(1, pairs)))
    patch_block = min(TILE // 2 // pair_block, max(16, triton.next_power_of_2(patches)))
    share = patches if alone else 4 * patch_block
    chunks = math.ceil(patches / share)
    programs = (1, 1, 1) if alone else (math.ceil(pairs / pair_block), chunks, 1)
    together = min(64 if parts.part_stride == 1 else 8, triton.next_power_of_2(parts.number))
    sizes = (pairs, patches, *latent_shape[1:], *grid, parts.number, chunks, share, *parts[1:])
    variant = link_name, supervised, capped, weighted
    flags = pair_block, patch_block, min(64, triton.next_power_of_2(chunks)), 2 * TILE // together, together
    launches = tuple(
        _Plan(_table_kernel, programs, (*sizes, *variant, *which, *flags, _accumulate(dtype)[1]), 8, device)
        for which in ([(True, True)] if alone else [(True, False), (False, True)])
    )
    return _TablePlan(launches, (chunks, 3, pairs), programs[0] * programs[1])


def _table(
    log_ratio: Tensor,
    error: Tensor | None,
    parts: Tensor | None,
    where: _Parts,
    reference_error: Tensor | None,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    logit_scale: Tensor | None,
    loser_scale: Tensor | None,
    latent_shape: Sequence[int],
    link_name: str,
    numbers: Sequence[float],
    supervised: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The table from log-ratios and errors, which are first made from `parts` and `reference_error` if given."""
    pairs, grid = log_ratio.shape[0] // 2, log_ratio.shape[1:]
    tables = [
        None if table is None else table.contiguous()
        for table in (
            log_ratio, error, parts, reference_error, patch_rewards, video_rewards, logit_scale, loser_scale
        )
    ]  # fmt: skip
    capped, weighted = min(numbers[-2:]) < math.inf, logit_scale is not None and len(logit_scale) == 3
    plan = _table_plan(
        log_ratio.shape, tuple(latent_shape), link_name, supervised, capped, weighted, where,
        tuple(map(_aligned, tables)), log_ratio.dtype, log_ratio.device,
    )  # fmt: skip
    loss = log_ratio.new_empty(() if plan.loss_parts == 1 else (plan.loss_parts,))
    coefficients, video_logits, patch_logits, active, sums = (
        log_ratio.new_empty(shape) for shape in (log_ratio.shape, (pairs,), (pairs, *grid), (pairs,), plan.sums)
    )
    for launch in plan.launches:
        launch(*tables, sums, loss, coefficients, video_logits, patch_logits, active, *numbers)
    loss = _summed(loss, _Parts(plan.loss_parts, plan.loss_parts, 1), ())
    return loss, coefficients, video_logits, patch_logits, active


def gran_dpo_table(
    log_ratio: Tensor,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    logit_scale: Tensor | None,
    error: Tensor | None,
    loser_scale: Tensor | None,
    latent_shape: Sequence[int],
    link_name: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The H1 loss and its coefficients from the table of log-ratios: see halo_fast.loss.reference.gran_dpo_table."""
    return _table(
        log_ratio, error, None, _WHOLE, None, patch_rewards, video_rewards, logit_scale, loser_scale,
        latent_shape, link_name, numbers, error is not None,
    )  # fmt: skip


def gran_dpo(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor,
    reference_error: Tensor | None,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    logit_scale: Tensor | None,
    grid: Sequence[int],
    link_name: str,
    numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The H1 loss, see halo_fast.loss.reference.composed_gran_dpo; the table's launch adds the parts of a patch."""
    shape = policy.shape[0], *grid
    parts, where = _parts(policy, reference, target, grid)
    error = patch_error(policy, target, grid) if reference is not None and numbers.supervised else None
    given: tuple[Tensor | None, _Parts, Tensor | None] = None, _WHOLE, None
    few = math.prod(shape) <= 2 * ALONE and math.prod(shape) * where.number <= ALONE_PARTS
    if few and (where.number > 1 or reference_error is not None):
        log_ratio = parts.new_empty(shape)
        error = error if reference_error is None else parts.new_empty(shape)
        given = parts, where, reference_error
    else:
        log_ratio = _summed(parts, where, shape)
        if reference_error is not None:
            error, log_ratio = log_ratio, reference_error - log_ratio
    table = _table(
        log_ratio, error, *given, patch_rewards, video_rewards, logit_scale, None, policy.shape[1:], link_name, numbers,
        numbers.supervised,
    )  # fmt: skip
    return *table, log_ratio, error
