"""How wrong is GPT-4o as a judge of generated videos, and what do better ways of asking bring?

    python -m benchmarks.teacher_errors data/genai_bench/pairs.csv           # the table of docs/teachers.md
    python -m benchmarks.teacher_errors data/genai_bench/pairs.csv --write   # and what the demo's teacher errs by

The file has a row for each pair of videos of GenAI-Bench (Jiang et al., arXiv:2406.04485): people's vote and the
verdicts of GPT-4o and Gemini 1.5 Pro. Three numbers describe a judge, in standard deviations of true differences:

    d ~ N(0, 1),  y = d + bias + noise * e,  e ~ N(0, 1);  "second" if y > tie, "first" if y < -tie, else a tie

People's vote is taken as d, with a tie band of its own that gives their share of ties. The judge's numbers are fitted
to the table of votes and verdicts by maximum likelihood. Ways of asking that the file has no verdicts of are computed
from the fit.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri

from halo_fast.data.prompts import read_prompts
from halo_fast.demo.meters import DefectMeter, FidelityMeter
from halo_fast.demo.teacher import ERRORS_FILE, DemoTeacher
from halo_fast.families import load
from halo_fast.families.sampling import clip_seed, sample_clips
from halo_fast.files import write_json
from halo_fast.pipeline.arguments import load_config

_VOTES = {"leftvote": 0, "tievote": 1, "bothbad_vote": 1, "rightvote": 2}
_ANSWERS = {"[[A>B]]": 0, "[[A=B]]": 1, "[[A=B=Good]]": 1, "[[A=B=Bad]]": 1, "[[B>A]]": 2}
_POINTS = np.linspace(-6, 6, 6001)  # of true differences
_DENSITY = np.exp(-(_POINTS**2) / 2) / np.exp(-(_POINTS**2) / 2).sum()


@dataclass(frozen=True)
class Judgement:
    """How a judge errs, in standard deviations of true differences.

    Args:
        noise: standard deviation of its error.
        bias: towards the second video.
        tie: it calls a tie below this difference.
        people_tie: people call a tie below this difference.
    """

    noise: float
    bias: float
    tie: float
    people_tie: float


def main() -> None:
    """Fit, and print the table; perhaps write what the demo's teacher errs by."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="csv with the columns people, gpt4o and gemini")
    parser.add_argument("--write", action="store_true", help=f"also write {ERRORS_FILE.name}; samples clips")
    given = parser.parse_args()
    votes = read_votes(given.pairs)
    fitted = fit(count_table(votes[:, 0], votes[:, 1]))
    print(f"{fitted}, of {(votes[:, 1] >= 0).sum()} pairs; both models answered {(votes >= 0).all(1).sum()}\n")
    print("\n".join(rows(votes, fitted)))
    if given.write:
        spread = measure_spread()
        write_json(ERRORS_FILE, {"judge": asdict(fitted), "spread": spread})


def read_votes(path: Path) -> np.ndarray:
    """People's votes and the verdicts of both models, int [N, 3]: 0 for first, 1 a tie, 2 second, -1 for no answer."""
    with path.open(newline="") as file:
        return np.array(
            [
                (_VOTES[row["people"]], *(_ANSWERS[row[model]] if row[model] else -1 for model in ("gpt4o", "gemini")))
                for row in csv.DictReader(file)
            ]
        )


def count_table(people: np.ndarray, judge: np.ndarray) -> np.ndarray:
    """How often people and judge said what, [3, 3]."""
    return np.array([[np.sum((people == vote) & (judge == said)) for said in range(3)] for vote in range(3)])


def probabilities(judge: Judgement) -> np.ndarray:
    """Joint probabilities of people's vote and the judge's verdict, [3, 3]."""
    vote = np.digitize(_POINTS, [-judge.people_tie, judge.people_tie])
    people = np.eye(3)[:, vote]
    return np.einsum("in,jn,n->ij", people, _said(judge), _DENSITY)


def _said(judge: Judgement) -> np.ndarray:
    """Probabilities of the verdicts at each true difference, [3, points]."""
    first = ndtr((-judge.tie - _POINTS - judge.bias) / judge.noise)
    second = ndtr((_POINTS + judge.bias - judge.tie) / judge.noise)
    return np.stack([first, 1 - first - second, second])


def fit(table: np.ndarray) -> Judgement:
    """The judge of greatest likelihood for a table of votes and verdicts; people's tie band follows from their ties."""

    people_tie = float(ndtri((1 + table[1].sum() / table.sum()) / 2))

    def loss(values: np.ndarray) -> float:
        noise, tie = np.exp(values[[0, 2]])
        return -float((table * np.log(probabilities(Judgement(noise, values[1], tie, people_tie)) + 1e-12)).sum())

    found = minimize(loss, np.array([0.0, 0.0, -1.0]), method="BFGS").x
    return Judgement(float(np.exp(found[0])), float(found[1]), float(np.exp(found[2])), people_tie)


