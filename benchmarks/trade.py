"""What does a bounded preference cost? The error on winning patches against what is mitigated, setting by setting.

    python -m benchmarks.trade runs/demo runs/trade --seeds 0

takes the reward model of a finished run of the demo, makes pairs as its recipe does, and trains on them with each
setting. Most settings start from `halo_sft`, which bounds nothing and was the demo's objective before. Every training
is read at several steps on held-out prompts, with the same noise for all. Each reading says how much of the base's
severity is gone, how much further off the policy's prediction is than the base's on winning patches of held-out pairs,
and what clips still show of their prompts. A setting of two rounds makes new candidates with the aligned model and
trains on; the reward model stays. It prints a Markdown table, with the readings of each training in order. A killed
benchmark continues; --only takes some of the settings, and --base the demo's other model.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.candidates import UNBOUNDED, run_stages
from halo_fast.agreement.arms import severity_mitigated
from halo_fast.agreement.meters import read_meter
from halo_fast.data import CachedPairs
from halo_fast.data.pairs import heldout_mask
from halo_fast.data.prompts import read_prompts
from halo_fast.demo import BASES
from halo_fast.export.lora import export_lora
from halo_fast.families import load
from halo_fast.families.sampling import clip_seed, sample_clips
from halo_fast.files import read_checkpoint, read_json, write_json
from halo_fast.loss.objectives import build
from halo_fast.pipeline.arguments import load_config
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages.evaluate import evaluation_meter
from halo_fast.train.config import TrainConfig, deciding_settings
from halo_fast.train.observers.diagnostics import heldout_errors, heldout_figures, summarize

_PAIRS = ("generate", "reward", "score", "pairs", "cache")


@dataclass(frozen=True)
class Setting:
    """What differs from the demo's recipe: the whole objective or none, other settings of training, and the rounds."""

    objective: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 1


_CONSTANT, _COSINE = {"lr_scheduler": "constant"}, {"lr_scheduler": "cosine"}
_CAPS = {"video_cap": 1.5, "patch_cap": 1.5}
_BOUNDED = {**UNBOUNDED, **_CAPS, "patch_sft_weight": 1.0}
_VIDEO = {**_BOUNDED, "video_weight": 1.0, "video_beta": 10.0}
SETTINGS = {
    "the recipe": Setting(),
    "the recipe, two rounds": Setting(rounds=2),
    "unbounded": Setting(UNBOUNDED, _CONSTANT),
    "cosine": Setting(UNBOUNDED, _COSINE),
    "caps 1.5": Setting({**UNBOUNDED, **_CAPS}, _CONSTANT),
    "caps 1.5, cosine": Setting({**UNBOUNDED, **_CAPS}, _COSINE),
    "caps 0.75, cosine": Setting({**UNBOUNDED, "video_cap": 0.75, "patch_cap": 0.75}, _COSINE),
    "supervised 1, cosine": Setting({**UNBOUNDED, "patch_sft_weight": 1.0}, _COSINE),
    "caps 1.5, supervised 1, cosine": Setting(_BOUNDED, _COSINE),
    "caps 1.5, supervised 2, cosine": Setting({**_BOUNDED, "patch_sft_weight": 2.0}, _COSINE),
    "caps 1.5, patch beta 20, cosine": Setting({**UNBOUNDED, **_CAPS, "patch_beta": 20.0}, _COSINE),
    "loser guard, cosine": Setting({**UNBOUNDED, "loser_guard": "patch"}, _COSINE),
    "own noise, cosine": Setting(UNBOUNDED, {**_COSINE, "noise": "own"}),
    "caps 1.5, supervised 1, cosine, two rounds, the base as reference": Setting(_BOUNDED, _COSINE, rounds=2),
    "caps 1.5, supervised 1, cosine, two rounds, their start as reference": Setting(
        _BOUNDED, {**_COSINE, "reference": "start"}, rounds=2
    ),
    "bounded, video weight 1, video beta 10": Setting(_VIDEO, _COSINE),
    "bounded, video weight 1, video beta 10, video cap 0.5": Setting({**_VIDEO, "video_cap": 0.5}, _COSINE),
    "bounded, video weight 1, video beta 10, winning videos 0.1": Setting({**_VIDEO, "sft_weight": 0.1}, _COSINE),
    "bounded, video weight 1, video beta 10, supervised 2": Setting({**_VIDEO, "patch_sft_weight": 2.0}, _COSINE),
    "bounded, video weight 1, video beta 10, video cap 0.5, two rounds": Setting(
        {**_VIDEO, "video_cap": 0.5}, _COSINE, rounds=2
    ),
}


