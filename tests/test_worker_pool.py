"""The pool that every distributed test stands on."""

from __future__ import annotations

import multiprocessing
import os
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_opd.config import ParallelConfig
from tests.worker_pool import WorkerError, WorkerPool


def _rank_and_size() -> tuple[int, int, int]:
    return dist.get_rank(), dist.get_world_size(), os.getpid()


def _scale_and_sum(values: torch.Tensor) -> dict[str, torch.Tensor]:
    scaled = (values * (dist.get_rank() + 1)).requires_grad_()
    total = scaled.detach().clone()
    dist.all_reduce(total)
    return {"scaled": scaled * 2, "total": total, "view": total[1:]}


def _fail_on(failing_rank: int) -> None:
    if dist.get_rank() == failing_rank:
        raise ValueError(f"no luck on {failing_rank}")
    dist.barrier()


def _die_on(failing_rank: int) -> None:
    if dist.get_rank() == failing_rank:
        os._exit(7)
    dist.barrier()


def _hang_on(hanging_rank: int) -> None:
    if dist.get_rank() == hanging_rank:
        time.sleep(600)


def _unpicklable() -> object:
    return lambda: None


def _tensor_parallel_size(size: int) -> int:
    # Imported here, so that the workers that other tests kill need not import Megatron again.
    from megatron_opd.mcore.parallel import init_layout

    return init_layout(ParallelConfig(tp=size), seed=1).tp_size


def _start_sleeper() -> int | None:
    sleeper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    sleeper.start()
    return sleeper.pid


def _global_random_draw() -> float:
    return float(torch.rand(()))


@pytest.mark.parametrize("world_size", [1, 3, 2])
def test_results_come_back_in_rank_order(pool: WorkerPool, world_size: int) -> None:
    results = pool.run(world_size, _rank_and_size)
    assert [(rank, size) for rank, size, _ in results] == [(rank, world_size) for rank in range(world_size)]


def test_workers_persist_between_runs(pool: WorkerPool) -> None:
    first = [pid for _, _, pid in pool.run(2, _rank_and_size)]
    assert [pid for _, _, pid in pool.run(2, _rank_and_size)] == first
    assert os.getpid() not in first and len(set(first)) == 2


def test_tensors_travel_both_ways_by_value(pool: WorkerPool) -> None:
    values = torch.randn(4, 3, dtype=torch.float64)
    for rank, result in enumerate(pool.run(2, _scale_and_sum, values)):
        torch.testing.assert_close(result["scaled"].detach(), values * (rank + 1) * 2, rtol=0, atol=0)
        torch.testing.assert_close(result["total"], values * 3)
        torch.testing.assert_close(result["view"], result["total"][1:], rtol=0, atol=0)


def test_every_run_starts_from_the_same_random_state_which_differs_between_ranks(pool: WorkerPool) -> None:
    first = pool.run(2, _global_random_draw)
    assert pool.run(2, _global_random_draw) == first
    assert first[0] != first[1]


def test_megatron_groups_do_not_outlive_a_run(pool: WorkerPool) -> None:
    assert pool.run(2, _tensor_parallel_size, 2) == [2, 2]
    assert pool.run(2, _tensor_parallel_size, 1) == [1, 1]


def test_exception_on_one_rank_propagates_with_its_traceback(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="rank 1 of 2: Traceback") as caught:
        pool.run(2, _fail_on, 1)
    assert "ValueError: no luck on 1" in str(caught.value)
    assert "in _fail_on" in str(caught.value)
    assert len(pool.run(2, _rank_and_size)) == 2


def test_death_of_a_process_is_reported_with_its_exit_code(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="rank 1 of 2: the process died with exit code 7"):
        pool.run(2, _die_on, 1)
    assert len(pool.run(2, _rank_and_size)) == 2


def test_result_that_cannot_be_pickled_is_an_error_of_its_rank(pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="rank 0 of 1: Traceback"):
        pool.run(1, _unpicklable)


def test_ranks_that_hang_are_named_at_the_timeout_with_their_stacks(pool: WorkerPool) -> None:
    pool.run(2, _rank_and_size)  # the start of workers takes longer than the timeout below
    started = time.monotonic()
    # Rank 0 has returned from the function and waits for rank 1 at the end of the run.
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 did not return within 5 s") as caught:
        pool.run(2, _hang_on, 1, timeout=5.0)
    assert time.monotonic() - started < 30
    _, _, stack_of_rank_1 = str(caught.value).partition("rank 1:")
    assert "in _hang_on" in stack_of_rank_1
    assert len(pool.run(2, _rank_and_size)) == 2


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_closed_pool_leaves_no_process_not_even_its_workers_children() -> None:
    own = WorkerPool()
    try:
        [(_, _, worker)] = own.run(1, _rank_and_size)
        [sleeper] = own.run(1, _start_sleeper)
    finally:
        own.close()
    deadline = time.monotonic() + 30  # the system may take a moment to carry out the kill
    while (_lives(worker) or _lives(sleeper)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(worker)
    assert not _lives(sleeper)
