"""Published weights of transformers' models, from a folder or a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from halo_fast.errors import UserError, first_line

__all__ = ["load_network", "model_folder", "precision"]


def precision(device: str) -> torch.dtype:
    """What published judges are run in: bfloat16 on a GPU, else float32."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def model_folder(name: str, setting: str) -> Path:
    """The folder of a model, which a hub name is fetched to.

    Raises:
        UserError: neither a folder nor a model that can be fetched.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{setting}: expected a model's folder or hub name, got {name!r} ({reason})") from error


def load_network(kind: Any, folder: Path, device: str, setting: str) -> Any:
    """A network of a class of transformers with all of its weights, in eval mode; further weights are left alone.

    Raises:
        UserError: no such model, or weights that are missing.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a head of the judge's own is reported as unexpected
    try:
        network, found = kind.from_pretrained(folder, dtype=precision(device), output_loading_info=True)
        absent = sorted(found["missing_keys"])
        if absent:
            raise ValueError(f"{len(absent)} of its weights are missing, such as {absent[0]}")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{setting}: expected a {kind.__name__} in {folder}, got none ({first_line(error)})") from error
    finally:
        logging.set_verbosity(level)
    return network.eval().requires_grad_(False).to(device)
