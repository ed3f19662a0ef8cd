"""Families of text-to-video models: one short file for each family of diffusers pipelines.

A family is found by the name of its pipeline class. A model that is no diffusers pipeline takes part by subclassing
`Family` anywhere, or `Denoiser` if it is only trained, and passing the object wherever a pipeline is taken.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import torch

from halo_fast import processes, registry
from halo_fast.errors import UserError, first_line
from halo_fast.families.base import Denoiser, Family, shift_times
from halo_fast.families.quantization import Quantization
from halo_fast.families.weights import Precision, Weights, hub_commit, load_pipeline
from halo_fast.files import no_loading_bars

__all__ = ["Denoiser", "Family", "RegisteredModel", "family_of", "load", "shift_times", "source"]

Model = TypeVar("Model", bound=Denoiser)

registry.register(
    "family",
    {
        "AnimateDiffPipeline": "halo_fast.families.unet:AnimateDiff",
        "CogVideoXPipeline": "halo_fast.families.cogvideox:CogVideoX",
        "Cosmos2_5_PredictBasePipeline": "halo_fast.families.cosmos:CosmosPredict25",
        "HeliosPipeline": "halo_fast.families.helios:Helios",
        "HunyuanVideo15Pipeline": "halo_fast.families.hunyuan:HunyuanVideo15",
        "HunyuanVideoPipeline": "halo_fast.families.hunyuan:HunyuanVideo",
        "Kandinsky5T2VPipeline": "halo_fast.families.kandinsky:Kandinsky5",
        "LTX2Pipeline": "halo_fast.families.ltx:LTX2",
        "LTXImageToVideoPipeline": "halo_fast.families.ltx:LTXImageToVideo",
        "LTXPipeline": "halo_fast.families.ltx:LTX",
        "MochiPipeline": "halo_fast.families.mochi:Mochi",
        "SanaVideoPipeline": "halo_fast.families.sana:SanaVideo",
        "SkyReelsV2Pipeline": "halo_fast.families.wan:SkyReelsV2",
        "TextToVideoSDPipeline": "halo_fast.families.unet:TextToVideoSD",
        "WanImageToVideoPipeline": "halo_fast.families.wan:WanImageToVideo",
        "WanPipeline": "halo_fast.families.wan:Wan",
    },
)


class RegisteredModel(NamedTuple):
    """A model under a name of its own, registered as kind "model".

    Args:
        load: gives a diffusers pipeline or a `Family`.
        source: what identifies the model as a stage's input, by content if it is a path.
    """

    load: Callable[[], Any]
    source: Path | str


@overload
def family_of(pipeline: Model, network: str | None = None) -> Model: ...
@overload
def family_of(pipeline: Any, network: str | None = None) -> Family: ...
def family_of(pipeline: Any, network: str | None = None) -> Any:
    """The family of a loaded pipeline; a `Denoiser` or `Family` is returned as it is.

    Args:
        pipeline: a diffusers pipeline, a `Denoiser` or a `Family`.
        network: the part that is trained where there is a choice, such as Wan 2.2's "transformer_2".

    Raises:
        UserError: no family is registered for the pipeline's class, or the pipeline has no such network.
    """
    if isinstance(pipeline, Denoiser):
        return pipeline
    _check_family(pipeline, "model")
    return registry.resolve("family", type(pipeline).__name__)(pipeline, network)


def source(name: str) -> Path | str:
    """What identifies a model as a stage's input: its folder, or its name on the hub with the commit."""
    if registry.is_name("model", name):
        model = registry.resolve("model", name, _SETTING)
        return model.source if isinstance(model, RegisteredModel) else name
    if Path(name).is_dir():
        return Path(name)
    commit = hub_commit(name)
    return f"{name}@{commit}" if commit else name


def load(
    name: str,
    device: str | None = None,
    network: str | None = None,
    precision: Precision = "auto",
    weights: Weights = None,
    quantization: Quantization | None = None,
) -> Family:
    """A model by its name.

    Registered models and callables load what they like: `precision` and `weights` are for folders and the hub.

    Args:
        name: a diffusers folder, a hub name, a registered name, or "package.module:attribute" of a `RegisteredModel`
            or of a callable that gives a diffusers pipeline or a `Family`.
        device: where the pipeline goes; None for the first GPU, or the CPU where there is none.
        network: the part that is trained, as for `family_of`.
        precision: of the weights; "auto" for the one in which they are stored.
        weights: parts whose weights are loaded, such as "transformer"; the others are on the meta device, without
            memory. None for all; "encoders" for all but the denoising networks; () for tokenizers, as `cut_prompts`
            needs them.
        quantization: of the frozen network's layers, in 8 or 4 bits; None for none.

    Raises:
        UserError: nothing loadable under that name, no family for it, or a network that cannot be quantised.
    """
    with no_loading_bars("diffusers", "transformers"):
        pipeline = _load_pipeline(name, precision, weights, quantization)
        _check_family(pipeline, f"{_SETTING}: {name!r}")
        family = family_of(pipeline, network)
    if not isinstance(family, Family):
        raise UserError(f"{_SETTING}: expected a model that samples and encodes, got {type(family).__name__}")
    if family is not pipeline:
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module) and not any(value.is_meta for value in part.parameters()):
                part.to(device or processes.device())
        pipeline.set_progress_bar_config(disable=True)
    return family


_SETTING = "pretrained_model_name_or_path"


def _check_family(pipeline: Any, place: str) -> None:
    families, name = registry.known("family"), type(pipeline).__name__
    if not isinstance(pipeline, Denoiser) and name not in families:
        raise UserError(f"{place}: no family for {name}; expected one of {', '.join(families)}, or a Family")


def _load_pipeline(name: str, precision: Precision, weights: Weights, quantization: Quantization | None) -> Any:
    """The pipeline or model under a registered or dotted name, in a folder, or on the hub."""
    if registry.is_name("model", name):
        if quantization:
            raise UserError(
                f"quantization: {name!r} loads what it likes; give a diffusers folder or a hub name, or set null"
            )
        model = registry.resolve("model", name, _SETTING)
        if not isinstance(model, RegisteredModel):
            return registry.create("model", name, _SETTING)
        with registry.user_errors("model", name, _SETTING):
            return model.load()
    try:
        return load_pipeline(name, precision, weights, quantization)
    except ImportError as error:
        raise UserError(f"{_SETTING}: {name!r} needs a package that is missing: {first_line(error)}") from error
    except (OSError, ValueError) as error:
        names = "".join(f", {known!r}" for known in registry.known("model"))
        is_path = name.startswith((".", "/", "~")) or name.count("/") > 1  # which the hub's own error does not say
        reason = "no such folder" if is_path and not Path(name).exists() else first_line(error)
        raise UserError(
            f"{_SETTING}: no diffusers pipeline at {name!r}; give a folder with model_index.json, a hub name as its "
            f"page spells it (the first time it needs the network){names}; the reason was: {reason}"
        ) from error
