"""Checks of a config before hours of work: missing settings, objective, prompts, teacher and meter."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from pathlib import Path

from halo_fast import registry
from halo_fast.errors import UserError
from halo_fast.pipeline.clips import run_stages
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import STAGES

__all__ = ["check_required", "check_run"]

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
    if "train" in stages:
        from halo_fast.train.setting_checks import check_trackers, checked_objective

        checked_objective(config.train)
        check_trackers(config.train.report_to)


def check_run(config: Config, run: Run) -> None:
    """Raise the mistakes that only a late stage of `halo run` would meet.

    Args:
        config: of the run.
        run: its directory; what is annotated already needs no teacher any more, and no key.

    Raises:
        UserError: a missing setting, an objective or tracker that training would refuse, unreadable prompts, an unknown
            backbone, examples, teacher or meter, or one that cannot read such clips.
    """
    stages = run_stages(config, list(STAGES))
    check_required(config, stages)
    # Imported late: they load torch, and a missing setting is reported faster without it.
    from halo_fast.data.prompts import read_prompts
    from halo_fast.pipeline.stages.annotate import load_teacher
    from halo_fast.pipeline.stages.evaluate import evaluation_meter, evaluation_prompts
    from halo_fast.rewards.model import check_backbone
    from halo_fast.teachers import LabelStore

    check_backbone(config.reward.backbone)
    if config.reward.examples:
        registry.resolve("reward examples", config.reward.examples, "reward.examples")
    own = "generate" in stages and config.prompts
    prompts = read_prompts(config.prompts, config.generate.num_prompts, config.seed) if own else []
    evaluation_meter(config, evaluation_prompts(config), run.path / "reward")
    if "annotate" in stages and not (run.path / "annotate" / "manifest.json").exists():
        with LabelStore(Path(":memory:")) as store:
            load_teacher(config, store, prompts=prompts)
