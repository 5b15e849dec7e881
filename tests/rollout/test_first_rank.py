"""What ends the first rank's work ends it on all ranks, as the same kind of end: the exit code follows from it."""

from __future__ import annotations

from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.types import OpdError, RunStopped
from tests.worker_pool import WorkerPool

FAILURES = [RunStopped("no engine is left"), OpdError("bad input"), ValueError("a bug")]


def ends() -> list[tuple[str, str]]:
    first_rank, seen = FirstRank(), []
    for failure in FAILURES:
        for run in (first_rank.run, first_rank.everywhere):

            def fail(failure: Exception = failure) -> None:
                raise failure

            try:
                run(fail)
            except (OpdError, RunStopped) as error:
                seen.append((type(error).__name__, str(error)))
    return seen


def test_end_of_the_first_rank_is_that_of_all(pool: WorkerPool) -> None:
    expected = [("RunStopped", "no engine is left"), ("OpdError", "bad input"), ("UnexpectedError", "ValueError: a bug")]
    assert pool.run(2, ends) == [[each for each in expected for _ in range(2)]] * 2
