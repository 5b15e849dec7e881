"""A forward pass that reports the loss's terms of responses that are not trained on: of held-out ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_opd.config import ParallelConfig
from megatron_opd.types import Objective
from tests.mcore.test_trainer import MONITORED, oracle
from tests.mcore.training import STABLE_OPD, Case, measure_before_steps
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

P = ParallelConfig
HELDOUT = Objective(
    opd="sampled",
    clip=None,
    beta=0.5,
    temperature=0.6,
    student_weight=1.0,
    teacher_weight=0.0,
    gold_weight=0.0,
    reference_kl=1.0,
)
LAYOUTS = {
    "tp2 sp, offloaded": Case(P(tp=2, sequence_parallel=True), P(dp=2), offload=True),
    "pp2 vpp2": Case(P(pp=2, vpp=2), P(tp=2)),
    "cp2": Case(P(cp=2), P(dp=2)),
    "dp2, overlapped, offloaded": Case(P(dp=2), overlap=True, offload=True),
    "pp2 x dp2, overlapped": Case(P(pp=2, dp=2), overlap=True),
    "cp2 x dp2": Case(P(cp=2, dp=2), P(tp=2, pp=2)),
}
FAST = ("tp2 sp, offloaded", "pp2 vpp2", "cp2", "dp2, overlapped, offloaded")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "student", "qwen3", tied=True, layers=4, seed=1)
    make_model(folder / "teacher", "llama", layers=4, hidden=64, seed=2)
    return str(folder / "student"), str(folder / "teacher")


def test_terms_match_the_dense_oracle_at_the_evaluations_temperature(pool: WorkerPool, models: tuple[str, str]) -> None:
    expected, _ = oracle(*models, Case(objective=replace(STABLE_OPD, temperature=HELDOUT.temperature)))
    (found,) = pool.run(1, measure_before_steps, *models, Case(max_tokens=64), HELDOUT)
    terms, gap = found.measured[0]
    for name in ("reference_kl", *MONITORED):
        if not name.endswith("_weight") or name == "repeated_weight":  # of the loss, which nothing has here
            assert math.isclose(terms._asdict()[name], expected[name], rel_tol=1e-5), name
    assert terms.reference_kl > 0.1
    assert gap >= terms.engine_gap > 0


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in LAYOUTS])
def test_terms_agree_in_every_layout_and_training_does_not_notice(pool: WorkerPool, models: tuple[str, str], name: str) -> None:
    case = replace(LAYOUTS[name], max_tokens=64)
    (one_rank,) = pool.run(1, measure_before_steps, *models, Case(), HELDOUT)
    unmeasured, *_ = pool.run(case.world_size, measure_before_steps, *models, case, None)
    for found in pool.run(case.world_size, measure_before_steps, *models, case, HELDOUT, 3):
        assert min(found.parts) > 1  # scored a few responses at a time
        for (terms, gap), (expected, largest) in zip(found.measured, one_rank.measured, strict=True):
            for field, value in terms._asdict().items():
                assert math.isclose(value, expected._asdict()[field], rel_tol=1e-5, abs_tol=1e-7), field
            assert math.isclose(gap, largest, rel_tol=1e-5)
        assert [stats.terms for stats in found.stepped] == [stats.terms for stats in unmeasured.stepped]
        assert found.weights.keys() == unmeasured.weights.keys()
        assert all(torch.equal(found.weights[key], weight) for key, weight in unmeasured.weights.items())
