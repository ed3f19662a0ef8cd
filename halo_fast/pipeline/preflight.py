"""Checks of a config before hours of work: missing settings, objective, prompts, teacher and meter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING

from halo_fast import registry
from halo_fast.errors import UserError
from halo_fast.pipeline.clips import run_stages
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import STAGES

if TYPE_CHECKING:
    from halo_fast.teachers import Teacher

__all__ = ["check_budget", "check_required", "check_run"]

# setting: kind of its registered names, what else it takes
_GIVE = {
    "pretrained_model_name_or_path": ("model", "a diffusers folder or a hub name"),
    "prompts": ("prompts", "a text file with one prompt a line"),
    "evaluation_prompts": ("prompts", "a text file with one held-out prompt a line"),
    "annotate.teacher": ("teacher", 'a teacher, such as "human:NAME"'),
}


def check_required(config: Config, stages: Iterable[str]) -> None:
    """Raise unless every setting is given that these stages need and that has no default, and the objective exists.

    Raises:
        UserError: names the setting, what to give and the registered names.
    """
    stages = list(stages)
    required = dict.fromkeys(name for stage in stages for name in STAGES[stage].required)
    if config.imports.sources:
        # generate takes the prompts of the imported clips
        required.pop("prompts", None)
    for setting in required:
        if not reduce(getattr, setting.split("."), config):
            from halo_fast import teachers  # noqa: F401  registers its names

            kind, what = _GIVE[setting]
            names = ", ".join(registry.known(kind))
            raise UserError(f"{setting}: required; give {what}, or one of {names}")
    if "reward" in stages and not config.reward_model:
        from halo_fast.rewards.model import check_backbone
        from halo_fast.train.optimizers import check_optimizer

        check_backbone(config.reward)
        check_optimizer(config.reward.optimizer, "reward.optimizer")
    if "train" in stages:
        from halo_fast.families.quantization import check_quantization
        from halo_fast.train.block_offload import check_offload
        from halo_fast.train.optimizers import check_optimizer
        from halo_fast.train.setting_checks import check_trackers, checked_objective

        check_quantization(config.quantization)
        check_optimizer(config.train.optimizer)
        check_offload(config.train, config.quantization)
        checked_objective(config.train)
        check_trackers(config.train.report_to)


def check_run(config: Config, run: Run) -> None:
    """Raise the mistakes that only a late stage or round of `halo run` would meet; list prompts that are cut or shared.

    Args:
        config: of the run.
        run: its directory; what is annotated already needs no teacher any more, and no key.

    Raises:
        UserError: a missing setting, an objective or tracker that training would refuse, unreadable prompts, a budget
            that the teacher's questions exceed, an unknown backbone, examples, teacher or meter, or one that cannot
            read such clips.
    """
    stages = run_stages(config, list(STAGES))
    check_required(config, stages)
    _check_rounds(config, stages)
    # Imported late: they load torch, and a missing setting is reported faster without it.
    from halo_fast.data.prompts import read_prompts
    from halo_fast.pipeline.judging import check_judges
    from halo_fast.pipeline.stages.annotate import load_teacher
    from halo_fast.pipeline.stages.evaluate import evaluation_meter, evaluation_prompts
    from halo_fast.pipeline.stages.generate import varies_imports, warn_of_prompts
    from halo_fast.teachers import LabelStore

    varies_imports(config)
    if config.reward.examples:
        registry.resolve("reward examples", config.reward.examples, "reward.examples")
    own = "generate" in stages and config.prompts
    prompts = read_prompts(config.prompts, config.generate.num_prompts, config.seed) if own else []
    if "evaluate" in stages:
        evaluation_meter(config, evaluation_prompts(config), run.path / "reward")
        check_judges(config)
    if "annotate" in stages and not (run.path / "annotate" / "manifest.json").exists():
        kept = run.root / "labels.sqlite"
        with LabelStore(kept if kept.exists() else Path(":memory:")) as store:
            teacher = load_teacher(config, store, prompts=prompts)
            check_budget(config, teacher, prompts)
    warn_of_prompts(prompts, config)


def _check_rounds(config: Config, stages: Sequence[str]) -> None:
    """Raise unless a later round has prompts and rewards."""
    if config.rounds == 1:
        return
    if "reward" not in stages:
        raise UserError(
            f"rounds: later ones need rewards for their candidates, and this run has none, got {config.rounds}; name a "
            "teacher or a reward_model, or set 1"
        )
    if not config.prompts:
        raise UserError(
            f"prompts: required by rounds {config.rounds}, because later rounds import nothing; give a text file with "
            "one prompt a line"
        )


def check_budget(config: Config, teacher: Teacher, prompts: Sequence[str], *, needs_key: bool = True) -> None:
    """Raise if a paid teacher lacks its key, or a budget for the clips that this config makes; their size is known."""
    import torch

    from halo_fast.teachers import Clip, Judge
    from halo_fast.teachers.base import Paid

    if not isinstance(teacher, Paid):
        return
    if not prompts:  # how many clips an import gives is known after it
        teacher.check_budget([])
        return
    settings = config.generate
    size = (settings.num_frames, settings.height, settings.width, 3)
    typical = sorted(prompts, key=len)[len(prompts) // 2]
    clip = Clip("", typical, lambda: torch.zeros(size, dtype=torch.uint8))
    made, count = len(prompts) * settings.num_videos_per_prompt, config.annotate.num_clips
    clips = min(made, count or made)
    # of the candidates of a prompt, those are compared that were drawn: about this share of all pairs
    share = (clips / made) ** 2
    pairs = round(share * len(prompts) * comb(settings.num_videos_per_prompt, 2)) if isinstance(teacher, Judge) else 0
    # an estimate alone, where the teacher gives one
    check = teacher.check_budget if needs_key else getattr(teacher, "estimate", teacher.check_budget)
    check([clip] * clips, [(clip, clip)] * pairs)