def main() -> None:
    arguments = parse_arguments(__doc__, SETTINGS)
    base = demo_config(arguments, diagnostics_steps=arguments.every)
    rows = {}
    for name in arguments.only:
        for seed in arguments.seeds:
            rows[name, seed] = read_training(name, SETTINGS[name], seed, base, arguments.folder)
            print(_line([rows[name, seed]], f"{name}, seed {seed}"), flush=True)
    print(
        "\n".join([*_HEAD, *(_line([rows[name, seed] for seed in arguments.seeds], name) for name in arguments.only)])
    )


def parse_arguments(description: str | None, names: Collection[str]) -> argparse.Namespace:
    """Command line of a benchmark that trains the demo in several ways."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("run", type=Path, help="a run of the demo with this base, whose reward model is trained")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", choices=BASES, default=BASES[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--num-prompts", type=int, default=64, help="held-out prompts that are measured")
    parser.add_argument("--steps", type=int, default=120, help="of each training")
    parser.add_argument("--every", type=int, default=40, help="steps between two readings")
    parser.add_argument("--only", nargs="*", choices=list(names), default=list(names), help="some of the rows")
    return parser.parse_args()


def demo_config(arguments: argparse.Namespace, diagnostics_steps: int) -> Config:
    """The demo's recipe with what the command line says, and the reward model of the run."""
    return load_config(
        "demo",
        {
            "pretrained_model_name_or_path": f"demo:{arguments.base}",
            "reward_model": str(arguments.run / "reward"),
            "train.max_train_steps": arguments.steps,
            "train.checkpointing_steps": arguments.every,
            "train.diagnostics_steps": diagnostics_steps,
            "evaluate.num_prompts": arguments.num_prompts,
        },
    )


def read_training(name: str, setting: Setting, seed: int, base: Config, folder: Path) -> list[dict[str, float]]:
    """A dict for each reading of a training, in order; those of an earlier call are kept.

    Args:
        name: of the setting; its folder bears it.
        setting: what differs from the base.
        seed: of candidates and training.
        base: the recipe, with a trained reward model.
        folder: of the benchmark.

    Raises:
        SystemExit: those of an earlier call were made with other settings.
    """
    place = folder / f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"
    made = conditions(setting, seed, base)
    known = read_json(place / "readings.json")
    if known:
        before = known.get("made", {})  # which older readings do not say
        others = [name for name, value in made.items() if before.get(name) != value]
        if others:
            raise SystemExit(f"{place}: was read with other settings ({', '.join(others)}); choose another folder")
        return list(known["readings"])
    prepared = folder / f"prepared_{seed}"
    run_stages(Run(replace(base, output_dir=str(prepared), seed=seed)), _PAIRS)
    if not place.exists():
        shutil.copytree(prepared, place)
    config = replace(
        base, output_dir=str(place), seed=seed, rounds=setting.rounds, train=training(setting, base.train, seed)
    )
    gauge, readings = _Gauge(config, Run(config)), []
    for number in range(1, setting.rounds + 1):
        run = Run(config, number=number)
        run_stages(run, (*_PAIRS, "train"))
        gauge.family.unload_lora()
        for checkpoint in sorted((run.path / "train" / "checkpoints").glob("*.safetensors")):
            tensors, state = read_checkpoint(checkpoint)
            weights = {
                key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")
            }
            readings.append({"round": number, "step": state["step"], **gauge.read(weights)})
    write_json(place / "readings.json", {"made": made, "readings": readings})
    return readings


def training(setting: Setting, recipe: TrainConfig, seed: int) -> TrainConfig:
    """The recipe's training with what a setting says."""
    return replace(recipe, seed=seed, objective=dict(setting.objective) or recipe.objective, **setting.train)


