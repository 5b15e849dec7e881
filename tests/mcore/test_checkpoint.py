"""Checkpoints: whole or not there, and resumed in any layout."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterable
from itertools import product
from pathlib import Path

import pytest
import torch.distributed as dist
from _pytest.mark import ParameterSet

from megatron_opd.config import ParallelConfig
from megatron_opd.mcore.checkpoint import start_checkpoint
from megatron_opd.mcore.checkpoint_files import (
    CheckpointWrite,
    RankWriter,
    SaveFailed,
    checkpoints,
    damage,
    latest_checkpoint,
    newest_verified,
)
from megatron_opd.processes import STOP_SIGNALS
from megatron_opd.types import TrainState
from tests.conftest import Table
from tests.mcore.training import Case, _train, resume_for_one_step, save_after, save_and_lose, save_lost_weights, train_steps
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
    "pp2 vpp2": ParallelConfig(pp=2, vpp=2),
}
EXPERT_LAYOUTS = {
    "tp1": ParallelConfig(),
    "ep2": ParallelConfig(ep=2, dp=2),
    "pp2": ParallelConfig(pp=2),
    "tp2 sp x ep2": ParallelConfig(tp=2, ep=2, sequence_parallel=True),
}
FAST = {("tp2", "pp2"), ("tp1", "tp1"), ("pp2 vpp2", "tp2")}


def pairs(layouts: Iterable[str], fast: Collection[tuple[str, str]]) -> list[ParameterSet]:
    """Of all that a checkpoint may move between; in the slow tests each is left once and entered once."""
    names = list(layouts)
    ring = set(zip(names, [*names[1:], names[0]], strict=True))
    return [
        pytest.param(*pair, marks=[] if pair in fast else pytest.mark.slow if pair in ring else pytest.mark.exhaustive)
        for pair in product(names, names)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "student", "qwen3", layers=4, seed=1)
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


@pytest.mark.parametrize(("one", "other"), pairs(LAYOUTS, FAST))
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


@pytest.mark.parametrize(("one", "other"), pairs(EXPERT_LAYOUTS, {("ep2", "tp1")}))
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


@pytest.mark.parametrize("name", ["tp2", "dp2"])
def test_training_goes_on_while_its_state_of_before_is_written(
    pool: WorkerPool, models: tuple[str, str], uninterrupted: tuple[float, float], tmp_path: Path, name: str
) -> None:
    case = Case(parallel=LAYOUTS[name])
    checkpoint, visible = pool.run(2, save_and_lose, *models, case, 2, str(tmp_path))[0]
    assert not visible
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    for stats in pool.run(2, resume_for_one_step, *models, case, checkpoint):
        assert math.isclose(stats.terms.loss, uninterrupted[0], rel_tol=1e-5)
        assert math.isclose(stats.grad_norm, uninterrupted[1], rel_tol=1e-5)


def lose_the_writer(path: str) -> list[str]:
    """The second rank's writing process is killed."""

    def write() -> tuple[list[Path], None]:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return [], None

    try:
        CheckpointWrite(Path(path), lambda _: RankWriter(write, lambda _: None), {}, keep=1).finish()
    except SaveFailed as error:
        return [str(error), *(each.name for each in Path(path).parent.iterdir())]
    return []


