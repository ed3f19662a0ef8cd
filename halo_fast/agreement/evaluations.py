"""Further evaluations of reward models, which plugins register under the kind "reward evaluation"."""

from collections.abc import Callable
from typing import NamedTuple

from halo_fast.agreement.probes import Probe
from halo_fast.agreement.tables import Table
from halo_fast.data.importers import Ratings
from halo_fast.registry import known, resolve
from halo_fast.rewards import RewardModel

__all__ = ["Evaluation", "EvaluationRequest", "run_evaluations"]


class EvaluationRequest(NamedTuple):
    """What there is to evaluate.

    Args:
        model: a trained reward model, or None.
        ratings: people's labels, or None.
        seed: of everything that is drawn at random.
    """

    model: RewardModel | None
    ratings: Ratings | None
    seed: int


class Evaluation(NamedTuple):
    """What came of it.

    Args:
        tables: by title.
        probes: outcomes of probes, if any were run.
    """

    tables: dict[str, Table]
    probes: list[Probe]


def run_evaluations(request: EvaluationRequest) -> Evaluation:
    """All registered evaluations, one after another; each is a callable(EvaluationRequest) -> Evaluation."""
    result = Evaluation({}, [])
    for name in known("reward evaluation"):
        evaluate: Callable[[EvaluationRequest], Evaluation] = resolve("reward evaluation", name)
        found = evaluate(request)
        result.tables.update(found.tables)
        result.probes.extend(found.probes)
    return result
