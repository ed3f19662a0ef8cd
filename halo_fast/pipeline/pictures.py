"""The first frames of image-to-video: which picture goes with a prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from halo_fast.data.clips import first_frame, read_picture
from halo_fast.data.fitting import fit_picture
from halo_fast.data.prompts import prompt_pictures
from halo_fast.errors import UserError
from halo_fast.families import Family, load
from halo_fast.families.sampling import GenerateConfig
from halo_fast.files import hash_file, hash_text
from halo_fast.pipeline.config import Config

__all__ = ["check_pictures", "picture_input", "pictures_of"]


def check_pictures(family: Family, config: Config) -> None:
    """Raise unless every list of prompts has pictures, where the model goes on from them.

    Args:
        family: the model.
        config: of the run.

    Raises:
        UserError: naming the list.
    """
    if not family.image_conditions:
        return
    for setting, prompts in (("prompts", config.prompts), ("evaluation_prompts", config.evaluation_prompts)):
        if prompts and not prompt_pictures(prompts, setting):
            raise UserError(
                f"{setting}: {type(family).__name__} makes clips that go on from a picture; expected a table with the "
                f"columns 'prompt' and 'image', got {prompts!r} without 'image'"
            )


def picture_input(config: Config, prompts: str, setting: str) -> dict[str, Path | str]:
    """The pictures of a list of prompts as a stage's input; none where the model or the list has no use for them.

    Args:
        config: of the run.
        prompts: the list.
        setting: that names it.
    """
    files = prompt_pictures(prompts, setting)
    if not files or not load(config.pretrained_model_name_or_path, device="cpu", weights=()).image_conditions:
        return {}
    return {f"pictures of {setting}": hash_text(" ".join(hash_file(file) for file in files.values()))}


def pictures_of(prompts: Sequence[str], files: Mapping[str, Path], size: GenerateConfig) -> dict[str, Tensor]:
    """The picture of each prompt that has one, uint8 [H, W, 3] in the size of the clips; its middle, if it is longer.

    Args:
        prompts: of a batch.
        files: a picture, or a video whose first frame is taken, of each prompt.
        size: of the clips.
    """
    found = {}
    for prompt in dict.fromkeys(prompts):
        if prompt in files:
            file = files[prompt]
            picture = first_frame(file) if file.suffix == ".mp4" else read_picture(file, str(file))
            found[prompt] = fit_picture(picture, size.height, size.width)
    return found
