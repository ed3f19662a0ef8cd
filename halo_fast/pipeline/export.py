"""`halo export`: what a run has trained, in a format of other programs."""

import json
import shutil
from pathlib import Path

from halo_fast.errors import UserError
from halo_fast.export.comfyui import comfyui
from halo_fast.export.lora import _FILE, FORMATS
from halo_fast.files import write_safetensors

__all__ = ["export_run"]


def export_run(run: Path, format: str = "diffusers", output: Path | None = None) -> Path:
    """Write the LoRA of a run directory in a format of other programs, or the network trained at rank 0.

    The file written, or the network's folder.

    Args:
        run: the run directory; its `train` must have finished.
        format: "diffusers", for `pipeline.load_lora_weights`, or "comfyui".
        output: folder of the file; None for export/<format> in the run directory.

    Raises:
        UserError: an unknown format, a run in which nothing was trained, or a model whose names in ComfyUI are not
            known.
    """
    from safetensors import safe_open

    if format not in FORMATS:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    folder = Path(output) if output is not None else Path(run) / "export" / format
    network = Path(run) / "train" / "model"
    if (network / "halo_fast.json").is_file():
        if format != "diffusers":
            raise UserError(f"format: this run trained the whole network, which {format} has no LoRA of; use diffusers")
        told = json.loads((network / "halo_fast.json").read_text())
        return Path(shutil.copytree(network, folder / told["network"], dirs_exist_ok=True))
    source = Path(run) / "train" / "lora" / _FILE
    if not source.is_file():
        raise UserError(f"{source}: not there; run `halo train` with --output_dir {run} first")
    with safe_open(source, framework="pt") as file:
        known, lora = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if format == "diffusers":
        write_safetensors(folder / _FILE, lora, known)
        return folder / _FILE
    # each expert of Wan 2.2 is trained by itself, and a model of its own in ComfyUI
    file = folder / f"lora_{known.get('network', 'transformer')}.safetensors"
    bare = {name.split(".", 1)[1]: value for name, value in lora.items()}
    write_safetensors(file, comfyui(bare, known.get("pipeline", "")), known)
    return file
