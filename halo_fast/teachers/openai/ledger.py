"""The account of a paid teacher: its requests in the store, their prices, and what ends the work early."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from halo_fast.errors import UserError
from halo_fast.teachers.openai.config import OpenAIConfig
from halo_fast.teachers.openai.pricing import highest_cost, token_prices
from halo_fast.teachers.openai.protocol import CONTEXT, same_model
from halo_fast.teachers.openai.questions import Answer, Question, parse
from halo_fast.teachers.store import LabelStore, Reply

__all__ = ["Ledger"]

# Unusable answers of one kind, before any usable one, that end the work. Several candidates of one unsafe prompt may be
# refused one after another, so a refusal takes more questions.
_FEWEST_ANSWERS, _FEWEST_QUESTIONS, _FEWEST_REFUSED = 6, 3, 10
_FEWEST_REJECTED = 3  # questions in a row that the server rejects, which end the work


@dataclass
class Ledger:
    """Requests of one teacher, entered in a store before they are sent.

    Unusable answers of earlier processes are not final: each ledger allows a question `max_attempts` new answers.

    Args:
        store: of requests and answers.
        teacher: name under which requests are entered.
        config: prices, budget, and how many answers may be paid for one question.
    """

    store: LabelStore
    teacher: str
    config: OpenAIConfig
    _start: int = field(init=False)
    _usable: bool = field(default=False, init=False)
    _unusable: dict[str, list[int | str]] = field(default_factory=lambda: defaultdict(list), init=False)
    _questions: dict[int, Question] = field(default_factory=dict, init=False)
    _images: dict[str, int] = field(default_factory=dict, init=False)
    _rejected: set[str] = field(default_factory=set, init=False)
    _counted: dict[int, Reply] | None = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._start = self.store.last_request()

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
        numbers = self.store.reserve(costs, self.teacher, self.config.budget, batch)
        asked = {question.key: replace(question, pictures=()) for question in questions}
        self._images |= {question.key: len(question.pictures) for question in questions}
        self._questions |= {number: asked[key] for key, number in (numbers or {}).items()}
        return numbers

    def settle(self, replies: Mapping[int, Reply]) -> None:
        """Record what came back, by the requests' numbers, at its true cost."""
        self.store.settle(replies, token_prices(self.config))

    def check(self, replies: Mapping[int, Reply]) -> None:
        """End the work where going on would only cost money; call it after `settle`.

        Args:
            replies: what came back, by the requests' numbers.

        Raises:
            UserError: another model answered, the server cuts questions or rejects several in a row, or the first
                answers are all unusable in the same way.
        """
        for number, reply in replies.items():
            if reply.status == "wrong_model":
                raise UserError(
                    f"annotate.openai.model: {reply.reason}; if that is the same model, set "
                    f"annotate.openai.reported_model to its name and run again, which asks nothing twice"
                )
            if reply.status == "cut":
                raise UserError(f"{self.config.base_url}: {reply.reason}: it cut the question; {CONTEXT}")
            self._check_counts(number, reply)
            self._usable |= reply.status == "ok"
            if reply.status in ("failed", "lost"):
                continue
            if reply.status != "rejected":
                self._rejected.clear()
            if reply.status != "ok" and not self._known(number, reply):
                key = self._questions[number].key if number in self._questions else number
                self._unusable[reply.status].append(key)
                self._check_kind(reply, key)

    def _known(self, number: int, reply: Reply) -> bool:
        """Whether the question had such an answer in an earlier process: it must not end every run that follows."""
        question = self._questions.get(number)
        if question is None:
            return False
        earlier = self.store.answers(question.key).items()
        return any(other <= self._start and known.status == reply.status for other, known in earlier)

    def _check_counts(self, number: int, reply: Reply) -> None:
        """UserError if questions of clearly different sizes all have the same count of tokens: that of the context.

        Their answers, which seemed usable, are entered as cut.
        """
        question = self._questions.get(number)
        if self._counted is None or question is None or reply.tokens is None or reply.tokens[0] == 0:
            return
        self._counted[number] = reply
        counts = [known.tokens[0] for known in self._counted.values() if known.tokens]
        if max(counts) - min(counts) > 1:
            self._counted = None  # they vary, as they should
            return
        asked = [self._questions[other] for other in self._counted]
        lengths = [len(one.text.encode()) for one in asked]
        if len({self._images[one.key] for one in asked}) == 1 or max(lengths) < 1.1 * min(lengths):
            return
        reason = f"the server counted {counts[0]} prompt tokens for a short question and for a long one alike"
        self.settle({other: replace(known, status="cut", reason=reason) for other, known in self._counted.items()})
        raise UserError(f"{self.config.base_url}: {reason}: it cuts them; {CONTEXT}")

    def _check_kind(self, reply: Reply, key: int | str) -> None:
        """UserError if nothing but answers of this kind has come, to several questions."""
        if reply.status == "rejected":
            self._rejected.add(str(key))
            if len(self._rejected) >= _FEWEST_REJECTED:
                raise UserError(
                    f"{reply.reason}; {_FEWEST_REJECTED} questions in a row were rejected; check annotate.openai"
                )
            return
        asked = self._unusable[reply.status]
        questions = _FEWEST_REFUSED if reply.status == "refused" else _FEWEST_QUESTIONS
        if self._usable or len(asked) < _FEWEST_ANSWERS or len(set(asked)) < questions:
            return
        beginning = f"; the last one begins {reply.text[:80]!r}" if reply.text else ""
        raise UserError(
            f"{self.config.base_url}: the first {len(asked)} answers of {self.config.model} are all {reply.status} "
            f"({reply.reason}){beginning}; check annotate.openai and run again"
        )

    def answered(self, question: Question) -> int:
        """How many answers, usable or not, this ledger has got for a question."""
        return sum(number > self._start for number in self.store.answers(question.key))

    def final(self, question: Question) -> Answer | None:
        """The stored answer that stands: a usable one, or the last that may be paid for; None if there is none yet."""
        unusable = []
        for number, known in self.store.answers(question.key).items():
            answer = self._read(question, known)
            if answer.status == "ok":
                return answer
            if number > self._start:
                unusable.append(answer)
        return next(iter(unusable[self.config.max_attempts - 1 :]), None)

    def _read(self, question: Question, known: Reply) -> Answer:
        # another model's answer counts once the setting says that it is the same model
        renamed = known.status == "wrong_model" and known.model and same_model(self.config, known.model)
        if known.status == "ok" or renamed:
            return parse(question, known.text)
        return Answer(known.status, reason=known.reason)
