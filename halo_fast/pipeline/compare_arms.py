"""The ways to align that `halo compare` compares, and the settings that each of them may choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from halo_fast.loss.objectives import build
from halo_fast.loss.objectives.pooled import PooledDPO
from halo_fast.train.config import TrainConfig

__all__ = ["ARMS", "BASE", "BEST", "Arm", "Choice", "arm_training", "told_choice"]

Choice = Mapping[str, float | str]
"""What a setting changes: a number multiplies the value of the arm, a word replaces it."""


@dataclass(frozen=True)
class Arm:
    """A way to align.

    Args:
        objective: a preset and what differs from it. Betas, gammas, deltas and the weights of video and patches are the
            recipe's where nothing is said here.
        choices: the settings that are tried of it, by the names of fields of the objective or of training.
        rounds: how often it makes candidates and trains.
        chosen_as: the arm whose chosen setting it takes; its own if empty.
    """

    objective: Mapping[str, Any]
    choices: Sequence[Choice] = ()
    rounds: int = 1
    chosen_as: str = ""


def _grid(values: Mapping[tuple[str, ...], Sequence[float | str]]) -> list[Choice]:
    """Every combination; names that share a key share their value."""
    return [
        {name: value for names, value in zip(values, chosen, strict=True) for name in names}
        for chosen in product(*values.values())
    ]


_RATE, _BETAS = ("learning_rate",), ("video_beta", "patch_beta")
_SUPERVISED = _grid({_RATE: (0.5, 1, 2, 4), ("lr_scheduler",): ("constant", "cosine")})
_PREFERRED = _grid({_RATE: (0.5, 1), _BETAS: (0.3, 1, 3, 10)})
# around what was best of each in the comparison before; they multiply betas, of 10 there
_VIDEO = _grid({_RATE: (1, 2), _BETAS: (30, 100, 300, 1000)})
_DENSE = _grid({_RATE: (0.25, 0.5), _BETAS: (3, 10, 30, 100)})
_LOCAL = _grid({_RATE: (0.25, 0.5), _BETAS: (0.3, 1, 3, 10)})
_BOTH = _grid({_RATE: (1, 2), ("patch_beta",): (1, 3), ("patch_sft_weight",): (1, 2)})
_BOUNDED = _grid({_RATE: (0.5, 1, 2, 4), ("video_weight",): (0.05, 1)})
_WEIGHTS = ("video_weight", "patch_weight", "sft_weight", "patch_sft_weight")
_OF_THE_RECIPE = ("video_beta", "patch_beta", "video_gamma", "patch_gamma", "video_delta", "patch_delta")


def _only(weight: str) -> dict[str, Any]:
    """The objective with this weight alone."""
    return {"preset": "halo"} | {name: float(name == weight) for name in _WEIGHTS}


BASE, BEST = "base", "HALO, bounded"
ARMS: dict[str, Arm] = {
    "SFT, winning clips": Arm(_only("sft_weight"), _SUPERVISED),
    "SFT, winning patches": Arm(_only("patch_sft_weight"), _SUPERVISED),
    "video DPO": Arm(_only("video_weight"), _VIDEO),
    "DenseDPO": Arm({"preset": "dense_dpo", "video_weight": 0.0}, _DENSE),
    "Local-DPO": Arm({"preset": "local_dpo", "video_weight": 1.0}, _LOCAL),
    "patch DPO": Arm(_only("patch_weight"), _PREFERRED),
    "HALO": Arm({"preset": "halo"}, _PREFERRED),
    "HALO + patch SFT": Arm({"preset": "halo_sft"}, _BOTH),
    BEST: Arm({"preset": "halo_bounded"}, _BOUNDED),
    f"{BEST}, two rounds": Arm({"preset": "halo_bounded"}, rounds=2, chosen_as=BEST),
}


def arm_training(arm: Arm, recipe: TrainConfig, choice: Choice, seed: int) -> TrainConfig:
    """The training of an arm with a chosen setting.

    Args:
        arm: a way to align.
        recipe: its settings hold where the arm says nothing.
        choice: one of the arm's; empty for the arm as it is.
        seed: of the training.
    """
    own = build(recipe.objective)
    kept = {name: getattr(own, name) for name in _OF_THE_RECIPE if hasattr(own, name)}
    # a weight of 0 makes the recipe an arm of its own, and is not passed on to others
    kept |= {name: getattr(own, name) for name in _WEIGHTS[:2] if getattr(own, name, 0)}
    spec = kept | dict(arm.objective)
    if isinstance(build(spec), PooledDPO):
        spec["patch_beta"] = build(spec).video_beta  # its logit of patches is a mean over the video, as the video's is
    objective = build(spec)
    training: dict[str, Any] = {}
    in_training = {field.name for field in fields(TrainConfig)}
    for name, value in choice.items():
        where, old = (training, getattr(recipe, name)) if name in in_training else (spec, getattr(objective, name))
        if name == "patch_beta" and old is None:
            old = objective.video_beta  # which stands in for it
        where[name] = value if isinstance(value, str) else value * old
    # what becomes of a training is measured, so none is stopped on suspicion
    return replace(recipe, objective=spec, seed=seed, loss_spike_factor=None, **training)


def told_choice(choice: Choice) -> str:
    """A setting in words: "learning_rate x 0.5, lr_scheduler cosine"."""
    return ", ".join(
        f"{name} {value}" if isinstance(value, str) else f"{name} x {value:g}" for name, value in choice.items()
    )
