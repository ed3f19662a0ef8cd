"""The stage that samples candidates of the base model: clips of every prompt with recorded seeds."""

import io
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from halo_fast import processes, registry
from halo_fast.data.clips import picture_file, read_clip, write_clip
from halo_fast.data.imports import keeps_formats
from halo_fast.data.pairs import corrupted_pair
from halo_fast.data.prompts import prompt_pictures, prompt_source, read_prompts, shared_prompts
from halo_fast.data.regions import covered_share, moving_region, worst_region
from halo_fast.data.tables import ClipRow, PairRow, read_rows, write_rows
from halo_fast.errors import UserError
from halo_fast.export.lora import load_all_trained
from halo_fast.families import Family, load, source
from halo_fast.families.sampling import clip_seed, sample_clips, sample_trunks, sample_variations
from halo_fast.families.steering import steerable
from halo_fast.files import write_bytes, write_json, write_safetensors
from halo_fast.patches import PatchGrid
from halo_fast.pipeline.clips import FACTORS_FILE
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.pictures import check_pictures, picture_input, pictures_of
from halo_fast.pipeline.run import Run, Stage
from halo_fast.pipeline.stages.train import trained_results
from halo_fast.rewards import RewardModel
from halo_fast.rewards.model import model_folder

__all__ = ["generate", "varies_imports", "warn_of_prompts"]

logger = logging.getLogger(__name__)


def generate(config: Config, run: Run) -> None:
    """Sample `num_videos_per_prompt` candidates of each prompt by `generate.strategy`; a stage.

    A later round samples from the model as the rounds before have aligned it. Writes generate/clips.parquet,
    videos/CLIP.mp4 and latents/CLIP.safetensors; of branches also trunks/, and of corrupted clips pairs.parquet with
    labels that follow from their regions. A killed run is continued at the first unfinished batch. Batches are formed
    alike in every run, because on some devices rounding depends on their shape.

    Raises:
        UserError: prompts, model, clip size, grid or strategy that do not fit.
    """
    settings = config.generate
    imported = _imported(config, run)
    prompts = _prompts(config, imported)
    warn_of_prompts(prompts, config)
    model = config.pretrained_model_name_or_path
    own = prompt_source(config.prompts) if config.prompts else run.require("import")
    inputs: dict[str, Path | str] = {"prompts": own, "pretrained_model_name_or_path": source(model)}
    inputs |= picture_input(config, config.prompts, "prompts") if config.prompts else {}
    if settings.strategy == "repair":
        inputs["reward_model"] = _reward_model(config)
    policy = trained_results(config, run.rounds[-2]) if run.number > 1 else {}
    inputs |= {f"policy, {name}": result for name, result in policy.items()}
    keys = asdict(settings) | {"seed": config.seed, "precision": config.precision}
    keys |= {"grid": config.grid} if settings.strategy in ("repair", "corrupt") else {}
    keys |= {"quantization": config.quantization} if config.quantization else {}
    with run.stage("generate", keys, inputs) as stage:
        if stage.done:
            return
        network = config.train.network if policy else None
        family = load(model, network=network, precision=config.precision, quantization=config.quantization)
        load_all_trained(family, list(policy.values()))
        _check_grid(family, config)
        check_pictures(family, config)
        if settings.strategy != "independent":
            steerable(family)
        if registry.is_name("model", model):  # its tokenizer could not be had alone
            _list_cut_prompts(family, prompts, "prompts")
        guides = imported if varies_imports(config) else []
        clips = _clip_rows(prompts, config, guides, _earlier_candidates(run))
        _sample(family, clips, guides, config, run, stage)
        if not processes.is_first():
            return
        for clip in clips:
            processes.seen(stage.folder / clip.video)
            if family.image_conditions:
                processes.seen(picture_file(stage.folder / clip.video))
        write_rows(stage.folder / "clips.parquet", clips, ClipRow)
        factors = family.latent_factors(settings.num_frames, settings.height, settings.width)
        write_json(stage.folder / FACTORS_FILE, factors._asdict())
        counts = {"prompts": len(prompts), "clips": len(clips)}
        if settings.strategy == "corrupt":
            pairs = _corrupted_pairs(family, clips, guides, config)
            write_rows(stage.folder / "pairs.parquet", pairs, PairRow)
            counts["pairs"] = len(pairs)
        stage.finish(counts)


