"""Checkpoints: what a training needs to go on as if nothing had happened."""

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halo_fast.config import TrainConfig
from halo_fast.runs import UserError, write_json, write_safetensors

__all__ = ["resume", "save"]


def settings(config: TrainConfig, count: int) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config) | {"pairs": count}))


def save(
    folder: Path, step: int, parameters: Mapping[str, Tensor], optimizer: Any, config: TrainConfig, count: int
) -> None:
    """Write checkpoints/step_NNNNNN; state.json comes last and makes it valid."""
    checkpoint = folder / "checkpoints" / f"step_{step:06d}"
    moments = {
        f"{name}.{key}": value.contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    write_safetensors(checkpoint / "adapter.safetensors", {name: value.detach() for name, value in parameters.items()})
    write_safetensors(checkpoint / "optimizer.safetensors", moments)
    write_json(checkpoint / "state.json", {"step": step, "settings": settings(config, count)})


def resume(
    folder: Path | None, parameters: Mapping[str, Tensor], optimizer: Any, config: TrainConfig, count: int
) -> list[dict[str, float]]:
    """Load the last complete checkpoint, if there is one, and give the log up to it."""
    from safetensors.torch import load_file

    states = sorted(folder.glob("checkpoints/step_*/state.json")) if folder is not None else []
    if folder is None or not states:
        return []
    state = json.loads(states[-1].read_text())
    for name, value in settings(config, count).items():
        if state["settings"].get(name) != value:
            was = state["settings"].get(name)
            raise UserError(f"{states[-1].parent}: made with {name} {was}, now it is {value}; use another folder")
    adapter = load_file(states[-1].with_name("adapter.safetensors"))
    moments = load_file(states[-1].with_name("optimizer.safetensors"))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapter[name])
            optimizer.state[parameter] = {
                key: moments[f"{name}.{key}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
    with open(folder / "log.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"])} for row in rows if row["step"] <= state["step"]]
