"""Checkpoints: all that a training needs to go on as if nothing had happened."""

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halo_fast.data import Pair
from halo_fast.errors import UserError
from halo_fast.files import write_json, write_safetensors
from halo_fast.train.config import TrainConfig
from halo_fast.train.diagnostics import Record
from halo_fast.train.job import Job
from halo_fast.train.parallel import full

__all__ = ["Progressed", "prune", "resume", "save"]


@dataclass
class Progressed:
    """How far a training has come.

    Args:
        log: rows of log.csv.
        diagnostics: rows of diagnostics.csv.
        records: of the steps since the last of these.
    """

    log: list[dict[str, float]] = field(default_factory=list)
    diagnostics: list[dict[str, float | str]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


def save(folder: Path, step: int, job: Job, records: Sequence[Record]) -> None:
    """Write checkpoints/step_NNNNNN; state.json comes last and makes it valid. Every process must call."""
    main = job.accelerator.is_main_process

    def whole(value: Tensor) -> Tensor:
        # one tensor at a time is whole on the device, and only one process keeps it
        gathered = full(value.detach()).contiguous()
        return gathered.cpu() if main else gathered.new_empty(0)

    weights = {name: whole(value) for name, value in job.parameters.items()}
    moments = {
        f"{name}.{key}": whole(value)
        for name, parameter in job.parameters.items()
        for key, value in job.optimizer.state[parameter].items()
    }
    others = {
        f"record.{index}.{name}": value for index, one in enumerate(records) for name, value in _flat(one).items()
    }
    if job.auto_beta is not None:
        others |= {f"auto_beta.{name}": value for name, value in job.auto_beta.state_dict().items()}
    if main:
        checkpoint = folder / "checkpoints" / f"step_{step:06d}"
        write_safetensors(checkpoint / "weights.safetensors", weights)
        write_safetensors(checkpoint / "optimizer.safetensors", moments)
        write_safetensors(checkpoint / "others.safetensors", others)
        write_json(checkpoint / "state.json", {"step": step, "schedule": job.plan.schedule, "settings": _settings(job)})
        prune(folder, job.config)
    job.accelerator.wait_for_everyone()


def prune(folder: Path, config: TrainConfig) -> None:
    """Remove all but the newest `checkpoints_total_limit` checkpoints, cut-off ones, and old ones off schedule."""
    found = sorted(folder.glob("checkpoints/step_*"))
    complete = [path for path in found if (path / "state.json").exists()]
    regular = [path for path in complete if int(path.name.removeprefix("step_")) % config.checkpointing_steps == 0]
    kept = regular[-config.checkpoints_total_limit :] if config.checkpoints_total_limit else regular
    if complete and (not kept or kept[-1] < complete[-1]):
        kept = [*kept, complete[-1]]
    for path in found:
        # What a kill cut off goes too: finished trainings leave the same files however often they were stopped.
        if path not in kept:
            # Without its state it does not count, should the rest survive a kill.
            (path / "state.json").unlink(missing_ok=True)
            shutil.rmtree(path)


def resume(folder: Path | None, job: Job) -> Progressed:
    """Load the last complete checkpoint, if there is one, and say how far it had come.

    Raises:
        UserError: a checkpoint of other settings, with the first that differs; one that cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    states = sorted(folder.glob("checkpoints/step_*/state.json")) if folder is not None else []
    if folder is None or not states:
        return Progressed()
    place = states[-1].parent
    try:
        state = json.loads(states[-1].read_text())
        weights, moments, others = (
            load_file(place / f"{name}.safetensors") for name in ("weights", "optimizer", "others")
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{place}: damaged ({error}); remove this folder to go on from the checkpoint before"
        ) from error
    for name, value in _settings(job).items():
        was = state["settings"].get(name)
        if was != value:
            raise UserError(f"{place}: made with {name} {was}, now it is {value}; use another folder")
    # A schedule chosen by free memory might be another one today, and would round differently.
    job.plan = job.plan.scheduled(state["schedule"])
    with torch.no_grad():
        for name, parameter in job.parameters.items():
            parameter.copy_(_like(weights[name], parameter))
            job.optimizer.state[parameter] = {
                # the count of steps is a number, never sharded
                key: moments[f"{name}.{key}"].to(parameter.device)
                if key == "step"
                else _like(moments[f"{name}.{key}"], parameter)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    if job.auto_beta is not None:
        job.auto_beta.load_state_dict({"beta": others["auto_beta.beta"]})
    return Progressed(
        _log(folder / "log.csv", state["step"]),
        _numbers(folder / "diagnostics.csv", state["step"]) if (folder / "diagnostics.csv").exists() else [],
        _records(others, job),
    )


def _settings(job: Job) -> dict[str, Any]:
    """Everything that a step depends on, as JSON gives it back."""
    # All pairs would take as long to read as an epoch; other data differ at the ends.
    ends = {f"{name} pair": _digest(job.pairs[index]) for name, index in (("first", 0), ("last", len(job.pairs) - 1))}
    more = {"pairs": len(job.pairs), "processes": job.accelerator.num_processes}
    return json.loads(json.dumps(asdict(job.config) | more | ends))


def _digest(pair: Pair) -> str:
    """Of everything in a pair."""
    digest = hashlib.sha256()
    rewards = {"patch_rewards": pair.patch_rewards, "video_rewards": pair.video_rewards}
    for name, value in {"latents": pair.latents, **rewards, **dict(sorted(pair.conditions.items()))}.items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _log(path: Path, last: int) -> list[Any]:
    """The rows of log.csv up to a step; UserError if they are not there."""
    rows = _numbers(path, last) if path.exists() else []
    if [row["step"] for row in rows] != list(range(1, last + 1)):
        raise UserError(
            f"{path}: expected a row for each of the steps 1 to {last} that the checkpoint has seen, got {len(rows)}; "
            "put the file back, or start in another folder"
        )
    return rows


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """The value where and as the parameter is, sharded or whole."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    return distribute_tensor(value, sharded.device_mesh, sharded.placements)


def _numbers(path: Path, last: int) -> list[Any]:
    def value(name: str, text: str) -> float | int | str:
        if name in ("step", "count"):
            return int(text)
        return text if name in ("split", "label", "group", "bucket") else float(text)

    with open(path, newline="") as file:
        rows: list[dict[str, Any]] = [
            {name: value(name, text) for name, text in row.items() if text != "" or name == "bucket"}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row["step"] <= last]


def _flat(record: Record) -> dict[str, Tensor]:
    tables = {f"errors.{label}": value for label, value in record.errors.items()}
    return {"t": record.t, **tables, **{f"weights.{label}": value for label, value in record.weights.items()}}


def _records(others: dict[str, Tensor], job: Job) -> list[Record]:
    device = job.accelerator.device
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in others.items():
        if name.startswith("record."):
            _, index, rest = name.split(".", 2)
            found.setdefault(int(index), {})[rest] = value.to(device)
    return [
        Record(
            t=parts["t"],
            errors={label: parts[f"errors.{label}"] for label in ("video", "patch")},
            weights={label: parts[f"weights.{label}"] for label in ("video", "patch")},
            grid=tuple(job.pairs[0].patch_rewards.shape[1:]),
        )
        for _, parts in sorted(found.items())
    ]
