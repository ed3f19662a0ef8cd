"""A frozen network in 8 or 4 bits: which layers, by which package, and what its weights take.

Quantised are the linear layers inside the repeated blocks, of attention and feed-forward. Everything else stays as it
is: embeddings, modulation, norms, the output layer, what diffusers keeps in float32, and whatever is trained. Of
transformers' models, which are read here too, the caller names the layers.
"""

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halo_fast.errors import UserError
from halo_fast.families.base import repeated_blocks

__all__ = [
    "Quantization",
    "check_quantization",
    "is_quantized",
    "keep_gradients",
    "load_quantized",
    "plain_tensors",
    "quantized_bytes",
    "quantized_layers",
    "read_quantized",
    "stored_bytes",
]

Quantization = Literal["bnb_nf4", "bnb_int8", "torchao_int8", "torchao_float8"]

_PACKAGES = {"bnb": "bitsandbytes", "torchao": "torchao"}
# Parts of layers' names: modulation decides how strongly a block acts, and few of a network's weights are in it.
_KEPT = ("norm", "modulation", "ada", "embed", "scale_shift")
_NF4_BLOCK = 64
# of a row: a float32, and in torchao's int8 a zero point too
_SCALES = {"bnb_int8": 4, "torchao_int8": 5, "torchao_float8": 4}


def check_quantization(quantization: str | None, setting: str = "quantization") -> None:
    """Raise unless the package is installed that quantises like this.

    Args:
        quantization: its name; None needs nothing.
        setting: for the error.

    Raises:
        UserError: with the command that installs it.
    """
    package = _PACKAGES[quantization.partition("_")[0]] if quantization else ""
    if package and find_spec(package) is None:
        raise UserError(f"{setting}: {quantization} needs {package}, which is not installed; pip install {package}")


def quantized_layers(network: nn.Module) -> list[str]:
    """The names of the linear layers that are quantised.

    Args:
        network: of diffusers, without values too.
    """
    kept = (*_KEPT, *(getattr(network, "_keep_in_fp32_modules", None) or ()))
    blocks = repeated_blocks(network)
    inside = {id(layer) for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)}
    return [
        name
        for name, layer in network.named_modules()
        if id(layer) in inside and not any(word in part for part in name.split(".") for word in kept)
    ]


def quantized_bytes(network: nn.Module, quantization: str, dtype: torch.dtype | None = None) -> int:
    """Bytes of a network's weights once it is quantised, by the packages' formats.

    nf4 has 4 bits a weight and a float32 for each 64. The others have 8 bits a weight and a scale for each row.

    Args:
        network: as it is loaded otherwise, without values too.
        quantization: how.
        dtype: in which its other weights are loaded; None for their own.
    """

    def each(value: Tensor) -> int:
        return dtype.itemsize if dtype else value.element_size()

    total = sum(value.numel() * each(value) for value in network.parameters())
    for name in quantized_layers(network):
        weight: Any = network.get_submodule(name).weight
        rows, count = len(weight), weight.numel()
        if quantization == "bnb_nf4":  # of its table of 16 values each layer has its own
            size = -(-count // 2) + 4 * -(-count // _NF4_BLOCK) + 4 * 16
        else:
            size = count + _SCALES[quantization] * rows
        total += size - count * each(weight)
    return total


def load_quantized(folder: Path, empty: nn.Module, quantization: Quantization, dtype: torch.dtype) -> nn.Module:
    """A network of a diffusers folder, quantised on the CPU while it is read.

    Args:
        folder: of the network.
        empty: the network without weights.
        quantization: how.
        dtype: of everything that is not quantised, and in which layers compute.

    Raises:
        UserError: nothing of the network can be quantised, or the package is missing or has left layers as they were.
    """
    reader: Any = type(empty)

    def read(**settings: Any) -> nn.Module:
        network: nn.Module = reader.from_pretrained(str(folder), torch_dtype=dtype, **settings)
        return network

    with _on_any_device():
        return read_quantized(read, empty, quantized_layers(empty), quantization, dtype)


def read_quantized(
    read: Callable[..., nn.Module],
    empty: nn.Module,
    layers: Sequence[str],
    quantization: Quantization,
    dtype: torch.dtype,
    library: str = "diffusers",
    stored: bool = False,
    setting: str = "quantization",
) -> nn.Module:
    """A network whose linear layers are quantised on the CPU while it is read; in eval mode.

    Args:
        read: gives the network by keyword arguments of its library's `from_pretrained`.
        empty: the network without weights.
        layers: names of the linear layers.
        quantization: how.
        dtype: of everything that is not quantised, and in which layers compute.
        library: "diffusers" or "transformers".
        stored: whether the network's files hold it quantised already, by the same settings.
        setting: for errors.

    Raises:
        UserError: no layers, or the package is missing or has left layers as they were.
    """
    check_quantization(quantization, setting)
    kind = type(empty).__name__
    if not layers:
        raise UserError(f"{setting}: {kind} names no blocks with linear layers to quantise; set null")
    if quantization == "bnb_nf4":
        for name in layers:  # bitsandbytes reads other scales than it wrote where a block goes on in the next row
            layer: Any = empty.get_submodule(name)
            if layer.in_features % _NF4_BLOCK:
                raise UserError(
                    f"{setting}: bnb_nf4 takes layers with a multiple of {_NF4_BLOCK} inputs, {name} of {kind} has "
                    f"{layer.in_features}; set torchao_int8"
                )
    wanted = set(layers)
    others = [name for name, layer in empty.named_modules() if isinstance(layer, nn.Linear) and name not in wanted]
    given: dict[str, Any] = {} if stored else {"quantization_config": _settings(quantization, dtype, others, library)}
    if quantization == "bnb_int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every layer
    # torchao leaves alone what a map places on the CPU; bitsandbytes asks for a GPU where there is no map
    placed = {"device_map": {"": "cpu"}} if quantization.startswith("bnb") else {}
    network = read(**given, **placed)
    left = [name for name in layers if not is_quantized(network.get_submodule(name))]
    if left:
        raise UserError(f"{setting}: {quantization} has left {left[0]} of {kind} as it was; update the package")
    keep_gradients(network)
    return network.eval()


def _settings(quantization: str, dtype: torch.dtype, others: Sequence[str], library: str) -> Any:
    """The library's settings of a quantisation that leaves `others` alone."""
    names: Any = importlib.import_module(library)
    kept = list(others)  # diffusers adds to it
    if quantization == "bnb_nf4":
        return names.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
        )
    if quantization == "bnb_int8":
        # Above a threshold, columns would be chosen by all rows, and a sample would depend on its batch.
        return names.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=kept)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    weights = Int8WeightOnlyConfig() if quantization == "torchao_int8" else Float8WeightOnlyConfig()
    return names.TorchAoConfig(weights, modules_to_not_convert=kept)


