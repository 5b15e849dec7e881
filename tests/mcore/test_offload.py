"""Phases of memory: what is offloaded takes none, comes back the same, and nothing is left behind."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from megatron_opd.config import ParallelConfig
from tests.mcore.training import (
    Case,
    build_scorer,
    build_trainer,
    make_rollouts,
    own_part,
    share,
    train_steps,
)
from tests.mcore.worlds import open_layout
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

LAYOUTS = {
    "tp2": Case(ParallelConfig(tp=2), ParallelConfig(pp=2), max_tokens=64, offload=True),
    "dp2": Case(ParallelConfig(dp=2), max_tokens=64, offload=True, overlap=True),
    "pp2, no distributed optimizer": Case(ParallelConfig(pp=2), max_tokens=64, offload=True, distributed=False),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "student", "qwen3", tied=True, layers=2, seed=1)
    make_model(folder / "teacher", "llama", layers=2, hidden=64, seed=2)
    return str(folder / "student"), str(folder / "teacher")


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def living() -> tuple[int, int]:
    """All tensors that Python knows: how many, and the bytes of their storages."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return len(tensors), storage_bytes(tensors)


@pytest.mark.parametrize("name", ["tp2", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "tp2")])
def test_offloading_changes_no_bit(pool: WorkerPool, models: tuple[str, str], name: str) -> None:
    case = LAYOUTS[name]
    offloaded = pool.run(case.world_size, train_steps, *models, case, 3)
    always_there = pool.run(case.world_size, train_steps, *models, replace(case, offload=False), 3)
    for (stats, weights), (expected_stats, expected) in zip(offloaded, always_there, strict=True):
        assert stats == expected_stats
        assert all(torch.equal(weights[key], expected[key]) for key in expected)


def memory_of_phases(student: str, teacher: str, case: Case, cycles: int) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """Bytes of the student's and the teacher's own tensors in each phase; all living tensors at the end of each cycle."""
    layout, platform = open_layout(case.parallel)
    trainer = build_trainer(student, case, layout, platform)
    scorer = build_scorer(teacher, case, layout, platform, trainer.spec.dims.padded_vocab_size)
    shares = share(make_rollouts(0, trainer.loss_vocab_size), case, layout)
    frozen = [parameter.data for parameter in scorer.model.parameters()]  # the waiting copies
    seen: dict[str, int] = {}
    after_cycle = []
    for _ in range(cycles):
        with trainer.off_device():
            kept = [*trainer.parameters(), *trainer.optimizer_tensors(), *trainer.gradient_buffers()]
            seen["student off device"] = storage_bytes(kept)
            with scorer.on_device():
                on_device = [parameter.data for parameter in scorer.model.parameters()]
                seen["teacher on device, not its waiting copy"] = storage_bytes([*frozen, *on_device]) - storage_bytes(frozen)
                scores = scorer.score(shares)
            del on_device
            left = [parameter.data for parameter in scorer.model.parameters()]
            seen["teacher after scoring, not its waiting copy"] = storage_bytes([*frozen, *left]) - storage_bytes(frozen)
        seen["student on device"] = storage_bytes(kept)
        trainer.step(own_part(shares, layout), scores, scores)
        del scores, left
        after_cycle.append(living())
    seen["teacher"] = storage_bytes(frozen)
    return seen, after_cycle


@pytest.mark.parametrize("name", ["tp2", "dp2"])
def test_each_phase_has_the_memory_to_itself(pool: WorkerPool, models: tuple[str, str], name: str) -> None:
    for seen, _ in pool.run(2, memory_of_phases, *models, LAYOUTS[name], 2):
        assert seen["student off device"] == 0
        assert seen["student on device"] > 0
        assert seen["teacher on device, not its waiting copy"] == seen["teacher"] > 0
        assert seen["teacher after scoring, not its waiting copy"] == 0


@pytest.mark.slow
def test_twenty_cycles_take_no_more_memory_than_two(pool: WorkerPool, models: tuple[str, str]) -> None:
    """The optimizer's state appears in the first step."""
    for _, after_cycle in pool.run(2, memory_of_phases, *models, LAYOUTS["tp2"], 20):
        assert set(after_cycle[1:]) == {after_cycle[1]}
