from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_opd.evaluation import accuracy, correctness, evaluate
from megatron_opd.types import NamedTensors, Rollout, RolloutRequest, SamplingParams, Source
from tests.data.factories import make_prompt, make_rollout

SAMPLING = SamplingParams(0.6, 1.0, 8, (1,))


class EvenHandedEngine:
    """Answers "4" to everything; a prompt of more than three tokens truncates it."""

    def __init__(self) -> None:
        self.requests: list[RolloutRequest] = []

    def sleep(self) -> None: ...

    def figures(self) -> dict[str, float | None]:
        return {}

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Rollout]:
        self.requests = list(requests)
        return [
            make_rollout(r.source, prompt=r.prompt, text="4", finish_reason="length", tokens=8)
            if len(r.prompt.token_ids) > 3
            else make_rollout(r.source, prompt=r.prompt, text="4", tokens=2)
            for r in requests
        ]

    def load_weights(self, weights: NamedTensors, version: int) -> None:
        raise NotImplementedError


def test_accuracy_counts_student_rollouts_with_an_answer_only() -> None:
    right, wrong, unknown = (make_prompt(str(i), answer=a) for i, a in enumerate(["4", "5", None]))
    rollouts = [
        make_rollout(prompt=right, text="it is 4"),
        make_rollout(prompt=wrong, text="it is 4"),
        make_rollout(prompt=right, text="it is 5"),
        make_rollout(prompt=unknown, text="it is 4"),
        make_rollout(Source.GOLD, prompt=right, text="it is 4"),
        make_rollout(Source.TEACHER, prompt=right, text="it is 4"),
    ]
    assert correctness(rollouts) == [True, False, False, None, True, True]
    assert accuracy(rollouts) == 1 / 3
    assert accuracy(rollouts[3:]) is None
    assert accuracy([]) is None


def test_evaluation_reports_accuracy_truncation_and_length() -> None:
    prompts = [make_prompt("a", 2, "4"), make_prompt("b", 2, "4"), make_prompt("c", 9, "5"), make_prompt("d", 2, "4")]
    result = evaluate(EvenHandedEngine(), prompts, SAMPLING, seed=3)
    assert (result.accuracy, result.truncation_rate, result.length_mean) == (0.75, 0.25, 3.5)
    assert [rollout.prompt.uid for rollout in result.rollouts] == ["a", "b", "c", "d"]


def test_the_draws_depend_on_the_prompt_and_seed_alone() -> None:
    def seeds(uids: str, seed: int) -> dict[str, int]:
        engine = EvenHandedEngine()
        evaluate(engine, [replace(make_prompt(), uid=uid) for uid in uids], SAMPLING, seed)
        return {request.prompt.uid: request.seed for request in engine.requests}

    first = seeds("abc", 3)
    assert first == seeds("cba", 3)
    assert len(set(first.values()) | set(seeds("abc", 4).values())) == 6
    assert all(0 <= seed < 2**63 for seed in first.values())


def test_nothing_to_evaluate_gives_no_figures() -> None:
    result = evaluate(EvenHandedEngine(), [], SAMPLING, seed=3)
    assert (result.accuracy, result.truncation_rate, result.length_mean, result.rollouts) == (None, None, None, [])
