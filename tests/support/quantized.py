"""The formats of quantised weights, written down again: values, and how far rounding may be off."""

import torch

BACKENDS = ["bnb_nf4", "bnb_int8", "torchao_int8", "torchao_float8"]
# QLoRA's 4-bit NormalFloat, appendix E of arXiv:2305.14314
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def decoded(layer, backend):
    """A layer's weight [out, in] in float64, read off its bytes by the published format."""
    weight = layer.weight
    if backend == "bnb_nf4":
        codes = torch.stack([weight.data >> 4, weight.data & 15], dim=-1).flatten()
        scales = weight.quant_state.absmax.double().repeat_interleave(64)[: len(codes)]
        return (NF4.double()[codes.long()] * scales).view(layer.out_features, layer.in_features)
    if backend == "bnb_int8":
        return weight.data.double() * weight.SCB.double()[:, None] / 127
    inside = {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
    return inside["qdata"].double() * inside["scale"].double()


def largest_error(weight, backend):
    """How far rounding to the nearest value of the format may move each number, [out, in]."""
    largest = weight.abs().amax(1, keepdim=True).double()
    if backend == "bnb_nf4":  # the widest gap of the table, in a block whose largest number is at most the layer's
        return weight.abs().max() * NF4.diff().max() / 2 * torch.ones_like(weight)
    if backend == "torchao_float8":  # 3 bits of mantissa, and the smallest step
        return (weight.abs().double() / 16).clamp(min=largest / 448 * 2**-9)
    # bitsandbytes counts steps in float16
    return largest / 127 / 2 * torch.ones_like(weight) * (1.2 if backend == "bnb_int8" else 1)
