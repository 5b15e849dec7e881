from __future__ import annotations

import pytest

from megatron_opd.config import MixtureConfig
from megatron_opd.data import Mixture, gold_rollout
from megatron_opd.types import OpdError, RolloutRequest, Source
from tests.data.factories import make_prompt

PROMPTS = [make_prompt("a", solution="x"), make_prompt("b", solution="yz")]


def test_each_prompt_gets_its_responses_of_each_source() -> None:
    requests = Mixture(MixtureConfig(student=3, teacher=2, gold=1), seed=5).assign(PROMPTS, step=0)
    for prompt in PROMPTS:
        got = [(request.source, request.sample) for request in requests if request.prompt is prompt]
        assert got == [
            *[(Source.STUDENT, sample) for sample in range(3)],
            *[(Source.TEACHER, sample) for sample in range(2)],
            (Source.GOLD, 0),
        ]


def test_seeds_are_reproducible_63_bit_and_differ_in_every_ingredient() -> None:
    def seeds(run_seed: int, step: int) -> list[int]:
        mixture = Mixture(MixtureConfig(student=4, teacher=4, gold=1), run_seed)
        return [request.seed for request in mixture.assign(PROMPTS, step)]

    everything = seeds(5, 0) + seeds(5, 1) + seeds(6, 0)
    assert seeds(5, 0) == seeds(5, 0)
    assert len(set(everything)) == len(everything) == 3 * 2 * 9
    assert all(0 <= seed < 2**63 for seed in everything)
    assert max(everything) > 2**61  # no bits are wasted


def test_seeds_are_the_same_in_every_release() -> None:
    [request] = Mixture(MixtureConfig(student=1, gold=0), seed=17).assign([make_prompt("a")], step=3)
    assert request.seed == 7164133031140509771


def test_a_prompt_twice_in_a_step_gets_other_samples() -> None:
    requests = Mixture(MixtureConfig(student=2, gold=0), seed=5).assign([PROMPTS[0], PROMPTS[0]], step=0)
    assert [request.sample for request in requests] == [0, 1, 2, 3]
    assert len({request.seed for request in requests}) == 4


def test_a_gold_rollout_is_the_solution() -> None:
    rollout = gold_rollout(RolloutRequest(PROMPTS[1], Source.GOLD, 0, seed=1))
    assert rollout.response_ids == (ord("y"), ord("z"), 1)
    assert (rollout.text, rollout.finish_reason, rollout.log_probs, rollout.policy_version) == ("yz", "stop", (), 0)
    assert rollout.source is Source.GOLD


def test_a_gold_rollout_without_solution_is_refused() -> None:
    with pytest.raises(OpdError, match="prompt 'p': no 'solution'"):
        gold_rollout(RolloutRequest(make_prompt(), Source.GOLD, 0, seed=1))
