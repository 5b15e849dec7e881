"""Checkpoints: whole or not there, and resumed in any layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_opd.config import ParallelConfig
from megatron_opd.mcore.checkpoint import latest_checkpoint
from tests.conftest import Table
from tests.mcore.training import Case, resume_for_one_step, save_after, save_lost_weights, train_steps
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "pp2": ParallelConfig(pp=2),
    "dp2": ParallelConfig(dp=2),
    "tp2 x pp2": ParallelConfig(tp=2, pp=2),
    "tp2 x dp2": ParallelConfig(tp=2, dp=2),
    "tp2 sp x cp2": ParallelConfig(tp=2, cp=2, sequence_parallel=True),
}
EXPERT_LAYOUTS = {
    "tp1": ParallelConfig(),
    "ep2": ParallelConfig(ep=2, dp=2),
    "pp2": ParallelConfig(pp=2),
    "tp2 sp x ep2": ParallelConfig(tp=2, ep=2, sequence_parallel=True),
}
FAST = {("tp2", "pp2"), ("tp1", "tp1")}
PAIRS = [
    pytest.param(one, other, marks=[] if (one, other) in FAST else pytest.mark.slow) for one in LAYOUTS for other in LAYOUTS
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "student", "qwen3", layers=2, seed=1)
    make_model(folder / "teacher", "llama", layers=4, hidden=64, seed=2)
    return str(folder / "student"), str(folder / "teacher")


@pytest.fixture(scope="module")
def expert_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("experts")
    make_model(folder / "student", "qwen3_moe", layers=2, seed=1)
    make_model(folder / "teacher", "mixtral", layers=2, hidden=48, seed=2)
    return str(folder / "student"), str(folder / "teacher")


class Saved(dict[str, str]):
    """A checkpoint after two steps for each layout, made when first asked for."""

    def __init__(
        self,
        pool: WorkerPool,
        models: tuple[str, str],
        layouts: dict[str, ParallelConfig],
        folders: pytest.TempPathFactory,
    ) -> None:
        super().__init__()
        self.pool, self.models, self.layouts, self.folders = pool, models, layouts, folders

    def __missing__(self, name: str) -> str:
        case, folder = Case(parallel=self.layouts[name]), str(self.folders.mktemp("saved"))
        self[name] = self.pool.run(case.world_size, save_after, *self.models, case, 2, folder)[0]
        return self[name]


@pytest.fixture(scope="module")
def saved(pool: WorkerPool, models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(pool, models, LAYOUTS, tmp_path_factory)


@pytest.fixture(scope="module")
def saved_experts(pool: WorkerPool, expert_models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(pool, expert_models, EXPERT_LAYOUTS, tmp_path_factory)


@pytest.fixture(scope="module")
def uninterrupted(pool: WorkerPool, models: tuple[str, str]) -> tuple[float, float]:
    third = pool.run(1, train_steps, *models, Case(), 3)[0][0][2]
    return third.terms.loss, third.grad_norm


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_next_step_agrees_when_a_checkpoint_moves_between_layouts(
    pool: WorkerPool,
    models: tuple[str, str],
    saved: Saved,
    uninterrupted: tuple[float, float],
    table: Table,
    one: str,
    other: str,
) -> None:
    _assert_next_step_agrees(pool, models, saved[one], LAYOUTS[other], uninterrupted, table, f"{one:13} -> {other:13}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(one, other, marks=[] if (one, other) == ("ep2", "tp1") else pytest.mark.slow)
        for one in EXPERT_LAYOUTS
        for other in EXPERT_LAYOUTS
    ],
)
def test_next_step_of_experts_agrees_when_a_checkpoint_moves_between_layouts(
    pool: WorkerPool, expert_models: tuple[str, str], saved_experts: Saved, table: Table, one: str, other: str
) -> None:
    third = pool.run(1, train_steps, *expert_models, Case(), 3)[0][0][2]
    expected = third.terms.loss, third.grad_norm
    row = f"experts, {one:13} -> {other:13}"
    _assert_next_step_agrees(pool, expert_models, saved_experts[one], EXPERT_LAYOUTS[other], expected, table, row)


def _assert_next_step_agrees(
    pool: WorkerPool,
    models: tuple[str, str],
    checkpoint: str,
    parallel: ParallelConfig,
    expected: tuple[float, float],
    table: Table,
    row: str,
) -> None:
    case = Case(parallel=parallel)
    for stats in pool.run(case.world_size, resume_for_one_step, *models, case, checkpoint):
        assert math.isclose(stats.terms.loss, expected[0], rel_tol=1e-5)
        assert math.isclose(stats.grad_norm, expected[1], rel_tol=1e-5)
    figure = f"loss {stats.terms.loss:.6f} ({expected[0]:.6f})"
    table.add("step after a checkpoint of another layout (and without interruption)", row, figure)


def test_lost_weights_are_not_saved_over_good_ones(pool: WorkerPool, models: tuple[str, str], tmp_path: Path) -> None:
    for message in pool.run(2, save_lost_weights, models[0], str(tmp_path)):
        assert message.startswith("step 2: 1 weight tensors are not finite, not saved")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_torn_checkpoints_are_never_chosen(tmp_path: Path) -> None:
    for name, whole in (("step_00000002", True), ("step_00000004", False), (".step_00000006.partial", True)):
        (tmp_path / name).mkdir()
        if whole:
            (tmp_path / name / "state.json").write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000002"
    assert latest_checkpoint(tmp_path / "absent") is None
