"""Everything that is counted of an evaluation, from its typed rows: as figures, as JSON and as tables of text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halo_fast.agreement.arms import DEFECTIVE, arm_columns
from halo_fast.agreement.consistency import distance, diversity, quantiles, reward_consistency
from halo_fast.agreement.defects import defect_rates, defect_sizes, lost_patches
from halo_fast.agreement.figures import Figure
from halo_fast.agreement.paired import Paired, Wins, count_wins, paired_mean, ratio, read_in_both
from halo_fast.data.summary import Section
from halo_fast.data.tables import EvaluatedRow

__all__ = [
    *("Analysis", "Rule", "analyse", "analysis_as_json", "analysis_sections", "format_interval", "paired_section"),
    "wins_section",
]

_TIE = 0.01  # of a scale: a gap that nobody would notice

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Rule:
    """How rewards become preferences, and how intervals are drawn.

    Args:
        dimensions: weight of each video dimension in a video reward; those that were not scored do not count.
        patch_tie: patches whose rewards differ by no more than this are ties.
        resamples: draws of the bootstrap over prompts and seeds.
        seed: of the draws.
    """

    dimensions: Mapping[str, float]
    patch_tie: float
    resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Analysis:
    """What base and aligned clips of the same prompts and seeds show.

    Args:
        grid: patches along time, height and width.
        sizes: rate, severity, area and persistence of defects; see `defects.defect_sizes`.
        rates: share of defective patches by time, place and kind.
        wins: of the aligned model by the meter and by each score; more is better.
        lost: by the reward of patches and by the meter, what the winner of a video loses; see `defects.lost_patches`.
        consistency: of video and patch rewards, by arm; see `consistency.reward_consistency`.
        quantiles: of video rewards and of patch rewards, by arm.
        shift: KS and Wasserstein distance between the arms' rewards, of videos and of patches.
        kept: what alignment must not cost: prompt fidelity, motion and diversity.
        two_stage: the meter, which judges one thing at a time; of severities less is better.
        end_to_end: the reward model's scores of whole clips.
    """

    grid: tuple[int, ...]
    sizes: dict[str, Paired]
    rates: dict[str, dict[str, Paired]]
    wins: dict[str, Wins]
    lost: dict[str, dict[str, Figure]]
    consistency: dict[str, dict[str, Figure]]
    quantiles: dict[str, dict[str, float]]
    shift: dict[str, dict[str, float]]
    kept: dict[str, Paired]
    two_stage: dict[str, Paired]
    end_to_end: dict[str, Paired]


def analyse(rows: Sequence[EvaluatedRow], grid: Sequence[int], rule: Rule) -> Analysis:
    """Count the defects of both arms and compare them pair by pair.

    Args:
        rows: clips of both arms, the same prompts and seeds in the same order in each.
        grid: patches along time, height and width.
        rule: ties, weights and resamples.

    Raises:
        ValueError: the arms' prompts and seeds differ.
    """
    places = [[(row.prompt, row.seed) for row in rows if row.arm == arm] for arm in ("base", "aligned")]
    if places[0] != places[1]:
        raise ValueError("rows: expected the same prompts and seeds in the same order for base and aligned")
    base, aligned = arms = arm_columns(rows, "base"), arm_columns(rows, "aligned")
    draws = {"resamples": rule.resamples, "seed": rule.seed}
    severity = [arm["severity"].reshape(-1, *grid) for arm in arms]
    names = [name.removeprefix("severity_") for name in base if name.startswith("severity_")]
    kinds = [{kind: arm[f"severity_{kind}"].reshape(-1, *grid) for kind in names} for arm in arms]
    rewards = _video_rewards(base, rule), _video_rewards(aligned, rule)
    scores = {name: (base[name], aligned[name]) for name in base if name.startswith("video_")}
    scored = "patch_quality" in base
    return Analysis(
        grid=tuple(grid),
        sizes=defect_sizes(severity[0], severity[1], **draws),
        rates=defect_rates(severity[0], severity[1], (kinds[0], kinds[1]), **draws),
        wins=_wins(arms, rewards, draws),
        lost=_lost(arms, rewards, rule, draws),
        consistency={
            arm: reward_consistency(reward, columns["patch_quality"], **draws)
            for arm, reward, columns in zip(("base", "aligned"), rewards, arms, strict=True)
        }
        if scored
        else {},
        quantiles=_quantiles(arms, rewards),
        shift=_shift(arms, rewards),
        kept=_kept(rows, arms, draws),
        two_stage=_two_stage(arms, kinds, draws),
        end_to_end={_words(name): paired_mean(*pair, **draws) for name, pair in scores.items()},
    )


def _video_rewards(columns: Columns, rule: Rule) -> NDArray[np.float64]:
    """The weighted mean of the video dimensions, [N]; of all of them where no weight is known."""
    found = {name.removeprefix("video_"): np.asarray(columns[name], float) for name in columns if name[:6] == "video_"}
    weights = {name: rule.dimensions[name] for name in found if rule.dimensions.get(name, 0) > 0}
    weights = weights or dict.fromkeys(found, 1.0)
    total = sum(weights.values())
    return np.sum([weight * found[name] for name, weight in weights.items()], axis=0) / total


def _wins(
    arms: tuple[Columns, Columns], rewards: tuple[NDArray[np.float64], ...], draws: Mapping[str, int]
) -> dict[str, Wins]:
    base, aligned = arms
    severity = base["severity"].mean(axis=1) - aligned["severity"].mean(axis=1)
    gaps = {"severity": (severity, _TIE), "video reward": (rewards[1] - rewards[0], 4 * _TIE)}
    if "patch_quality" in base:
        means = [np.asarray(arm["patch_quality"], float).mean(axis=1) for arm in arms]
        gaps["patch reward, mean"] = means[1] - means[0], 4 * _TIE
    if "fidelity_correct" in base:
        gaps["prompt fidelity"] = aligned["fidelity_correct"] - base["fidelity_correct"], 0.0
    # a pair of which a meter reads nothing is no win, tie or loss
    return {name: count_wins(gap[~np.isnan(gap)], tie, **draws) for name, (gap, tie) in gaps.items()}


def _lost(
    arms: tuple[Columns, Columns], rewards: tuple[NDArray[np.float64], ...], rule: Rule, draws: Mapping[str, int]
) -> dict[str, dict[str, Figure]]:
    """Means over the pairs whose video rewards differ."""
    base, aligned = arms
    gaps = {"by the meter": (base["severity"] - aligned["severity"], rule.patch_tie / 4)}
    if "patch_quality" in base:
        rewarded = np.asarray(aligned["patch_quality"], float) - np.asarray(base["patch_quality"], float)
        gaps = {"by the patch reward": (rewarded, rule.patch_tie), **gaps}
    return {
        name: {
            figure: ratio((np.nan_to_num(shares), ~np.isnan(shares)), **draws)
            for figure, shares in lost_patches(rewards[1] - rewards[0], patches, tie).items()
        }
        for name, (patches, tie) in gaps.items()
    }


def _quantiles(arms: tuple[Columns, Columns], rewards: tuple[NDArray[np.float64], ...]) -> dict[str, dict[str, float]]:
    found = {}
    for arm, columns, reward in zip(("base", "aligned"), arms, rewards, strict=True):
        found[f"video reward, {arm}"] = quantiles(reward)
        if "patch_quality" in columns:
            found[f"patch reward, {arm}"] = quantiles(columns["patch_quality"])
    return found


def _shift(arms: tuple[Columns, Columns], rewards: tuple[NDArray[np.float64], ...]) -> dict[str, dict[str, float]]:
    samples: dict[str, Sequence[NDArray[Any]]] = {"video reward": rewards}
    if "patch_quality" in arms[0]:
        samples["patch reward"] = [arm["patch_quality"] for arm in arms]
    samples["severity"] = [arm["severity"] for arm in arms]
    return {
        name: dict(zip(("KS distance", "Wasserstein distance"), distance(*pair), strict=True))
        for name, pair in samples.items()
    }


def _kept(rows: Sequence[EvaluatedRow], arms: tuple[Columns, Columns], draws: Mapping[str, int]) -> dict[str, Paired]:
    kept = {}
    for name, column in (("prompt fidelity", "fidelity_correct"), ("motion, by the meter", "motion_amount")):
        if column in arms[0]:
            kept[name] = paired_mean(*read_in_both(arms, column), **draws)
    own = [[row for row in rows if row.arm == arm] for arm in ("base", "aligned")]
    change = [np.array([row.change for row in arm]) for arm in own]
    if not np.isnan(change).any():
        kept["change from frame to frame"] = paired_mean(change[0], change[1], **draws)
    if all(row.look for row in rows):
        looks = [[row.look for row in arm] for arm in own]
        kept["diversity"] = diversity(looks[0], looks[1], **draws)
    return kept


def _two_stage(arms: tuple[Columns, Columns], kinds: Sequence[Columns], draws: Mapping[str, int]) -> dict[str, Paired]:
    """What the meter reads, one dimension at a time, the total of the severities first."""
    found = {"severity": paired_mean(arms[0]["severity"].mean(axis=1), arms[1]["severity"].mean(axis=1), **draws)}
    for kind in kinds[0]:
        means = [arm[kind].reshape(len(arm[kind]), -1).mean(axis=1) for arm in kinds]
        found[f"severity, {kind}"] = paired_mean(means[0], means[1], **draws)
    for name in arms[0]:
        if name.endswith("_correct"):
            found[f"{_words(name.removesuffix('_correct'))} right"] = paired_mean(*read_in_both(arms, name), **draws)
    return found


def _words(name: str) -> str:
    return name.removeprefix("video_").replace("_", " ")


def analysis_as_json(analysis: Analysis) -> dict[str, Any]:
    """For JSON: figures as value, low and high; NaN becomes null."""
    return {name: _plain(value) for name, value in vars(analysis).items() if name != "grid"}


def _plain(value: Any) -> Any:
    if isinstance(value, Figure | Paired | Wins):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def analysis_sections(analysis: Analysis) -> list[Section]:
    """The tables of an analysis as texts, in the order in which one reads them."""
    whole = [
        paired_section("two-stage: a detector for each dimension (of severities less is better)", analysis.two_stage),
        paired_section("end-to-end: the reward model's score of the whole clip, 1 to 5", analysis.end_to_end),
        paired_section(f"defects: patches with severity above {DEFECTIVE}", analysis.sizes),
        *(
            paired_section(f"defective patches by {by}", rates)
            for by, rates in sorted(analysis.rates.items())
            if by != "place"
        ),
        *_places(analysis),
        wins_section("wins of the aligned model over the base, ties half", analysis.wins),
        _figures("what a video preference cannot see: of the video's winner", analysis.lost),
        _figures("video reward against patch rewards", analysis.consistency),
        _numbers("quantiles of rewards", analysis.quantiles),
        _numbers("distance between base and aligned", analysis.shift),
        paired_section("kept: what alignment must not cost", analysis.kept),
    ]
    return [section for section in whole if section.rows]


def paired_section(title: str, figures: Mapping[str, Paired]) -> Section:
    """A table of both arms and their difference."""
    rows = [[name, *(format_interval(figure) for figure in pair)] for name, pair in figures.items()]
    return Section(title, ["", "base", "aligned", "aligned - base"], rows)


def wins_section(title: str, wins: Mapping[str, Wins]) -> Section:
    """A table of wins, ties and losses with the rate and the sign test."""
    rows = [
        [name, str(one.wins), str(one.ties), str(one.losses), format_interval(one.rate), f"{one.p:.2g}"]
        for name, one in wins.items()
    ]
    return Section(title, ["", "wins", "ties", "losses", "win rate", "p, sign test"], rows)


def _places(analysis: Analysis) -> list[Section]:
    """The rates of the places as a map for each arm."""
    _, height, width = analysis.grid
    rates = list(analysis.rates["place"].values())
    lines = [rates[row * width : (row + 1) * width] for row in range(height)]
    head = ["", *(f"column {column + 1}" for column in range(width))]
    return [
        Section(
            f"defective patches by place, {arm}",
            head,
            [
                [f"row {row + 1}", *(f"{getattr(rate, arm).value:.3f}" for rate in line)]
                for row, line in enumerate(lines)
            ],
        )
        for arm in ("base", "aligned")
    ]


def _figures(title: str, table: Mapping[str, Mapping[str, Figure]]) -> Section:
    """Rows of figures become columns: their names are long, the table's are short."""
    names = list(dict.fromkeys(name for figures in table.values() for name in figures))
    rows = [[name, *(format_interval(figures[name]) for figures in table.values())] for name in names]
    return Section(title, ["", *table], rows)


def _numbers(title: str, table: Mapping[str, Mapping[str, float]]) -> Section:
    names = list(dict.fromkeys(name for numbers in table.values() for name in numbers))
    return Section(
        title,
        ["", *names],
        [
            [row, *(format_interval(Figure(numbers[name], math.nan, math.nan)) for name in names)]
            for row, numbers in table.items()
        ],
    )


def format_interval(figure: Figure) -> str:
    """ "0.310 [0.090, 0.500]"; without the interval where there is none, "-" where the figure is not defined."""
    if math.isnan(figure.value):
        return "-"
    return f"{figure.value:.3f}" + ("" if math.isnan(figure.low) else f" [{figure.low:.3f}, {figure.high:.3f}]")
