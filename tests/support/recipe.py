"""The demo's settings, with changes, for tests that run its stages."""

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

from halo_fast.pipeline.arguments import load_config
from halo_fast.pipeline.config import Config


def demo_config(**changes: Any) -> Config:
    """The shipped recipe of the demo; a change of a section may be a mapping of some of its fields.

    demo_config(output_dir="run", train={"max_train_steps": 2}, generate=GenerateConfig(num_prompts=4))
    """
    config = load_config("demo")
    merged = {
        name: replace(section, **value)
        if isinstance(value, Mapping) and is_dataclass(section := getattr(config, name))
        else value
        for name, value in changes.items()
    }
    return replace(config, **merged)