def varies_imports(config: Config) -> bool:
    """Whether candidates are made from imported clips, in the place of a first candidate of its own.

    Raises:
        UserError: they are, and may have other sizes than candidates.
    """
    varies = bool(
        config.imports.sources
        and config.imports.generate
        and not config.prompts
        and config.generate.strategy in ("guided", "repair", "corrupt")
    )
    if varies and keeps_formats(config.imports):
        raise UserError(
            f"imports.size, imports.frames: the strategy {config.generate.strategy} needs clips of generate's size, "
            "got keep; set imports.size crop and imports.frames trim"
        )
    return varies


def _imported(config: Config, run: Run) -> list[ClipRow]:
    """The imported clips, where their prompts or they themselves are used."""
    if config.prompts or not config.imports.sources:
        return []
    return read_rows(run.require("import/clips.parquet"), ClipRow)


def _prompts(config: Config, imported: Sequence[ClipRow]) -> list[str]:
    """The prompts of config.prompts; beside an import, if that is not set, those of the imported clips."""
    if not imported:
        return read_prompts(config.prompts, config.generate.num_prompts, config.seed)
    return list(dict.fromkeys(row.prompt for row in imported))[: config.generate.num_prompts]


def _reward_model(config: Config) -> Path:
    if not config.reward_model:
        raise UserError(
            "reward_model: required by the strategy repair; give the folder of a trained one, such as runs/first/reward"
        )
    return model_folder(config.reward_model)


def warn_of_prompts(prompts: Sequence[str], config: Config) -> None:
    """Say, before any weights are loaded, which prompts are cut by the text encoder or trained and evaluated on.

    Args:
        prompts: that are trained on; none where they are not known yet.
        config: of the run.
    """
    evaluation = []
    if config.evaluation_prompts:
        evaluation = read_prompts(
            config.evaluation_prompts, config.evaluate.num_prompts, config.seed, setting="evaluation_prompts"
        )
    shared = shared_prompts(prompts, evaluation)
    if shared:
        logger.warning(
            "evaluation_prompts: %d of %d are among the prompts that are trained on, such as %r; they are not held out",
            len(shared),
            len(evaluation),
            shared[0],
        )
    model = config.pretrained_model_name_or_path
    if model and not registry.is_name("model", model):
        family = load(model, device="cpu", weights=())
        for setting, texts in (("prompts", prompts), ("evaluation_prompts", evaluation)):
            _list_cut_prompts(family, texts, setting)


def _list_cut_prompts(family: Family, prompts: Sequence[str], setting: str) -> None:
    """List the prompts of which the text encoder reads only the beginning."""
    cut = set(family.cut_prompts(prompts))
    for index, prompt in enumerate(prompts):
        if prompt in cut:
            logger.warning(
                "%s: number %d is longer than the text encoder reads: %r ...", setting, index + 1, prompt[:60]
            )
    if cut:
        logger.warning(
            "%s: %d of %d are cut by the text encoder, but teacher and reward model judge the whole; shorten them",
            setting,
            sum(prompt in cut for prompt in prompts),
            len(prompts),
        )


def _check_grid(family: Family, config: Config) -> None:
    latent_size = _latent_size(family, config)
    if any(patches > length for patches, length in zip(config.grid, latent_size, strict=True)):
        raise UserError(
            f"grid: at most {latent_size} patches along frames, height and width of this model's latents, "
            f"got {tuple(config.grid)}; use fewer patches or larger clips"
        )
    form = config.generate
    size = form.num_frames, form.height, form.width
    try:
        PatchGrid((config.grid[0], config.grid[1], config.grid[2]), *size, **family.latent_factors(*size)._asdict())
    except ValueError as error:
        raise UserError(f"grid: {error}; use fewer patches or longer clips") from error


