from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist

from megatron_opd.config import HELDOUT, MonitorsConfig
from megatron_opd.evaluation import Task, Verdict, correctness, evaluate, rollout_figures
from megatron_opd.evaluation.evaluate import EvalResult, requests, verify
from megatron_opd.types import NamedTensors, Prompt, Rollout, RolloutRequest, SamplingParams, Source
from tests.data.factories import make_prompt, make_rollout
from tests.evaluation.long_numbers import LONG_NUMBERS
from tests.worker_pool import WorkerPool

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
    assert rollout_figures(rollouts) == {"rollout/accuracy": 1 / 3, "rollout/unverified": 0.0, "rollout/empty": 0.0}
    rest = {"rollout/accuracy": None, "rollout/unverified": None, "rollout/empty": 0.0}
    assert rollout_figures(rollouts[3:]) == rest
    assert rollout_figures([]) == dict.fromkeys(rest)


def test_empty_rollouts_and_those_without_an_answer_are_counted() -> None:
    known, unknown = make_prompt("a", answer="4"), make_prompt("b")
    texts = [(known, "4"), (known, "no idea"), (known, " \n"), (known, ""), (unknown, "")]
    rollouts = [make_rollout(prompt=prompt, text=text) for prompt, text in texts]
    rollouts.append(make_rollout(Source.GOLD, prompt=known, text=""))
    assert rollout_figures(rollouts) == {"rollout/accuracy": 0.25, "rollout/unverified": 0.75, "rollout/empty": 0.6}


def make_task(prompts: Sequence[Prompt], samples: int = 1, name: str = HELDOUT) -> Task:
    return Task(name, "heldout.jsonl", list(prompts), samples, SAMPLING.max_new_tokens)


def test_evaluation_reports_accuracy_and_the_monitors_of_the_responses() -> None:
    prompts = [make_prompt("a", 2, "4"), make_prompt("b", 2, "4"), make_prompt("c", 9, "5"), make_prompt("d", 2, "4")]
    task = make_task(prompts)
    result = evaluate(EvenHandedEngine(), task, SAMPLING, seed=3)
    assert [rollout.prompt.uid for rollout in result.rollouts] == ["a", "b", "c", "d"]
    assert result.figures(task, MonitorsConfig()) == {
        "eval/accuracy": 0.75,
        "eval/truncation_rate": 0.25,
        "eval/repetition_rate": None,  # no text is long enough to tell
        "eval/repeated_ngrams": 0.0,
        "eval/length_mean": 3.5,
        "eval/length_p05": 2.0,
        "eval/length_p25": 2.0,
        "eval/length_p50": 2.0,
        "eval/length_p75": 2.0,
        "eval/length_p95": 8.0,
        "eval/length_max": 8.0,
        "eval/unverified": 0.0,
    }
    (histogram,) = result.histograms(make_task(prompts, name="gsm8k")).items()
    assert histogram[0] == "eval/gsm8k/length_histogram"
    assert (sum(histogram[1].counts), histogram[1].counts[-1], histogram[1].high) == (4, 1, SAMPLING.max_new_tokens)


def test_repeated_ngrams_are_of_the_configured_length() -> None:
    prompt = make_prompt("a", 2, "4")
    rollouts = [make_rollout(prompt=prompt, text="4", response_ids=(1, 1, 2, 1, 1))]
    for ngram, share in ((2, 0.25), (4, 0.0)):
        figures = EvalResult(rollouts, verify(rollouts)).figures(make_task([prompt]), MonitorsConfig(ngram=ngram))
        assert figures["eval/repeated_ngrams"] == share


def test_several_samples_of_a_task_have_seeds_of_their_own_and_more_figures() -> None:
    task = make_task([make_prompt("a", 2, "4"), make_prompt("b", 2, "5")], samples=4, name="maths")
    engine = EvenHandedEngine()
    figures = evaluate(engine, task, SAMPLING, seed=3).figures(task, MonitorsConfig())
    assert len({request.seed for request in engine.requests}) == 8
    assert [request.sample for request in engine.requests] == [0, 1, 2, 3] * 2
    wanted = {"accuracy": 0.5, "pass_at_1": 0.5, "pass_at_4": 0.5, "maj_at_4": 0.5}
    assert {name: figures[f"eval/maths/{name}"] for name in wanted} == wanted
    evaluate(engine, make_task(task.prompts), SAMPLING, seed=3)
    assert [request.seed for request in engine.requests] == [requests(task, 3)[0].seed, requests(task, 3)[4].seed]


def test_ranks_share_the_verification_and_all_get_every_verdict(pool: WorkerPool) -> None:
    answers = ["4", "5", r"\sqrt{16}", "4", "x"]
    expected = [True, False, True, True, False]
    for verdicts, figures in pool.run(2, verify_on_rank, answers):
        assert [verdict.correct for verdict in verdicts] == expected
        assert figures == {"rollout/accuracy": 0.6, "rollout/unverified": 0.0, "rollout/empty": 0.0}


def verify_on_rank(answers: list[str]) -> tuple[list[Verdict], dict[str, float | None]]:
    rollouts = [make_rollout(prompt=make_prompt(str(i), answer=each), text="4") for i, each in enumerate(answers)]
    return verify(rollouts, dist.group.WORLD), rollout_figures(rollouts, dist.group.WORLD)


def test_the_draws_depend_on_the_prompt_and_seed_alone() -> None:
    def seeds(uids: str, seed: int) -> dict[str, int]:
        engine = EvenHandedEngine()
        evaluate(engine, make_task([replace(make_prompt(answer="4"), uid=uid) for uid in uids]), SAMPLING, seed)
        return {request.prompt.uid: request.seed for request in engine.requests}

    first = seeds("abc", 3)
    assert first == seeds("cba", 3)
    assert len(set(first.values()) | set(seeds("abc", 4).values())) == 6
    assert all(0 <= seed < 2**63 for seed in first.values())


def test_nothing_to_evaluate_gives_no_figures() -> None:
    task = make_task([])
    assert set(evaluate(EvenHandedEngine(), task, SAMPLING, seed=3).figures(task, MonitorsConfig()).values()) == {None}


def test_numbers_of_thousands_of_digits_end_no_evaluation() -> None:
    prompt = make_prompt("a", 2, "4")
    for samples in (1, len(LONG_NUMBERS)):
        rollouts = [make_rollout(prompt=prompt, text=rf"\boxed{{{number}}}") for number in LONG_NUMBERS[:samples]]
        figures = EvalResult(rollouts, verify(rollouts)).figures(make_task([prompt], samples), MonitorsConfig())
        assert figures["eval/accuracy"] == 0.0
        assert figures.get("eval/maj_at_5", 0.0) == 0.0