def conditions(setting: Setting, seed: int, base: Config) -> dict[str, Any]:
    """What readings depend on, as a file holds it."""
    return {
        "base": base.pretrained_model_name_or_path, "reward_model": base.reward_model, "rounds": setting.rounds,
        "num_prompts": base.evaluate.num_prompts, "every": base.train.checkpointing_steps,
        "train": json.loads(
            json.dumps(deciding_settings(training(setting, base.train, seed), started=setting.rounds > 1))
        ),
    }  # fmt: skip


class _Gauge:
    """Readings of a policy against the base, on held-out prompts and on held-out pairs of the first round."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config, self.family = config, load(config.pretrained_model_name_or_path, device="cpu")
        self.prompts = read_prompts(config.evaluation_prompts, config.evaluate.num_prompts, 0)
        self.meter = evaluation_meter(config, self.prompts, run.require("reward/model.safetensors").parent)
        pairs = CachedPairs(run.require("pairs/pairs.parquet"), run.require("cache"))
        self.pairs = pairs.where(heldout_mask(pairs.prompts, config.train.heldout_share))
        self.settings = replace(config.train, heldout_pairs=len(self.pairs))
        self.errors = heldout_errors(
            self.family, self.family.transformer, self.pairs, self.settings, torch.device("cpu")
        )
        self.base = self._clips()

    def read(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Of a policy with this LoRA."""
        self.family.load_lora(export_lora(self.family, weights, self.config.train))
        try:
            objective = build(self.settings.objective)
            figures = heldout_figures(
                self.family, self.family.transformer, self.pairs, self.errors, self.settings, objective
            )
            rows = {row["label"]: row for row in summarize(figures, 0, "heldout") if row["group"] == "all"}
            found, patch = self._clips(), rows["patch"]
        finally:
            self.family.unload_lora()
        return {
            "mitigated": severity_mitigated(self.base["severity"], found["severity"], self.meter.clean),
            "rise": float(patch["winner_policy"]) / float(patch["winner_reference"]) - 1,
            "loser_rise": float(patch["loser_policy"]) / float(patch["loser_reference"]) - 1,
            "accuracy": float(patch["accuracy"]),
            "fidelity": found["fidelity"],
            "base_fidelity": self.base["fidelity"],
            "motion": found["motion_amount"] / self.base["motion_amount"],
        }

    @torch.no_grad()
    def _clips(self) -> dict[str, float]:
        """Mean readings of the family's clips of held-out prompts, from the same noise each time."""
        config, parts = self.config, []
        for start in range(0, len(self.prompts), config.generate.batch_size):
            batch = self.prompts[start : start + config.generate.batch_size]
            seeds = [clip_seed(0, start + index, -1) for index in range(len(batch))]
            _, videos = sample_clips(self.family, batch, seeds, config.generate)
            found = read_meter(self.meter, videos, batch, config.grid)
            right = torch.stack([value for key, value in found.items() if key.endswith("_correct")]).amin(0)
            parts.append(
                {
                    "severity": found["severity"].flatten(1).mean(1),
                    "fidelity": right,
                    "motion_amount": found["motion_amount"],
                }
            )
        return {key: float(torch.cat([part[key] for part in parts]).mean()) for key in parts[0]}


_HEAD = ["| setting | mitigated | winners' error | fidelity | motion ratio at the end |", "|---|---|---|---|---|"]


def _line(seeds: Sequence[Sequence[Mapping[str, float]]], name: str) -> str:
    """A row of the table: means over seeds of each reading, rounds apart by semicolons."""
    means = [{key: statistics.mean(one[key] for one in same) for key in same[0]} for same in zip(*seeds, strict=True)]

    def cell(key: str, form: str) -> str:
        rounds = groupby(means, key=lambda reading: reading["round"])
        return "; ".join(", ".join(format(reading[key], form) for reading in group) for _, group in rounds)

    percent = [cell(key, form).replace("%", "") for key, form in (("mitigated", ".0%"), ("fidelity", ".0%"))]
    return f"| {name} | {percent[0]} | {cell('rise', '+.0%')} | {percent[1]} | {means[-1]['motion']:.2f} |"


if __name__ == "__main__":
    main()
