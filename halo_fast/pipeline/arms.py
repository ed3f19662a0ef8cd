"""The clips of an evaluation's two arms: which there are, sampled, and measured off their files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from halo_fast import processes
from halo_fast.agreement.meters import Meter, read_meter
from halo_fast.data.clips import read_clip, write_clip
from halo_fast.data.prompts import prompt_pictures
from halo_fast.data.tables import EvaluatedRow, shared_rows
from halo_fast.errors import UserError
from halo_fast.families import load
from halo_fast.families.sampling import clip_seed, sample_clips
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.pictures import pictures_of
from halo_fast.rewards import RewardModel

__all__ = ["arm_clips", "measure_arms", "sample_arms"]

_ARMS = ("base", "aligned")
# No candidate of a training prompt has this number, so that no evaluation clip starts from noise that was trained on.
_CANDIDATE = -1
_LOOK = (2, 8, 8)  # boxes along time, height and width whose mean colours tell clips apart


def arm_clips(prompts: Sequence[str], seed: int) -> list[EvaluatedRow]:
    """One clip of each prompt for either arm, base first, with the same noise; nothing is measured yet.

    Args:
        prompts: held-out prompts.
        seed: of the run.
    """
    return [
        EvaluatedRow(
            clip_id=f"{arm}_p{index:04d}",
            arm=arm,
            prompt_id=index,
            prompt=prompt,
            seed=clip_seed(seed, index, _CANDIDATE),
            video=f"videos/{arm}/p{index:04d}.mp4",
        )
        for arm in _ARMS
        for index, prompt in enumerate(prompts)
    ]


def sample_arms(config: Config, clips: Sequence[EvaluatedRow], trained: Sequence[Path], folder: Path) -> None:
    """Write the clips that do not exist yet.

    Args:
        config: model and sampling.
        clips: of both arms.
        trained: the LoRA or network of every training of this run.
        folder: of the clips' files.
    """
    batches = _batches(clips, config.generate.batch_size)
    missing = processes.by_first(
        lambda: [
            number for number, batch in enumerate(batches) if not all((folder / clip.video).exists() for clip in batch)
        ]
    )
    if not missing:
        return
    from halo_fast.export.lora import load_all_trained

    family = load(
        config.pretrained_model_name_or_path, network=config.train.network, precision=config.precision,
        quantization=config.quantization,
    )  # fmt: skip
    wanted = family.image_conditions and config.evaluation_prompts
    pictures = prompt_pictures(config.evaluation_prompts, "evaluation_prompts") if wanted else {}
    arm = _ARMS[0]
    for batch in processes.share([batches[number] for number in missing], "evaluate"):
        if batch[0].arm != arm:
            arm = batch[0].arm
            load_all_trained(family, trained)
        prompts = [clip.prompt for clip in batch]
        images = pictures_of(prompts, pictures, config.generate)
        _, videos = sample_clips(family, prompts, [clip.seed for clip in batch], config.generate, images)
        for clip, video in zip(batch, videos, strict=True):
            write_clip(folder / clip.video, video, config.generate.fps, config.generate.crf)


@torch.no_grad()
def measure_arms(
    config: Config, clips: Sequence[EvaluatedRow], folder: Path, meter: Meter, model: RewardModel
) -> list[EvaluatedRow]:
    """The clips with the meter's readings, the reward model's scores and their looks; on the first process alone.

    Args:
        config: grid and size of the batches.
        clips: of both arms.
        folder: of the clips' files.
        meter: what measures defects.
        model: the run's reward model.

    Raises:
        UserError: an unreadable clip, or a reading that is no number of the clip.
    """

    def measure(batch: Sequence[EvaluatedRow]) -> list[EvaluatedRow]:
        rows = []
        videos = torch.stack([read_clip(processes.seen(folder / clip.video)) for clip in batch])
        prompts = [clip.prompt for clip in batch]
        video, patches = model.by_dimension(model(videos, prompts, config.grid))
        readings, looks, changes = read_meter(meter, videos, prompts, config.grid), _looks(videos), _changes(videos)
        for index, clip in enumerate(batch):
            read, scores, quality = (
                {name: values[index].flatten().tolist() for name, values in found.items()}
                for found in (readings, video, patches)
            )
            video_scores = {name: score for name, (score,) in scores.items()}
            rows.append(
                replace(
                    _with_readings(clip, read, config.evaluate.meter),
                    video_scores=video_scores,
                    patch_scores=quality,
                    change=float(changes[index]),
                    look=looks[index].tolist(),
                )
            )
        return rows

    return shared_rows(folder, "measuring", _batches(clips, config.score.batch_size), measure, EvaluatedRow)


def _with_readings(clip: EvaluatedRow, readings: Mapping[str, list[float]], meter: str) -> EvaluatedRow:
    """The clip with what the meter of this name reads of it."""
    kinds = {name: values for name, values in readings.items() if name.startswith("severity_")}
    rest = {name: values for name, values in readings.items() if name != "severity" and name not in kinds}
    for name, values in rest.items():
        if len(values) != 1:
            raise UserError(
                f"evaluate.meter: {meter} gives {len(values)} numbers of a clip as {name!r}, expected one; name what "
                "it reads of every patch severity_KIND"
            )
    return replace(
        clip,
        severity=readings["severity"],
        kinds={name.removeprefix("severity_"): values for name, values in kinds.items()},
        readings={name: value for name, (value,) in rest.items()},
    )


def _looks(videos: Tensor) -> Tensor:
    """Mean colours of coarse boxes [N, 3 * t * y * x] in [0, 1], of videos uint8 [N, F, H, W, 3]."""
    colours = videos.movedim(-1, 1).float() / 255
    return torch.nn.functional.adaptive_avg_pool3d(colours, _LOOK).flatten(1)


def _changes(videos: Tensor) -> Tensor:
    """Mean absolute difference of successive frames [N] in [0, 1], of videos uint8 [N, F, H, W, 3]; 0 for one frame."""
    if videos.shape[1] < 2:
        return torch.zeros(len(videos))
    return (videos[:, 1:].float() - videos[:, :-1].float()).abs().flatten(1).mean(dim=1) / 255


def _batches(clips: Sequence[EvaluatedRow], size: int) -> list[list[EvaluatedRow]]:
    """Batches of one arm each; both arms are in the same batches, because rounding may depend on them."""
    arms = ([clip for clip in clips if clip.arm == arm] for arm in _ARMS)
    return [arm[start : start + size] for arm in arms for start in range(0, len(arm), size)]
