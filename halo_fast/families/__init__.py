"""Families of text-to-video models: one short file for each family of diffusers pipelines.

A family is found by the name of its pipeline class. A model that is no diffusers pipeline takes part by subclassing
`Family` anywhere, or `Denoiser` if it is only trained, and passing the object wherever a pipeline is taken.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import torch

from halo_fast import registry
from halo_fast.errors import UserError, first_line
from halo_fast.families.base import Denoiser, Family, shift_times

__all__ = [
    "Denoiser",
    "Family",
    "RegisteredModel",
    "family_of",
    "load",
    "load_skeleton",
    "shift_times",
    "source",
]

Model = TypeVar("Model", bound=Denoiser)

registry.register(
    "family",
    {
        "AnimateDiffPipeline": "halo_fast.families.unet:AnimateDiff",
        "CogVideoXPipeline": "halo_fast.families.cogvideox:CogVideoX",
        "HunyuanVideo15Pipeline": "halo_fast.families.hunyuan:HunyuanVideo15",
        "HunyuanVideoPipeline": "halo_fast.families.hunyuan:HunyuanVideo",
        "LTXPipeline": "halo_fast.families.ltx:LTX",
        "MochiPipeline": "halo_fast.families.mochi:Mochi",
        "TextToVideoSDPipeline": "halo_fast.families.unet:TextToVideoSD",
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
    """What identifies a model as a stage's input: its folder, or its name if it is no local folder."""
    if registry.is_name("model", name):
        model = registry.resolve("model", name, _SETTING)
        return model.source if isinstance(model, RegisteredModel) else name
    return Path(name) if Path(name).is_dir() else name


def load(name: str, device: str | None = None, network: str | None = None) -> Family:
    """A model by its name.

    Args:
        name: a diffusers folder, a hub name, a registered name, or "package.module:attribute" of a `RegisteredModel`
            or of a callable that gives a diffusers pipeline or a `Family`.
        device: where the pipeline goes; None for the first GPU, or the CPU where there is none.
        network: the part that is trained, as for `family_of`.

    Raises:
        UserError: nothing loadable under that name, or no family for it.
    """
    with _no_loading_bars():
        pipeline = _load_pipeline(name)
        _check_family(pipeline, f"{_SETTING}: {name!r}")
        family = family_of(pipeline, network)
    if not isinstance(family, Family):
        raise UserError(f"{_SETTING}: expected a model that samples and encodes, got {type(family).__name__}")
    if family is not pipeline:
        pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        pipeline.set_progress_bar_config(disable=True)
    return family


def load_skeleton(name: str) -> Family:
    """A model without weights, for questions about sizes of clips; registered models are loaded as they are.

    Args:
        name: as for `load`.

    Raises:
        UserError: as for `load`.
    """
    if registry.is_name("model", name):
        return load(name, device="cpu")
    import diffusers
    import transformers

    with _no_loading_bars(), _named(name):
        config = diffusers.DiffusionPipeline.load_config(name)
        _check_known(config["_class_name"], f"{_SETTING}: {name!r}")
        parts: dict[str, Any] = {}
        for part, value in config.items():
            if part.startswith("_"):
                continue
            kind = value[1] if isinstance(value, list) and len(value) == 2 else None
            found: Any = getattr(diffusers, kind or "", None) or getattr(transformers, kind or "", None)
            bases = getattr(found, "__mro__", ())
            if diffusers.ModelMixin in bases:
                with torch.device("meta"):
                    parts[part] = found.from_config(found.load_config(name, subfolder=part))
            elif isinstance(value, list):
                # text encoders are left out; tokenizers and schedulers are small
                wanted = found is not None and transformers.PreTrainedModel not in bases
                parts[part] = found.from_pretrained(name, subfolder=part) if wanted else None
            else:
                parts[part] = value
        return family_of(getattr(diffusers, config["_class_name"])(**parts))


_SETTING = "pretrained_model_name_or_path"


def _check_family(pipeline: Any, place: str) -> None:
    if not isinstance(pipeline, Denoiser):
        _check_known(type(pipeline).__name__, place)


def _check_known(name: str, place: str) -> None:
    families = registry.known("family")
    if name not in families:
        raise UserError(f"{place}: no family for {name}; expected one of {', '.join(families)}, or a Family")


def _load_pipeline(name: str) -> Any:
    """The pipeline or model under a registered or dotted name, in a folder, or on the hub."""
    if registry.is_name("model", name):
        model = registry.resolve("model", name, _SETTING)
        if not isinstance(model, RegisteredModel):
            return registry.create("model", name, _SETTING)
        with registry.user_errors("model", name, _SETTING):
            return model.load()
    from diffusers import DiffusionPipeline

    with _named(name):
        return DiffusionPipeline.from_pretrained(name)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Report under the setting's name that nothing can be loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        names = "".join(f", {known!r}" for known in registry.known("model"))
        raise UserError(
            f"{_SETTING}: no diffusers pipeline at {name!r} ({first_line(error)}); "
            f"give a folder with model_index.json, a hub name{names}"
        ) from error


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Silence the bars that diffusers and transformers draw for each file they load."""
    import diffusers.utils.logging
    import transformers.utils.logging

    logs = [diffusers.utils.logging, transformers.utils.logging]
    enabled = [log for log in logs if log.is_progress_bar_enabled()]
    for log in enabled:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in enabled:
            log.enable_progress_bar()