def _latent_size(family: Family, config: Config) -> tuple[int, ...]:
    form = config.generate
    return family.latent_size(family.latent_shape(form.num_frames, form.height, form.width))


def _earlier_candidates(run: Run) -> int:
    """Number of a prompt's first candidate: rounds count on, so that none has the seed or name of an earlier one."""
    tables = [one.path / "generate/clips.parquet" for one in run.rounds[:-1]]
    return max(
        (row.candidate + 1 for table in tables if table.exists() for row in read_rows(table, ClipRow)), default=0
    )


def _clip_rows(prompts: Sequence[str], config: Config, guides: Sequence[ClipRow], earlier: int = 0) -> list[ClipRow]:
    """A row for each candidate of each prompt, with its seed, its files and what it is made from."""
    settings, rows, by_prompt = config.generate, [], defaultdict(list)
    for guide in guides:
        by_prompt[guide.prompt].append(guide.clip_id)
    for index, prompt in enumerate(prompts):
        parents = by_prompt[prompt]
        count = settings.num_videos_per_prompt * max(len(parents), 1)
        for candidate in range(earlier, earlier + count):
            clip_id = f"p{index:04d}_s{candidate}"
            first = candidate == earlier and not parents
            alone = settings.strategy == "independent" or (first and settings.strategy != "branched")
            parent = parents[candidate % len(parents)] if parents else f"p{index:04d}_s{earlier}"
            rows.append(
                ClipRow(
                    clip_id,
                    index,
                    prompt,
                    candidate,
                    clip_seed(config.seed, index, candidate),
                    f"videos/{clip_id}.mp4",
                    f"latents/{clip_id}.safetensors",
                    strategy="independent" if alone else settings.strategy,
                    parent=None if alone or first else parent,
                )
            )
    return rows


def _sample(
    family: Family, clips: Sequence[ClipRow], guides: Sequence[ClipRow], config: Config, run: Run, stage: Stage
) -> None:
    """Make all clips: those of noise alone, then trunks, then those that begin as a guide."""
    settings, folder = config.generate, stage.folder
    pictures = _picture_files(family, config, run)
    alone = [clip for clip in clips if clip.strategy == "independent"]
    others = [clip for clip in clips if clip.strategy != "independent"]

    def make(made: Sequence[ClipRow]) -> tuple[Tensor, Tensor]:
        images = pictures_of([clip.prompt for clip in made], pictures, settings)
        _write_pictures(made, images, folder)
        return sample_clips(family, *_named(made), settings, images)

    for batch in _batches(alone, config, "generate"):
        _write_batch(family, batch, config, folder, make)
    if settings.strategy == "branched":
        trunks = [clip for clip in others if clip.parent is None]
        for batch in _batches(trunks, config, "generate: shared steps"):
            if not all(_trunk(folder, clip.clip_id).exists() for clip in batch):
                estimates = sample_trunks(family, *_named(batch), settings)
                for clip, estimate in zip(batch, estimates, strict=True):
                    write_safetensors(_trunk(folder, clip.clip_id), {"latents": estimate})
    by_id = {guide.clip_id: run.path / "import" / guide.video for guide in guides}
    read = _Regions(family, config)
    for batch in _batches(others, config, f"generate: {settings.strategy}"):

        def vary(made: Sequence[ClipRow]) -> tuple[Tensor, Tensor]:
            starts = torch.stack([_guide(family, clip, folder, by_id, settings.strategy) for clip in made])
            return sample_variations(family, *_named(made), starts, settings, read.of(made, folder, by_id))

        _write_batch(family, batch, config, folder, vary)


def _picture_files(family: Family, config: Config, run: Run) -> Mapping[str, Path]:
    """Of each prompt, the picture that its clips go on from, or the video; none in text-to-video."""
    if not family.image_conditions:
        return {}
    if config.prompts:
        return prompt_pictures(config.prompts)
    folder = run.path / "import"
    return {row.prompt: folder / row.video for row in reversed(_imported(config, run))}


