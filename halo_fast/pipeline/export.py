"""`halo export`: what a run has trained, or its clips and pairs, in a format of other programs."""

import json
import shutil
from pathlib import Path

from halo_fast.errors import UserError
from halo_fast.export.comfyui import comfyui
from halo_fast.export.datasets import DATASET_FORMATS, write_dataset
from halo_fast.export.lora import LORA_FILE, METADATA_FILE
from halo_fast.files import write_safetensors
from halo_fast.pipeline.clips import read_run_data
from halo_fast.pipeline.hashes import MANIFEST
from halo_fast.pipeline.run import round_folders
from halo_fast.pipeline.stages.train import folder_of

__all__ = ["export_run"]

FORMATS = ("diffusers", "comfyui", *DATASET_FORMATS)


def export_run(
    run: Path,
    format: str = "diffusers",
    output: Path | None = None,
    network: str | None = None,
    round: int | None = None,
) -> Path:
    """Write the LoRA of a run directory, the network trained at rank 0, or the data in a format of other programs.

    Args:
        run: the run directory; its `train` must have finished, or for data its clips and pairs.
        format: "diffusers", for `pipeline.load_lora_weights`, or "comfyui"; for clips, labels and pairs "huggingface",
            "trl", "diffsynth" or "videodpo".
        output: folder of what is written; None for export/<format> in the run directory, or export/<network>/<format>;
            a round that is named ends the name.
        network: which training, for models of which several networks are trained; None for the first network's.
        round: whose training, or whose clips and pairs; None for the last round that has finished them.

    Returns:
        The file written, or the folder of the network or data set.

    Raises:
        UserError: an unknown format, a run in which nothing was trained, or a model whose names in ComfyUI are not
            known.
    """
    if format not in FORMATS:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    own = f"{format}_round_{round}" if round else format
    folder = Path(output) if output is not None else Path(run) / "export" / (network or "") / own
    if format in DATASET_FORMATS:
        data = read_run_data(_round(Path(run), "generate", round))
        if output is not None:
            return write_dataset(data, format, folder)
        # the run's own export is replaced whole: nothing of an earlier one may stay beside it
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        write_dataset(data, format, part)
        shutil.rmtree(folder, ignore_errors=True)
        return part.rename(folder)
    name = folder_of(network)
    training = _round(Path(run), name, round) / name
    model = training / "model"
    if (model / METADATA_FILE).is_file():
        if format != "diffusers":
            raise UserError(f"format: this run trained the whole network, which {format} has no LoRA of; use diffusers")
        metadata = json.loads((model / METADATA_FILE).read_text())
        return Path(shutil.copytree(model, folder / metadata["network"], dirs_exist_ok=True))
    lora = training / "lora" / LORA_FILE
    if not lora.is_file():
        raise UserError(f"{lora}: not there; run `halo train` with --output_dir {run} first")
    return _export_lora(lora, format, folder)


def _round(run: Path, stage: str, number: int | None) -> Path:
    """The folder of a round: the last one in which a stage is finished, or the one of a number."""
    if number is None:
        return [run, *(path for path in round_folders(run)[1:] if (path / stage / MANIFEST).exists())][-1]
    folder = run if number == 1 else run / f"round_{number}"
    if folder not in round_folders(run):
        raise UserError(f"round: expected one of 1 to {len(round_folders(run))}, got {number}")
    return folder


def _export_lora(lora: Path, format: str, folder: Path) -> Path:
    """Write a trained LoRA in a format of other programs; the file written."""
    from safetensors import safe_open

    with safe_open(lora, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if format == "diffusers":
        write_safetensors(folder / LORA_FILE, tensors, metadata)
        return folder / LORA_FILE
    # Each expert of Wan 2.2 is trained by itself, and is a model of its own in ComfyUI.
    target = folder / f"lora_{metadata.get('network', 'transformer')}.safetensors"
    bare = {name.split(".", 1)[1]: value for name, value in tensors.items()}
    write_safetensors(target, comfyui(bare, metadata.get("pipeline", "")), metadata)
    return target
