"""The responses of the audited step: lengths and sources in which an error of normalisation cannot hide."""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_opd.types import Objective, Prompt, Rollout, Source

# Response tokens. The step's first source has very unequal ones, its third a single response: on one data-parallel rank only.
_LENGTHS = ((1, 2, 40, 7, 25, 3, 11), (9, 2), (13,))
_PROMPT_LENGTHS = (3, 8)  # from, to
LONGEST_SEQUENCE = max(map(max, _LENGTHS)) + _PROMPT_LENGTHS[1] - 1  # input positions


def make_rollouts(
    objective: Objective, vocab_size: int, stop_ids: tuple[int, ...], teachers: Sequence[str], seed: int
) -> list[Rollout]:
    """Of the sources that the objective has, their prompts shared out among ``teachers``; without log-probabilities."""
    rng = random.Random(seed)
    present = {
        Source.STUDENT: objective.student_weight,
        Source.TEACHER: objective.teacher_weight,
        Source.GOLD: objective.gold_weight,
    }
    sources = [source for source, weight in present.items() if weight]

    def rollout(number: int, source: Source, length: int) -> Rollout:
        prompt = tuple(rng.randrange(vocab_size) for _ in range(rng.randint(*_PROMPT_LENGTHS)))
        response = (*(rng.randrange(vocab_size) for _ in range(length - 1)), stop_ids[number % len(stop_ids)])
        teacher = teachers[number % len(teachers)]
        return Rollout(Prompt(str(number), prompt, "", teacher=teacher), source, response, (), "stop", 0, "")

    pairs = [(source, length) for source, lengths in zip(sources, _LENGTHS, strict=False) for length in lengths]
    return [rollout(number, *pair) for number, pair in enumerate(pairs)]


def fewer_than_ranks(rollouts: Sequence[Rollout], ranks: int) -> list[Rollout]:
    """The longest and some of the shortest, so few that at least one of ``ranks`` gets none."""
    *rest, longest = sorted(rollouts, key=lambda rollout: len(rollout.response_ids))
    return [longest, *rest][: ranks - 1]