@contextmanager
def _on_any_device() -> Iterator[None]:
    """Inside the block diffusers quantises by bitsandbytes on the CPU, which bitsandbytes can and diffusers refuses."""
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    kinds: list[Any] = [bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer]
    checks = [kind.validate_environment for kind in kinds]
    try:
        for kind in kinds:
            kind.validate_environment = lambda self, *args, **kwargs: None
        yield
    finally:
        for kind, check in zip(kinds, checks, strict=True):
            kind.validate_environment = check


def keep_gradients(network: nn.Module) -> None:
    """Keep 4-bit layers in the form that has gradients.

    In eval mode, on CPUs that multiply in bfloat16, bitsandbytes packs weights anew at the first call without
    gradients. From then on what goes through the layer has no gradient, and nothing says so.

    Raises:
        UserError: a layer was packed already.
    """
    for name, layer in network.named_modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise UserError(
                    f"model: bitsandbytes has packed {name} for inference on this CPU, so it has no gradients; load "
                    "the model again and train it before it samples"
                )


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored in 8 or 4 bits by a package that this module knows."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    return not weight.dtype.is_floating_point or type(weight.data).__module__.startswith("torchao.")


def plain_tensors(network: nn.Module) -> Iterator[Tensor]:
    """The tensors that hold a network's weights, each once, with the scales of those that are quantised."""
    seen: set[int] = set()
    for part in network.modules():
        # where bitsandbytes keeps the scales of int8 layers once these have run
        state = getattr(part, "state", None)
        for value in (*part._parameters.values(), *part._buffers.values(), getattr(state, "SCB", None)):
            for tensor in _plain(value):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor


def _plain(value: Any) -> Iterator[Tensor]:
    """The tensors inside a quantised one, or the tensor itself; none of what is no tensor."""
    if not isinstance(value, Tensor):
        return
    inside = getattr(value, "__tensor_flatten__", None)
    if inside is not None:
        for name in inside()[0]:
            yield from _plain(getattr(value, name))
        return
    yield value
    state = getattr(value, "quant_state", None)
    for scales in (getattr(state, "absmax", None), getattr(state, "code", None), getattr(value, "SCB", None)):
        yield from _plain(scales)


def stored_bytes(network: nn.Module) -> int:
    """Bytes of a network's weights as they lie in memory, quantised or not, without buffers."""
    buffers = {id(value) for value in network.buffers()}
    return sum(value.numel() * value.element_size() for value in plain_tensors(network) if id(value) not in buffers)