def test_killed_writing_process_is_a_failed_save(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(2, lose_the_writer, str(tmp_path / "iter_0000001")) == [["the writing process was killed"]] * 2


def write_while_asked_to_stop(path: str) -> str:
    """The scheduler's signals are sent to the writing processes as well."""

    def write() -> tuple[list[Path], None]:
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        return [], None

    content = {"state": {"step": 1}}
    return CheckpointWrite(Path(path), lambda _: RankWriter(write, lambda _: None), content, keep=1).finish().name


def test_a_run_that_is_asked_to_stop_writes_its_checkpoint_to_the_end(pool: WorkerPool, tmp_path: Path) -> None:
    assert pool.run(2, write_while_asked_to_stop, str(tmp_path / "iter_0000001")) == ["iter_0000001"] * 2


def test_lost_weights_are_not_saved_over_good_ones(pool: WorkerPool, models: tuple[str, str], tmp_path: Path) -> None:
    for message in pool.run(2, save_lost_weights, models[0], str(tmp_path)):
        assert message.startswith("step 2: 1 weight tensors are not finite, not saved")
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"]


def test_torn_checkpoints_are_never_chosen(tmp_path: Path) -> None:
    for name, whole in (("iter_0000002", True), ("iter_0000004", False), (".iter_0000006.partial", True)):
        (tmp_path / name).mkdir()
        if whole:
            (tmp_path / name / "state.json").write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_0000002"
    assert latest_checkpoint(tmp_path / "absent") is None


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def write_files(path: str, keep: int = 9, names: tuple[str, ...] = ("a.distcp", "b.distcp")) -> None:
    """A checkpoint whose files are not tensors; the first rank writes them."""

    def prepare(partial: Path) -> RankWriter:
        files = [partial / name for name in names] if dist.get_rank() == 0 else []

        def write() -> tuple[list[Path], None]:
            for file in files:
                file.write_bytes(file.name.encode() * 1000)
            return files, None

        return RankWriter(write, lambda _: None)

    CheckpointWrite(Path(path), prepare, {"state": {"step": 1}}, keep).finish()


def verified(folder: str) -> tuple[Path | None, list[str]]:
    return newest_verified(Path(folder))


@pytest.mark.parametrize(
    ("harm", "seen_by_size", "words"),
    [
        (Path.unlink, True, "b.distcp is missing"),
        (truncate, True, "b.distcp has 7999 bytes, not 8000"),
        (flip_a_byte, False, "the content of b.distcp has changed"),
    ],
)
def test_damaged_checkpoint_is_left_out_for_the_one_before(
    pool: WorkerPool, tmp_path: Path, harm: Callable[[Path], None], seen_by_size: bool, words: str
) -> None:
    older, newer = tmp_path / "iter_0000002", tmp_path / "iter_0000004"
    for path in (older, newer):
        pool.run(2, write_files, str(path))
    assert pool.run(2, verified, str(tmp_path)) == [(newer, [])] * 2
    harm(newer / "b.distcp")
    assert latest_checkpoint(tmp_path) == (older if seen_by_size else newer)
    assert pool.run(2, verified, str(tmp_path)) == [(older, [f"checkpoint {newer}: {words}; left out"])] * 2
    harm(older / "b.distcp")
    path, skipped = pool.run(2, verified, str(tmp_path))[0]
    assert path is None and len(skipped) == 2


def test_digests_of_another_kind_are_named(pool: WorkerPool, tmp_path: Path) -> None:
    pool.run(1, write_files, str(tmp_path / "iter_0000002"))
    state = tmp_path / "iter_0000002" / "state.json"
    content = json.loads(state.read_text())
    content["files"] = {name: [size, digest[:32], "0badf00d"] for name, (size, digest) in content["files"].items()}
    state.write_text(json.dumps(content))
    assert latest_checkpoint(tmp_path) is None
    assert "has the digests of an earlier version; go on with that version" in pool.run(1, verified, str(tmp_path))[0][1][0]


def test_oldest_checkpoints_go_first(pool: WorkerPool, tmp_path: Path) -> None:
    for step in range(1, 5):
        pool.run(1, write_files, str(tmp_path / f"iter_{step:07d}"), 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["iter_0000004", "iter_0000003"]
    left = ["iter_0000003", "iter_0000004", "latest_checkpointed_iteration.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_later_checkpoints_do_not_push_a_new_one_out(pool: WorkerPool, tmp_path: Path) -> None:
    """A run that left out a damaged checkpoint of step 4 and goes on from step 2."""
    for step in (2, 4):
        pool.run(1, write_files, str(tmp_path / f"iter_{step:07d}"), 2)
    flip_a_byte(tmp_path / "iter_0000004" / "b.distcp")
    pool.run(1, write_files, str(tmp_path / "iter_0000003"), 1)
    assert pool.run(1, verified, str(tmp_path))[0][0] == tmp_path / "iter_0000003"


def save_in_vain(student: str, folder: str, obstacle: str) -> tuple[str, list[str]]:
    """A good checkpoint, then one that meets the obstacle: its message, and what is left."""
    trainer, _ = _train(student, student, Case(parallel=ParallelConfig(tp=2)), range(1))
    path = Path(folder)
    start_checkpoint(path, trainer, TrainState(step=1), seed=1, keep=1).finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if obstacle == f"disk full on rank {trainer.layout.tp_rank}":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    if obstacle == "file in the way":
        path = path / "occupied"
        path.write_text("")
    dist.barrier()
    try:
        start_checkpoint(path, trainer, TrainState(step=2), seed=1, keep=1).finish()
    except SaveFailed as error:
        return str(error), sorted(each.name for each in Path(folder).iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "saved", []


def save_where_the_folder_vanishes(student: str, folder: str) -> str:
    """A good checkpoint, then one whose folder is removed when everything but Megatron's last files is in it."""
    trainer, _ = _train(student, student, Case(parallel=ParallelConfig(tp=2)), range(1))
    path = Path(folder)
    start_checkpoint(path, trainer, TrainState(step=1), seed=1, keep=1).finish()
    write = start_checkpoint(path, trainer, TrainState(step=2), seed=1, keep=1)
    while not write.written():
        time.sleep(0.05)
    if trainer.layout.tp_rank == 0:
        shutil.rmtree(path / ".iter_0000002.partial")
    dist.barrier()
    try:
        write.finish()
    except SaveFailed as error:
        return str(error)
    return "saved"


def test_folder_that_vanishes_is_a_failed_save_on_every_rank(pool: WorkerPool, models: tuple[str, str], tmp_path: Path) -> None:
    for message in pool.run(2, save_where_the_folder_vanishes, models[0], str(tmp_path)):
        assert message.startswith("No such file or directory") and ".iter_0000002.partial" in message
    assert pool.run(2, verified, str(tmp_path))[0] == (tmp_path / "iter_0000001", [])


@pytest.mark.parametrize(
    ("obstacle", "words", "left"),
    [
        ("disk full on rank 0", "File too large", []),
        ("disk full on rank 1", "File too large", []),
        ("file in the way", "Not a directory", ["occupied"]),
    ],
)
def test_failure_to_write_is_agreed_on_and_leaves_the_last_checkpoint(
    pool: WorkerPool, models: tuple[str, str], tmp_path: Path, obstacle: str, words: str, left: list[str]
) -> None:
    for message, names in pool.run(2, save_in_vain, models[0], str(tmp_path), obstacle):
        # OSError is all that 0.19 keeps of the reason; torch's writer may hide it, by where in the file the limit falls.
        assert words in message or "OSError" in message or message.startswith("a file could not be written whole")
        assert names == sorted([*left, "iter_0000001", "latest_checkpointed_iteration.txt"])
    assert damage(tmp_path / "iter_0000001") is None
    path, _ = pool.run(2, verified, str(tmp_path))[0]
    assert path == tmp_path / "iter_0000001"
