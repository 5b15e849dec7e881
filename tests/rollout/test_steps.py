"""Rollouts written ahead are those that would have been written in their step, and a checkpoint knows nothing of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_opd.config import MixtureConfig
from megatron_opd.data import load_tokenizer
from megatron_opd.data.mixture import Mixture
from megatron_opd.data.prompts import PromptDataset
from megatron_opd.monitoring.lag import policy_lag
from megatron_opd.rollout import EmbeddedEngine
from megatron_opd.rollout.steps import Beside, StepRollouts, Writers
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.types import DataCursor, OpdError, Prompt, Rollout, RolloutRequest, SamplingParams, TrainState
from tests.rollout.requests import sampling
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

STEPS = 5
Seen = list[tuple[DataCursor, list[Rollout]]]


def source(folder: Path, ahead: FirstRank | None, *, fails: bool = False) -> StepRollouts:
    engine = EmbeddedEngine(
        folder, load_tokenizer(folder), dtype=torch.float32, device=torch.device("cpu"), max_batch_size=4, load=True, group=None
    )
    prompts = [Prompt(str(number), (5 + number, 7), "") for number in range(7)]  # an epoch ends within a step
    writers = Writers(engine, None)
    return StepRollouts(
        PromptDataset(prompts, 3),
        Mixture(MixtureConfig(student=2, gold=0), 3),
        writers,
        sampling(),
        prompts=2,
        ahead=Beside(ahead, Writers(_Failing(engine), None) if fails else writers) if ahead else None,
    )


class _Failing:
    """An engine whose servers are lost while it writes."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.figures, self.sleep = engine.figures, engine.sleep

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Rollout]:
        time.sleep(0.2)
        raise OpdError("no engine is left")


def walk(rollouts: StepRollouts, state: TrainState, steps: int, *, ahead: bool) -> Seen:
    seen = []
    for _ in range(steps):
        taken = rollouts.take(state)
        if ahead:
            rollouts.begin_next(state)
        seen.append((replace(state.cursor), taken))
        rollouts.settle()
        state.step += 1
    return seen


def both_ways(folder: Path) -> tuple[Seen, Seen, Seen]:
    strict = walk(source(folder, None), TrainState(), STEPS, ahead=False)
    lagging = walk(source(folder, FirstRank()), TrainState(), STEPS, ahead=True)
    cursor, _ = lagging[1]
    resumed = walk(source(folder, FirstRank()), TrainState(step=2, cursor=replace(cursor)), STEPS - 2, ahead=True)
    return strict, lagging, resumed


def test_order_seeds_and_cursor_are_those_of_strict_steps_also_after_a_kill(pool: WorkerPool, tmp_path: Path) -> None:
    make_model(tmp_path)
    everywhere = pool.run(2, both_ways, tmp_path)
    strict, lagging, resumed = everywhere[0]
    assert everywhere[1] == everywhere[0]
    assert len({cursor.position + 7 * cursor.epoch for cursor, _ in strict}) == STEPS
    assert lagging == strict  # the same weights here, so the same responses
    assert resumed == strict[2:]


def failing(folder: Path) -> str:
    state, rollouts = TrainState(), source(folder, FirstRank(), fails=True)
    rollouts.take(state)
    rollouts.begin_next(state)
    try:
        rollouts.settle()
    except OpdError as error:
        return str(error)
    return "no error"


def test_failure_ahead_reaches_every_rank(pool: WorkerPool, tmp_path: Path) -> None:
    make_model(tmp_path)
    assert pool.run(2, failing, tmp_path) == ["no engine is left"] * 2


def test_lag_is_that_of_the_oldest_weights(tmp_path: Path) -> None:
    make_model(tmp_path)
    ((_, rollouts),) = walk(source(tmp_path, None), TrainState(), 1, ahead=False)
    older = [replace(rollouts[0], policy_version=3), *(replace(each, policy_version=4) for each in rollouts[1:])]
    assert policy_lag(older, 5) == {"policy/lag_mean": 1.25, "policy/lag_max": 2.0}
    assert policy_lag([], 5) == {"policy/lag_mean": None, "policy/lag_max": None}
