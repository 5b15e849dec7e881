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
def saved(pool: WorkerPool, models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint after two steps for each layout, made when first asked for."""

    class Lazy(dict[str, str]):
        def __missing__(self, name: str) -> str:
            case = Case(parallel=LAYOUTS[name])
            folder = tmp_path_factory.mktemp("saved")
            self[name] = pool.run(case.world_size, save_after, *models, case, 2, str(folder))[0]
            return self[name]

    return Lazy()


@pytest.fixture(scope="module")
def uninterrupted(pool: WorkerPool, models: tuple[str, str]) -> tuple[float, float]:
    third = pool.run(1, train_steps, *models, Case(), 3)[0][0][2]
    return third.terms.loss, third.grad_norm


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_next_step_agrees_when_a_checkpoint_moves_between_layouts(
    pool: WorkerPool,
    models: tuple[str, str],
    saved: dict[str, str],
    uninterrupted: tuple[float, float],
    table: Table,
    one: str,
    other: str,
) -> None:
    case = Case(parallel=LAYOUTS[other])
    for stats in pool.run(case.world_size, resume_for_one_step, *models, case, saved[one]):
        assert math.isclose(stats.terms.loss, uninterrupted[0], rel_tol=1e-5)
        assert math.isclose(stats.grad_norm, uninterrupted[1], rel_tol=1e-5)
    figure = f"loss {stats.terms.loss:.6f} ({uninterrupted[0]:.6f})"
    table.add("step after a checkpoint of another layout (and without interruption)", f"{one:10} -> {other:10}", figure)


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
