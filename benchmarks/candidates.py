"""What do candidates cost? The demo trained on pairs of every strategy, read off against forward passes.

    python -m benchmarks.candidates runs/candidates --seeds 0 1 2

generates, pairs and trains for each strategy and seed. The reward of all is the demo's meter itself, so that nothing
hangs on the training of a reward model; the same meter reads the result. It prints a Markdown table of the forward
passes of the transformer, of generation and training together, after which 75% and 80% of the base's severity are gone
on held-out prompts. A training ends at the first reading beyond that. A killed benchmark continues; --only takes some
of the strategies.
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from halo_fast import registry
from halo_fast.agreement.arms import severity_mitigated
from halo_fast.data import CachedPairs, write_clip
from halo_fast.data.prompts import read_prompts
from halo_fast.demo import world
from halo_fast.demo.meters import DefectMeter, FidelityMeter
from halo_fast.families import Family, load
from halo_fast.families.sampling import clip_seed, sample_clips
from halo_fast.files import read_json, write_json
from halo_fast.pipeline.arguments import load_config
from halo_fast.pipeline.config import Config
from halo_fast.pipeline.run import Run
from halo_fast.pipeline.stages import STAGES
from halo_fast.rewards import RewardModel, RewardModelConfig
from halo_fast.train import fit

BACKWARD = 1.25  # of a forward pass, with a LoRA: docs/training.md, "What a step costs"
GOALS = 0.75, 0.8  # of the base's severity; a training ends at the last
# caps, which the demo's recipe has, would end a training before the last goal
UNBOUNDED: Mapping[str, Any] = {
    "preset": "halo_sft", "patch_sft_weight": 0.5, "patch_delta": 0.4, "video_weight": 0.05, "video_beta": 100.0,
    "patch_beta": 10.0, "patch_gamma": 0.0,
}  # fmt: skip

_SCORED = ("reward", "score", "pairs", "cache")


@dataclass(frozen=True)
class Arm:
    """A way to make pairs: settings of the demo's recipe that differ, and the stages that make pairs of it."""

    changes: Mapping[str, Any]
    stages: Sequence[str] = ("generate", *_SCORED)
    real: bool = False


_UNSCORED = {"annotate.teacher": "", "reward_model": ""}
_FEW = {"generate.num_prompts": 48}
# the first is what the others are compared with
ARMS = {
    "independent": Arm(_FEW),
    "branched": Arm(_FEW | {"generate.strategy": "branched"}),
    "guided": Arm(_FEW | {"generate.strategy": "guided"}),
    "repair of half": Arm(_FEW | {"generate.strategy": "repair", "generate.share": 0.5}),
    "corrupt 0.4, labels by region": Arm(
        _FEW | {"generate.strategy": "corrupt", "generate.share": 0.4} | _UNSCORED, ("generate", "pairs", "cache")
    ),
    "real clips against their corruption 0.4": Arm(
        {"generate.strategy": "corrupt", "generate.share": 0.4, "generate.num_videos_per_prompt": 1, "prompts": ""}
        | {"imports.generate": True, "generate.num_prompts": None}
        | _UNSCORED,
        ("import", "generate", "pairs", "cache"),
        real=True,
    ),
    "independent, 96 prompts": Arm({"generate.num_prompts": 96}),
    "independent, 192 prompts (the recipe)": Arm({}),
}


