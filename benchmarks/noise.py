"""Which noise should a preference train on? Steps and reference passes to equal mitigation, way by way.

    python -m benchmarks.noise runs/demo runs/noise --seeds 0 1 2 3 4

takes the reward model of a finished run of the demo, makes pairs as its recipe does, and trains on them with each way
of drawing noise, without the caps that would end a training before the goal. Each training is read at several steps on
held-out prompts, with the same noise for all. It prints a Markdown table: steps and forward passes of the transformer
until 80% of the base's severity is gone, a backward pass counting 1.25, and what is gone at most. Between two readings
both are interpolated. A killed benchmark continues; --only takes some of the ways, and --base the demo's other model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from benchmarks.candidates import BACKWARD, UNBOUNDED, passes_to
from benchmarks.trade import Setting, demo_config, parse_arguments, read_training
from halo_fast.data import Pair
from halo_fast.data.pairs import heldout_mask
from halo_fast.families.sampling import clip_noise
from halo_fast.files import read_table
from halo_fast.pipeline.config import Config
from halo_fast.train import draws

GOAL = 0.8  # of the base's severity

Keep = Callable[[Pair, int], bool]
"""Whether a clip of a pair, 0 or 1, has its own noise."""


@dataclass(frozen=True)
class Way:
    """A way of drawing noise: settings of training, and which clips have the noise that made them."""

    train: Mapping[str, Any] = field(default_factory=dict)
    own: Keep | None = None


def _every(pair: Pair, clip: int) -> bool:
    return True


def _half_of_pairs(pair: Pair, clip: int) -> bool:
    assert pair.seeds is not None
    return pair.seeds[0] % 2 == 0


def _losers(pair: Pair, clip: int) -> bool:
    return bool(pair.video_rewards[clip] < pair.video_rewards[1 - clip])


# the first is the default
WAYS = {
    "shared, 4 draws": Way(),
    "shared, 1 draw": Way({"reference_draws": 1}),
    "own": Way({"noise": "own"}, _every),
    "own for half of the pairs": Way({"noise": "own"}, _half_of_pairs),
    "own for losers": Way({"noise": "own"}, _losers),
}


def main() -> None:
    arguments = parse_arguments(__doc__, WAYS)
    base = demo_config(arguments, diagnostics_steps=0)
    lines = list(_HEAD)
    for name in arguments.only:
        rows = []
        for seed in arguments.seeds:
            with patch.object(draws, "_own_noise", _drawing(WAYS[name].own or _every)):
                setting = Setting(UNBOUNDED, {"lr_scheduler": "constant", **WAYS[name].train})
                readings = read_training(name, setting, seed, base, arguments.folder)
            passes = _passes_of_a_step(base), _reference_passes(base, WAYS[name], arguments.folder, seed)
            rows.append((readings, passes))
            print(_line(f"{name}, seed {seed}", rows[-1:]), flush=True)
        lines.append(_line(name, rows))
    print("\n".join(lines))


def _drawing(own: Keep) -> Callable[[Sequence[Pair], Tensor], Tensor]:
    """Noise of all samples, [2B, *latent_shape]: own noise of these clips, what the pair shares for the others."""

    def drawn(pairs: Sequence[Pair], shared: Tensor) -> Tensor:
        noise = shared.repeat(2, *[1] * (shared.ndim - 1))
        for index, pair in enumerate(pairs):
            for clip, seed in enumerate(pair.seeds or ()):
                if own(pair, clip):
                    noise[clip * len(pairs) + index] = clip_noise(shared.shape[1:], seed)
        return noise

    return drawn


def _passes_of_a_step(base: Config) -> float:
    """Forward passes that a step is worth."""
    return 2 * base.train.train_batch_size * (1 + BACKWARD)


def _reference_passes(base: Config, way: Way, folder: Path, seed: int) -> int:
    """Forward passes of the reference before training."""
    table = read_table(folder / f"prepared_{seed}" / "pairs" / "pairs.parquet")
    kept_out = heldout_mask(table["prompt"].to_pylist(), base.train.heldout_share)
    return 2 * kept_out.count(False) * int(way.train.get("reference_draws", base.train.reference_draws))


_HEAD = [
    "| noise | passes before training | steps to 80%, by seed | passes to 80%, by seed | mitigated at most, by seed |",
    "|---|---|---|---|---|",
]
_AXES = ("passes", "step"), ("mitigated", "mitigated")
Read = tuple[Sequence[Mapping[str, float]], tuple[float, int]]
"""Readings of a training, forward passes of a step, and those before the first."""


def _line(name: str, rows: Sequence[Read]) -> str:
    """A row of the table from the trainings of all seeds."""
    steps = [
        passes_to(GOAL, {"generation": 0} | {of: [one[key] for one in readings] for of, key in _AXES})
        for readings, _ in rows
    ]
    passes = [
        None if step is None else before + step * each for step, (_, (each, before)) in zip(steps, rows, strict=True)
    ]
    before = [f"{count:,}" for count in sorted({before for _, (_, before) in rows})]
    most = [f"{100 * max(reading['mitigated'] for reading in readings):.0f}" for readings, _ in rows]
    cells = [name, " to ".join(dict.fromkeys((before[0], before[-1]))), *map(_listed, (steps, passes)), ", ".join(most)]
    return f"| {' | '.join(cells)} |"


def _listed(figures: Sequence[float | None]) -> str:
    return ", ".join("not reached" if figure is None else f"{figure:,.0f}" for figure in figures)


if __name__ == "__main__":
    main()
