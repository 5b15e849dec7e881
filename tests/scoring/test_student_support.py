"""A served teacher that is asked about the student's likeliest tokens: the steps are those of a Megatron teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_opd.config import ParallelConfig
from megatron_opd.scoring import sglang
from megatron_opd.scoring.sglang import SGLangScorer
from megatron_opd.scoring.student import StudentSupport
from megatron_opd.sglang import windows
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.roster import Roster
from megatron_opd.types import Scorer, StepStats
from tests.mcore.training import STABLE_OPD, Case, build_scorer, build_trainer, make_rollouts, own_part, share
from tests.mcore.worlds import open_layout
from tests.scoring.dense_server import ENDPOINT, DenseServer
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

P = ParallelConfig
OBJECTIVE = replace(STABLE_OPD, opd="topk_reverse_kl", k=5, temperature=1.0, off_policy="divergence")
LAYOUTS = {
    "one rank": Case(),
    "tp2 sp, offloaded": Case(P(tp=2, sequence_parallel=True), P(), offload=True),
    "pp2 vpp2": Case(P(pp=2, vpp=2), P(tp=2)),
    "cp2 x dp2": Case(P(cp=2, dp=2), P(tp=2, dp=2)),
    "dp2, overlapped, offloaded": Case(P(dp=2), overlap=True, offload=True),
    "tp2, end tokens by id": Case(P(tp=2), objective=replace(OBJECTIVE, merge_stop_class=False)),
}
STOP_IDS = (2, 5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "student", "qwen3", tied=True, layers=4, seed=1)
    make_model(folder / "teacher", "llama", layers=4, hidden=64, seed=2)
    return str(folder / "student"), str(folder / "teacher")


def two_steps(student: str, teacher: str, case: Case, served: bool) -> tuple[list[StepStats], dict[str, Any]]:
    """The stats, and the scorer's figures of the last step. No window holds more than a few tokens."""
    layout, platform = open_layout(case.parallel)
    trainer = build_trainer(student, case, layout, platform)
    trainer.stop_ids = STOP_IDS
    padded, vocab = trainer.spec.dims.padded_vocab_size, trainer.loss_vocab_size
    scorer: Scorer = build_scorer(teacher, case, layout, platform, padded)
    reference = build_scorer(student, case, layout, platform, padded)
    if served:
        first_rank = FirstRank()
        scorer = SGLangScorer(
            first_rank,
            Roster("teacher", [ENDPOINT]),
            layout,
            case.objective,
            stop_ids=STOP_IDS,
            vocab_size=vocab,
            teacher_vocab_size=vocab,
            in_flight=1,
            timeout=5.0,
            student=StudentSupport(trainer, first_rank),
        )
    stats = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sglang, "dispatch", DenseServer(AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)))
        patch.setattr(windows, "_ENTRIES", 60)
        for step in range(2):
            shares = share(make_rollouts(step, vocab), case, layout)
            with trainer.off_device():
                with scorer.on_device():
                    scores = scorer.score(shares)
                with reference.on_device():
                    reference_scores = reference.score(shares)
            stats.append(trainer.step(own_part(shares, layout), scores, reference_scores))
    return stats, scorer.figures()


FAST = ("one rank", "tp2 sp, offloaded")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in LAYOUTS])
def test_steps_are_those_of_a_megatron_teacher(pool: WorkerPool, models: tuple[str, str], name: str) -> None:
    case = LAYOUTS[name]
    case = replace(case, max_tokens=64, objective=OBJECTIVE if case.objective is STABLE_OPD else case.objective)
    (truth, nothing), *_ = pool.run(case.world_size, two_steps, *models, case, False)
    results = pool.run(case.world_size, two_steps, *models, case, True)
    assert nothing == {}
    for stats, _ in results:
        for ours, expected in zip(stats, truth, strict=True):
            assert not ours.skipped
            assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=2e-5)
            for term in ("loss", "opd", "gold", "teacher_written", "advantage", "teacher_stop_log_prob"):
                assert getattr(ours.terms, term) == pytest.approx(getattr(expected.terms, term), rel=1e-5, abs=1e-7), term
    figures = results[0][1]
    assert figures["score/requests"] > 20
    assert 1 < figures["score/asked_over_needed"] < 5
    assert all(not others for _, others in results[1:])
