"""The account of a paid teacher: its requests in the store, their prices, and the budget that bounds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halo_fast.teachers.openai.config import OpenAIConfig
from halo_fast.teachers.openai.pricing import highest_cost, token_prices
from halo_fast.teachers.openai.questions import Answer, Question, parse
from halo_fast.teachers.store import LabelStore, Reply

__all__ = ["Ledger"]


@dataclass(frozen=True)
class Ledger:
    """Requests of one teacher, entered in a store before they are sent.

    Args:
        store: of requests and answers.
        teacher: name under which requests are entered.
        config: prices, budget, and how many answers may be paid for one question.
    """

    store: LabelStore
    teacher: str
    config: OpenAIConfig

    def cost(self, questions: Sequence[Question]) -> float:
        """Dollars that questions cost at most."""
        return sum(highest_cost(question, self.config) for question in questions)

    def reserve(self, questions: Sequence[Question], batch: str | None = None) -> dict[str, int] | None:
        """Enter requests at their highest cost, all or none.

        Args:
            questions: one request each.
            batch: key of the batch that holds them.

        Returns:
            Numbers of the requests by the questions' keys; None if they could exceed the budget.
        """
        costs = {question.key: highest_cost(question, self.config) for question in questions}
        return self.store.reserve(costs, self.teacher, self.config.budget, batch)

    def settle(self, replies: Mapping[int, Reply]) -> None:
        """Record what came back, by the requests' numbers, at its true cost."""
        self.store.settle(replies, token_prices(self.config))

    def answered(self, question: Question) -> int:
        """How many answers, usable or not, a question has got."""
        return len(self.store.answers(question.key))

    def final(self, question: Question) -> Answer | None:
        """The stored answer that stands: a usable one, or the last that may be paid for; None if there is none yet."""
        answers = [
            parse(question, known.text) if known.status == "ok" else Answer(known.status, reason=known.reason)
            for known in self.store.answers(question.key)
        ]
        usable = [answer for answer in answers if answer.status == "ok"]
        return next(iter(usable or answers[self.config.max_attempts - 1 :]), None)
