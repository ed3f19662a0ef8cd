"""Cards by name: their memory and speed, and whether a training step fits."""

import re
from typing import NamedTuple

import torch

from halo_fast.errors import UserError

__all__ = ["CARDS", "USABLE", "Device", "find_device", "fits", "size_text", "this_device"]

USABLE = 0.85
"""Share of the free memory that activations may take: allocators and kernels need the rest."""
_CONTEXT = 2**29  # bytes that a process's GPU context and libraries take


class Device(NamedTuple):
    """A device.

    Args:
        name: for the user.
        memory: bytes, as drivers report them.
        tflops: highest rate of dense bf16 matrix products with float32 sums, 1e12 operations a second; None: unknown.
    """

    name: str
    memory: int
    tflops: float | None


# MiB as nvidia-smi and rocm-smi report them; rates of the vendors' data sheets, without sparsity
CARDS = {
    name: Device(name, mebibytes * 2**20, tflops)
    for name, mebibytes, tflops in [
        ("rtx3090", 24576, 71.0), ("rtx4090", 24564, 165.2), ("rtx5090", 32607, 209.5), ("l4", 23034, 121.0),
        ("a10", 23028, 125.0), ("a6000", 49140, 154.8), ("rtx6000ada", 49140, 364.2), ("l40s", 46068, 362.0),
        ("a100-40", 40960, 312.0), ("a100", 81920, 312.0), ("h100", 81559, 989.4), ("h200", 143771, 989.4),
        ("b200", 183359, 2250.0), ("mi300x", 196592, 1307.4),
    ]
}  # fmt: skip
_UNITS = {"GIB": 2**30, "GB": 10**9, "MIB": 2**20, "MB": 10**6}


def find_device(text: str) -> Device:
    """The device that a name or a size stands for.

    Args:
        text: one of `CARDS`, or a size such as "24 GiB"; case and blanks do not matter.

    Raises:
        UserError: neither.
    """
    name = re.sub(r"[\s_]", "", text).lower()
    if name in CARDS:
        return CARDS[name]
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", name)
    if found and found[2].upper() in _UNITS and float(found[1]) > 0:
        return Device(text.strip(), int(float(found[1]) * _UNITS[found[2].upper()]), None)
    raise UserError(f'device: expected one of {", ".join(CARDS)}, or a size such as "24 GiB", got {text!r}')


def this_device() -> Device:
    """The first GPU of this machine, or its CPU's memory."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = [card for card in CARDS.values() if card.name in re.sub(r"[\s_-]|nvidia|geforce", "", name.lower())]
        memory = torch.cuda.get_device_properties(0).total_memory
        nearest = min(known, key=lambda card: abs(card.memory - memory), default=None)
        return Device(name, memory, nearest.tflops if nearest else None)
    import psutil  # type: ignore[import-untyped]

    return Device("this machine's CPU", psutil.virtual_memory().total, None)


def fits(device: Device, weights: int, rest: int) -> bool:
    """Whether bytes of weights, and of all else at its peak, go onto a device."""
    return rest <= USABLE * (device.memory - _CONTEXT - weights)


def size_text(count: float) -> str:
    """Bytes in binary units, three digits."""
    units = ["B", "KiB", "MiB", "GiB"]
    while count >= 1000 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:,.0f} {units[0]}" if count >= 100 else f"{count:.3g} {units[0]}"
