"""Word problems, worked solutions that check their last step, and the tokenizer of both.

    Ann has fifteen cards. Ann loses three. Ann eats four. How many cards?
     fifteen - three = twelve. twelve - four = eight. Wait, twelve - four = eight. So the answer is eight

How often a solution checks is its *style*. Numbers are words, so that nothing but "the answer is" states an answer: the last
digits of a response without it would count as its answer, and one that checks its last step for ever would be right.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMES = ("Tom", "Ann", "Bob", "Eve", "Sam", "Zoe")
ITEMS = ("apples", "pens", "coins", "books", "cards", "eggs")
VERBS = {"+": ("buys", "finds", "gets"), "-": ("eats", "loses", "sells")}
LARGEST = 24
_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
NUMBERS = (*_BELOW_TWENTY.split(), "twenty", "twenty-one", "twenty-two", "twenty-three", "twenty-four")
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
_WORDS = (*NUMBERS, "+", "-", "=", *NAMES, *ITEMS, *VERBS["+"], *VERBS["-"])
_WORDS += ("has", "more", "How", "many", "Wait,", "So", "the", "answer", "is")
VOCABULARY = (PAD, EOS, UNKNOWN, ".", "?", *(f" {word}" for word in _WORDS))
_PIECES = r" [A-Za-z]+(?:-[A-Za-z]+)?,?| [-+=]|[.?]"


@dataclass(frozen=True)
class Style:
    """Checks of a solution: one, and after each another one with probability ``again``; never more than ``most``.

    A share ``endless`` of the solutions goes on to ``most``. The sentence with the answer is said again with probability
    ``answer_again``, each time: a model of such solutions is not certain that a response ends there. A step is one off with
    probability ``slips``; what follows goes on from there, so the answer is wrong, but for a second slip that makes it good.
    """

    again: float
    endless: float = 0.0
    most: int = 36  # some 250 tokens: far beyond the length budget of every rollout
    answer_again: float = 0.0
    slips: float = 0.0

    def checks(self, rng: random.Random) -> int:
        if rng.random() < self.endless:
            return self.most
        count = 1
        while count < self.most and rng.random() < self.again:
            count += 1
        return count

    def answers(self, rng: random.Random) -> int:
        count = 1
        while self.answer_again and rng.random() < self.answer_again:
            count += 1
        return count

    def solution(self, problem: Problem, rng: random.Random) -> str:
        checks, answers = self.checks(rng), self.answers(rng)
        return (problem.slipped(self.slips, rng) if self.slips else problem).solution(checks, answers)


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    steps: tuple[str, ...]

    def solution(self, checks: int, answers: int = 1) -> str:
        """The steps, the last one ``checks`` times more, the answer ``answers`` times; the product appends the end token."""
        again = [f"Wait, {self.steps[-1]}"] * checks
        return " ".join([*self.steps, *again, ". ".join([f"So the answer is {self.answer}"] * answers)])

    def slipped(self, share: float, rng: random.Random) -> Problem:
        """The same question, as one answers it who is one off in a ``share`` of the steps."""
        steps, total = [], self.steps[0].split()[0]
        for step in self.steps:
            _, sign, by, _, _ = step.split()
            result = NUMBERS.index(total) + (NUMBERS.index(by) if sign == "+" else -NUMBERS.index(by))
            if rng.random() < share:
                result += rng.choice((-1, 1))
            result = min(max(result, 0), LARGEST)  # there are no words for others
            steps.append(f"{total} {sign} {by} = {NUMBERS[result]}.")
            total = NUMBERS[result]
        return Problem(self.question, total, tuple(steps))


def problems(seed: str, operations: tuple[int, int] = (2, 3)) -> Iterator[Problem]:
    """One new problem after another, in an order that ``seed`` fixes; ``operations``: fewest and most."""
    rng, seen = random.Random(seed), set()
    while True:
        problem = _problem(rng, rng.randint(*operations))
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def make_tokenizer(end: str = EOS) -> PreTrainedTokenizerFast:
    """One word, with the space before it, is one token. ``end``: the one that ends a response."""
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Prepend(" ")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=PAD, unk_token=UNKNOWN)


def _problem(rng: random.Random, operations: int) -> Problem:
    name, item, total = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(3, 15)
    question, steps = [f"{name} has {NUMBERS[total]} {item}."], []
    for _ in range(operations):
        by = rng.randint(1, 6)
        sign = "-" if total + by > LARGEST or (total >= by and rng.random() < 0.5) else "+"
        result = total + by if sign == "+" else total - by
        question.append(f"{name} {rng.choice(VERBS[sign])} {NUMBERS[by]}{' more' if sign == '+' else ''}.")
        steps.append(f"{NUMBERS[total]} {sign} {NUMBERS[by]} = {NUMBERS[result]}.")
        total = result
    return Problem(" ".join([*question, f"How many {item}?"]), NUMBERS[total], tuple(steps))