class Counter:
    """Forward passes of one clip by the transformer, whichever module it is; a backward pass counts `BACKWARD`."""

    def __init__(self) -> None:
        self.passes, self.paused = 0.0, False

    @contextmanager
    def counting(self) -> Iterator[None]:
        original = WanTransformer3DModel.forward

        def forward(model: Any, hidden_states: torch.Tensor, *given: Any, **named: Any) -> Any:
            if not self.paused:
                self.passes += len(hidden_states) * (1 + BACKWARD * torch.is_grad_enabled())
            return original(model, hidden_states, *given, **named)

        WanTransformer3DModel.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            WanTransformer3DModel.forward = original  # type: ignore[method-assign]

    @contextmanager
    def pausing(self) -> Iterator[None]:
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--num-prompts", type=int, default=24, help="held-out prompts that are measured")
    parser.add_argument(
        "--steps", type=int, nargs="*", default=[16, 24, 32, 40, 50, 60, 80, 100], help="of the readings"
    )
    parser.add_argument("--only", nargs="*", default=list(ARMS), help="some of the strategies")
    arguments = parser.parse_args()
    reward = arguments.folder / "reward"
    _write_reward(reward)
    prompts = read_prompts("demo:heldout", arguments.num_prompts, 0)
    measure = _measurement(prompts)
    for seed in arguments.seeds:
        for name in arguments.only:
            curve = _curve(name, seed, arguments.folder, reward, arguments.steps, measure)
            print(f"{name}, seed {seed}: {_readings(curve)}", flush=True)
    print(_table(arguments.folder, arguments.only, arguments.seeds))