def rows(votes: np.ndarray, judge: Judgement) -> list[str]:
    """Lines of a Markdown table: what each way of asking keeps, and how often it is right."""
    people, gpt, gemini = votes[(votes >= 0).all(1)].T
    agreed = np.where(gpt == gemini, gpt, 1)
    wide = tie_of_share(judge, float((people == 1).mean()))
    unbiased = Judgement(judge.noise, 0.0, judge.tie, judge.people_tie)
    found = [
        ("one question", 1, _counted(people, gpt), computed(judge, _said(judge))),
        ("Gemini 1.5 Pro asked instead", 1, _counted(people, gemini), None),
        ("two models, one verdict kept where they agree", 2, _counted(people, agreed), None),
        ("one question, the bias taken out", 1, None, computed(judge, _said(unbiased))),
        ("both orders, kept where they agree; errors of their own", 2, None, computed(judge, _both(judge, False))),
        ("both orders, kept where they agree; the same errors", 2, None, computed(judge, _both(judge, True))),
        ("one question, a tie as often as people call one", 1, None, computed(judge, _said(wide))),
    ]
    lines = ["| way of asking | questions | verdicts | right | right, by the fit |", "|---|---|---|---|---|"]
    for name, questions, counted, fitted in found:
        kept = counted or fitted
        assert kept
        cells = [f"{100 * kept[0]:.0f}%"]
        cells += ["" if one is None else f"{100 * one[1]:.0f}%" for one in (counted, fitted)]
        lines.append(f"| {name} | {questions} | {' | '.join(cells)} |")
    return lines


def _counted(people: np.ndarray, said: np.ndarray) -> tuple[float, float]:
    """Share of pairs with a verdict, and of those that people decided too the share that is right."""
    both = (said != 1) & (people != 1)
    return float((said != 1).mean()), float((said == people)[both].mean())


def computed(judge: Judgement, said: np.ndarray) -> tuple[float, float]:
    """The same of verdicts with known probabilities at each true difference, [3, points]."""
    decided = abs(_POINTS) > judge.people_tie
    right = np.where(_POINTS > 0, said[2], said[0])
    kept = said[0] + said[2]
    return float((kept * _DENSITY).sum()), float((right * _DENSITY)[decided].sum() / (kept * _DENSITY)[decided].sum())


def _both(judge: Judgement, same: bool) -> np.ndarray:
    """Verdicts that both orders agree on; in the second order the bias counts against the difference.

    With the same errors one draw of e serves both orders, else each has its own.
    """
    if not same:
        first, _, second = _said(judge)
        swapped = _said(Judgement(judge.noise, -judge.bias, judge.tie, judge.people_tie))
        agreed = [first * swapped[0], second * swapped[2]]
    else:
        margin = judge.tie + abs(judge.bias)
        agreed = [ndtr((-margin - _POINTS) / judge.noise), ndtr((_POINTS - margin) / judge.noise)]
    return np.stack([agreed[0], 1 - agreed[0] - agreed[1], agreed[1]])


def tie_of_share(judge: Judgement, share: float) -> Judgement:
    """The judge with the tie band by which it calls a tie in a share of the pairs."""
    total, low, high = np.hypot(1, judge.noise), 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        ties = ndtr((middle - judge.bias) / total) - ndtr((-middle - judge.bias) / total)
        low, high = (middle, high) if ties < share else (low, middle)
    return Judgement(judge.noise, judge.bias, low, judge.people_tie)


def measure_spread(num_prompts: int = 96) -> dict[str, float]:
    """Standard deviation of true scores between candidates of a prompt, of each video dimension and of patches.

    The scores are those of the demo's teacher without errors, on clips of the graded base.
    """
    config = load_config("demo", {})
    family = load("demo:graded", device="cpu")
    prompts = read_prompts("demo:train", num_prompts, 0)
    meter = DefectMeter.load()
    teacher = DemoTeacher(meter, FidelityMeter.load(), meter.grid, 0.0, 0)
    scores = []
    for candidate in range(2):
        seeds = [clip_seed(0, index, candidate) for index in range(num_prompts)]
        found = []
        for start in range(0, num_prompts, 32):
            part = slice(start, start + 32)
            _, videos = sample_clips(family, prompts[part], seeds[part], config.generate)
            found += teacher.label(videos, prompts[part])
        scores.append(found)
    apart = [np.array([[*one.video.values(), *one.patches["quality"]] for one in found]) for found in scores]
    deviation = np.sqrt(((apart[1] - apart[0]) ** 2).mean(0) / 2)  # of one of two independent scores
    names = tuple(scores[0][0].video)
    return {name: float(deviation[index]) for index, name in enumerate(names)} | {
        "patch": float(np.sqrt((deviation[len(names) :] ** 2).mean()))
    }


if __name__ == "__main__":
    main()