def _write_pictures(clips: Sequence[ClipRow], images: Mapping[str, Tensor], folder: Path) -> None:
    """Keep the picture of each clip, for the stages that encode it."""
    from PIL import Image

    for clip in clips:
        file = picture_file(folder / clip.video)
        if clip.prompt in images and not file.exists():
            content = io.BytesIO()
            Image.fromarray(images[clip.prompt].numpy()).save(content, "png")
            write_bytes(file, content.getvalue())


def _batches(clips: Sequence[ClipRow], config: Config, label: str) -> Iterable[Sequence[ClipRow]]:
    size = config.generate.batch_size
    batches = [clips[start : start + size] for start in range(0, len(clips), size)]
    return processes.share(batches, label)


def _named(clips: Sequence[ClipRow]) -> tuple[list[str], list[int]]:
    return [clip.prompt for clip in clips], [int(clip.seed or 0) for clip in clips]


def _trunk(folder: Path, clip_id: str) -> Path:
    return folder / "trunks" / f"{clip_id}.safetensors"


def _guide(family: Family, clip: ClipRow, folder: Path, imported: dict[str, Path], strategy: str) -> Tensor:
    """Latents that a clip begins as: a trunk's, another candidate's or those of an imported clip."""
    from safetensors.torch import load_file

    parent = clip.parent or clip.clip_id
    if parent in imported:
        return family.encode(read_clip(imported[parent])[None])[0].cpu()
    file = _trunk(folder, parent) if strategy == "branched" else folder / "latents" / f"{parent}.safetensors"
    return load_file(processes.seen(file))["latents"]


class _Regions:
    """What of a clip is made again; the reward model of repair is loaded once."""

    def __init__(self, family: Family, config: Config) -> None:
        self._size, self._config = _latent_size(family, config), config
        form = config.generate
        self._model = None
        if form.strategy == "repair":
            factors = family.latent_factors(form.num_frames, form.height, form.width)
            self._model = RewardModel.load(_reward_model(config), factors=factors)

    def of(self, clips: Sequence[ClipRow], folder: Path, imported: dict[str, Path]) -> Tensor | None:
        """Bool [N, F, H, W] in latent positions; None for all of the clip."""
        share = self._config.generate.share
        if self._config.generate.strategy == "corrupt":
            return torch.stack([corrupted_region(clip, self._size, share) for clip in clips])
        if self._model is None:
            return None
        parents = [str(clip.parent) for clip in clips]
        videos = [read_clip(imported.get(parent, folder / "videos" / f"{parent}.mp4")) for parent in parents]
        with torch.no_grad():
            scores = self._model(torch.stack(videos), [clip.prompt for clip in clips], self._config.grid).patches
        return torch.stack([worst_region(score.mean(0), self._size, share) for score in scores.cpu()])


def corrupted_region(clip: ClipRow, size: Sequence[int], share: float) -> Tensor:
    """The region of a corrupted clip, which follows from its seed."""
    return moving_region(size, share, int(clip.seed or 0))


def _write_batch(
    family: Family,
    clips: Sequence[ClipRow],
    config: Config,
    folder: Path,
    make: Callable[[Sequence[ClipRow]], tuple[Tensor, Tensor]],
) -> None:
    """Sample and write the clips of a batch, unless all of them exist."""
    if all((folder / str(file)).exists() for clip in clips for file in (clip.video, clip.latents)):
        return
    latents, videos = make(clips)
    layout = None if family.layout == "BCFHW" else {"layout": family.layout}
    for clip, latent, video in zip(clips, latents, videos, strict=True):
        write_safetensors(folder / str(clip.latents), {"latents": latent}, layout)
        write_clip(folder / clip.video, video, config.generate.fps, config.generate.crf)


def _corrupted_pairs(
    family: Family, clips: Sequence[ClipRow], guides: Sequence[ClipRow], config: Config
) -> list[PairRow]:
    """Every corrupted clip against the clip that it was made from."""
    size, share = _latent_size(family, config), config.generate.share
    by_id = {clip.clip_id: clip for clip in (*guides, *clips)}
    return [
        corrupted_pair(
            by_id[clip.parent], clip, covered_share(corrupted_region(clip, size, share), config.grid), config.grid
        )
        for clip in clips
        if clip.parent is not None
    ]