class MeterReward(nn.Module):
    """A reward backbone that needs no training: the demo's meters, on the scale that its teacher answers on."""

    negatives = 1

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(1))
        self.defects, self.fidelity = DefectMeter.load(), FidelityMeter.load()

    def frozen_features(self, videos: Tensor) -> None:
        return None

    def fit_closed_form(self, frozen: Tensor | None, prompts: Sequence[str], weight: Tensor) -> None:
        return None

    def encode(self, videos: Tensor, frozen: Tensor | None, word_evidence: Tensor | None = None) -> Tensor:
        return videos

    def logits(self, features: Tensor, prompts: Sequence[str], grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        severity = self.defects(features, list(prompts))[0]
        shown = self.fidelity(features, list(prompts))
        video = [1 - severity.flatten(1).mean(1), (shown["digit"] + shown["colour"]) / 2, shown["motion"]]
        return torch.stack(video, 1).logit(1e-4), (1 - severity)[:, None].logit(1e-4)

    def video_logits_for(self, features: Tensor, prompts: Sequence[str], others: Tensor) -> Tensor:
        raise NotImplementedError("the meters are not trained here")


def _write_reward(folder: Path) -> None:
    """Write the meters as a reward model, for the stages that read one."""
    names = ("visual_quality", "text_alignment", "dynamic_degree")
    RewardModel(RewardModelConfig(names, backbone="benchmarks.candidates:MeterReward")).save(folder)


def run_stages(run: Run, stages: Iterable[str]) -> None:
    """Run some stages of a run, or of one of its rounds."""
    for stage in stages:
        registry.load(STAGES[stage].target)(run.config, run)


def _measurement(prompts: Sequence[str]) -> Callable[[Family, Config], float]:
    """Mean severity of a model's clips of held-out prompts, from the same noise each time; it counts no passes."""
    meter, seeds = DefectMeter.load(), [clip_seed(0, index, -1) for index in range(len(prompts))]

    @torch.no_grad()
    def measure(family: Family, config: Config) -> float:
        _, videos = sample_clips(family, prompts, seeds, config.generate)
        return float(meter(videos, list(prompts))[0].mean())

    return measure


def _curve(
    name: str, seed: int, folder: Path, reward: Path, steps: Sequence[int], measure: Callable[[Family, Config], float]
) -> dict[str, Any]:
    """Passes of generation and training, and the share of severity that is gone, at each of some steps."""
    arm, place = ARMS[name], _place(folder, name, seed)
    known = read_json(place / "curve.json")
    if known:
        return known
    changes = {
        "output_dir": str(place), "seed": seed, "reward_model": str(reward), "train.max_train_steps": max(steps),
        "train.objective": UNBOUNDED, "train.lr_scheduler": "constant",
    }  # fmt: skip
    if arm.real:
        changes["imports.sources"] = [str(_real_clips(folder, seed))]
    config = load_config("demo", {**changes, **arm.changes})
    counter, curve = Counter(), {"steps": [], "passes": [], "mitigated": []}
    with counter.counting():
        if not (place / "generation.json").exists():
            shutil.rmtree(place, ignore_errors=True)  # of a killed generation not all passes were counted
        run = Run(config)
        run_stages(run, arm.stages)
        if not (place / "generation.json").exists():
            write_json(place / "generation.json", {"passes": counter.passes})
        counter.passes = curve["generation"] = float((read_json(place / "generation.json") or {})["passes"])
        family = load(config.pretrained_model_name_or_path, device="cpu")
        pairs = CachedPairs(run.require("pairs/pairs.parquet"), run.require("cache"))
        with counter.pausing():
            base, clean = measure(family, config), float(DefectMeter.load()(*world.clean_clips(64, 0))[0].mean())

        def read_between(iterable: Iterable[int], total: int, label: str) -> Iterator[int]:
            for done in iterable:
                if label == "train" and done in steps and read(done):
                    return
                yield done
            if label == "train":
                read(max(steps))

        def read(done: int) -> bool:
            """Note passes and severity, and whether the goal is reached."""
            with counter.pausing():
                share = severity_mitigated(base, measure(family, config), clean)
            for key, value in (("steps", done), ("passes", counter.passes), ("mitigated", share)):
                curve[key].append(value)
            print(f"{place.name}: step {done}, {counter.passes:.0f} passes, {100 * share:.0f}%", file=sys.stderr)
            return share >= GOALS[-1]

        fit(family, pairs, replace(config.train, seed=seed), progress=read_between)
    curve["pairs"] = len(pairs)
    write_json(place / "curve.json", curve)
    return curve


def _place(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(',', '').replace(' ', '_')}_{seed}"


def _real_clips(folder: Path, seed: int, count: int = 48) -> Path:
    """Flawless clips of training prompts with their captions beside them."""
    place = folder / f"real_{seed}"
    videos, captions = world.clean_clips(count, 500 + seed, split="train")
    for index, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        write_clip(place / f"{index:03d}.mp4", video, 8)
        (place / f"{index:03d}.txt").write_text(caption)
    return place


def passes_to(goal: float, curve: Mapping[str, Any]) -> float | None:
    """Passes at which a goal is reached, on the straight line between two readings; None if it is not."""
    before = (curve["generation"], 0.0)
    for point in zip(curve["passes"], curve["mitigated"], strict=True):
        if point[1] >= goal:
            return before[0] + (point[0] - before[0]) * (goal - before[1]) / (point[1] - before[1])
        before = point
    return None


def _readings(curve: Mapping[str, Any]) -> str:
    points = zip(curve["steps"], curve["passes"], curve["mitigated"], strict=True)
    return f"{curve['generation']:.0f} passes; " + ", ".join(
        f"step {step} {passes:.0f} {100 * share:.0f}%" for step, passes, share in points
    )


def _table(folder: Path, names: Sequence[str], seeds: Sequence[int]) -> str:
    """The table of all arms; the first one is what the others are compared with, seed by seed."""
    places = {name: [folder / f"{name.replace(',', '').replace(' ', '_')}_{seed}" for seed in seeds] for name in names}
    curves = {name: [read_json(place / "curve.json") or {} for place in places[name]] for name in names}
    goals = " | ".join(f"to {100 * goal:.0f}%, by seed | of the first row" for goal in GOALS)
    lines = [
        f"| candidates | generation | {goals} | mitigated at most, by seed |",
        "|---|---|" + "---|---|" * 2 + "---|",
    ]
    for name, found in curves.items():
        cells = [name, f"{statistics.mean(curve['generation'] for curve in found):,.0f}"]
        for goal in GOALS:
            reached, first = ([passes_to(goal, curve) for curve in one] for one in (found, curves[names[0]]))
            ratios = [a / b for a, b in zip(reached, first, strict=True) if a and b]
            cells.append(", ".join("not reached" if one is None else f"{one:,.0f}" for one in reached))
            cells.append(f"{statistics.mean(ratios):.2f}" if len(ratios) == len(found) else "")
        cells.append(", ".join(f"{100 * max(curve['mitigated']):.0f}" for curve in found))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
