"""Which weights of a diffusers folder are loaded, and in which precision."""

import importlib
import json
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from halo_fast.families.quantization import Quantization, load_quantized

__all__ = ["Precision", "Weights", "hub_commit", "load_pipeline", "stored_dtype"]

Precision = Literal["auto", "fp32", "bf16"]
Weights = Collection[str] | Literal["encoders"] | None
"""Parts whose weights are loaded, by name; "encoders" for all but the denoising networks, None for all."""

_STORED = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_pipeline(
    name: str,
    precision: Precision = "auto",
    weights: Weights = None,
    quantization: Quantization | None = None,
) -> Any:
    """A diffusers pipeline from a folder or the hub.

    Args:
        name: of the folder or the model on the hub.
        precision: of all networks. "auto" is the one in which each is stored. float16 needs loss scaling, so it becomes
            bfloat16 where the GPU computes in that, else float32. Layers that diffusers keeps in float32 stay so.
        weights: networks whose weights are loaded; the others are on the meta device.
        quantization: of the denoising networks; None for none.

    Raises:
        OSError, ValueError: from diffusers, if there is no such pipeline.
        UserError: a network that cannot be quantised, or a package that is missing.
    """
    import diffusers

    folder = Path(name)
    if not folder.is_dir():
        folder = Path(diffusers.DiffusionPipeline.download(name, revision=hub_commit(name)))
    networks = _networks(folder)
    denoising = {part for part in networks if part.partition("_")[0] in ("transformer", "unet")}
    if weights == "encoders":
        loaded: Collection[str] = networks.keys() - denoising
    else:
        loaded = networks if weights is None else weights
    ready = {part: _empty(folder / part, networks[part]) for part in networks if part not in loaded}
    if weights == "encoders":  # pipelines may ask a network for its precision to encode a prompt
        for part, network in ready.items():
            network.to(_dtype(folder / part, precision))
    dtypes = {part: _dtype(folder / part, precision) for part in networks if part in loaded}
    for part in dtypes:
        if quantization and part in denoising:
            shell = _empty(folder / part, networks[part])
            ready[part] = load_quantized(folder / part, shell, quantization, dtypes[part])
    # the class itself: DiffusionPipeline would load parts that are optional in it again
    kind: Any = getattr(diffusers, _index(folder).get("_class_name", ""), diffusers.DiffusionPipeline)
    with warnings.catch_warnings():
        # newer versions call it dtype, older ones know this name alone
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
        return kind.from_pretrained(str(folder), torch_dtype=dtypes | {"default": torch.float32}, **ready)


def hub_commit(name: str) -> str | None:
    """The commit of a model on the hub: of the copy in the cache, or of the newest one where nothing is cached.

    So a run goes on with the weights that it began with. `hf download NAME` brings a newer commit.

    Args:
        name: "owner/model".

    Returns:
        None if neither cache nor hub knows the model.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "model_index.json")
        index = Path(cached if isinstance(cached, str) else hf_hub_download(name, "model_index.json"))
    except (OSError, ValueError):
        return None
    return index.parent.name


def _index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _networks(folder: Path) -> dict[str, type[nn.Module]]:
    """The classes of the networks that model_index.json names."""
    from diffusers import pipelines

    found = {}
    for part, entry in _index(folder).items():
        if not isinstance(entry, list) or not entry[0]:
            continue
        # some classes belong to a pipeline of diffusers
        known = entry[0] in ("diffusers", "transformers")
        library = importlib.import_module(entry[0]) if known else getattr(pipelines, entry[0], None)
        kind = getattr(library, entry[1], None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            found[part] = kind
    return found


def _empty(folder: Path, kind: Any) -> nn.Module:
    """A network without weights, from its configuration alone."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        if hasattr(kind, "config_class") and kind.config_class is not None:
            network: nn.Module = kind(kind.config_class.from_pretrained(folder))
        else:
            network = kind.from_config(kind.load_config(folder))
    return network.eval()


def _dtype(folder: Path, precision: Precision) -> torch.dtype:
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    stored = stored_dtype(folder)
    if stored is not torch.float16:
        return stored
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def stored_dtype(folder: Path) -> torch.dtype:
    """The precision of most bytes in the first safetensors file, no variant; float32 where there is none."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: ("." in file.stem, file.name))
    if not files:
        return torch.float32
    with open(files[0], "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    size: Counter[str] = Counter()
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            size[entry["dtype"]] += end - begin
    return _STORED.get(size.most_common(1)[0][0], torch.float32) if size else torch.float32
