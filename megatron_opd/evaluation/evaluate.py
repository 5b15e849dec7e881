"""Accuracy of whatever model an engine holds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd.evaluation.verify import is_correct
from megatron_opd.types import Prompt, Rollout, RolloutEngine, RolloutRequest, SamplingParams, Source


@dataclass(frozen=True)
class EvalResult:
    """One evaluation; a figure is None where there was nothing to measure."""

    accuracy: float | None
    truncation_rate: float | None
    length_mean: float | None  # tokens
    rollouts: list[Rollout]


def evaluate(engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingParams, seed: int) -> EvalResult:
    """One response for each prompt, drawn from a seed of (``seed``, prompt): the same draws at every evaluation of a run.

    Collective, as the engine is: all ranks call it with the same arguments.
    """
    requests = [
        RolloutRequest(prompt, Source.STUDENT, 0, random.Random(f"evaluation:{seed}:{prompt.uid}").getrandbits(63))
        for prompt in prompts
    ]
    rollouts = engine.generate(requests, sampling)
    return EvalResult(
        accuracy=accuracy(rollouts),
        truncation_rate=statistics.fmean(r.finish_reason == "length" for r in rollouts) if rollouts else None,
        length_mean=statistics.fmean(len(r.response_ids) for r in rollouts) if rollouts else None,
        rollouts=rollouts,
    )


def correctness(rollouts: Sequence[Rollout]) -> list[bool | None]:
    """For each rollout whether it is right; None where its prompt has no answer."""
    return [None if r.prompt.answer is None else is_correct(r.text, r.prompt.answer) for r in rollouts]


def accuracy(rollouts: Sequence[Rollout]) -> float | None:
    """Share of right ones among the student's rollouts whose prompt has an answer; None where there are none."""
    flags = correctness([rollout for rollout in rollouts if rollout.source is Source.STUDENT])
    known = [flag for flag in flags if flag is not None]
    return statistics.fmean(known) if known else None
