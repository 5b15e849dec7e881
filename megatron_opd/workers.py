"""Several processes that share tasks: forked, so that they have whatever the tasks need, and ended with this one.

A forked process must start no threads of torch's, whose pool the fork has left behind: each has one thread.
"""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Generic, TypeVar

import torch

from megatron_opd.mcore.checkpoint_files import root_cause
from megatron_opd.processes import end_with_parent, reuse_memory
from megatron_opd.types import OpdError

Result = TypeVar("Result")
Report = Callable[[int], None]  # takes the bytes that have just been dealt with
StartReport = Callable[[int], Report]  # takes the bytes that there are
Task = Callable[[Report], Result]
_REPORTED = 1 << 24  # bytes; less often than that costs more than it says
_MOST = 8  # of processes by default: each holds a parameter or two, and few disks are faster


class Interrupted(OpdError):
    """Nothing is wrong with what was asked for: the same command may go on from here."""


def default_processes() -> int:
    return min(len(os.sched_getaffinity(0)), _MOST)


def share(tasks: Sequence[Task[Result]], processes: int, report: Report) -> Generator[tuple[int, Result], None, None]:
    """Each task's number and result, as they are done. At the end, however it comes, no process is left.

    Raises what a task has raised, if OpdError or OSError; Interrupted where memory ran out or a process was killed.
    """
    workers = [_Worker(tasks) for _ in range(min(processes, len(tasks)))]
    waiting = list(reversed(range(len(tasks))))
    try:
        for worker in workers:
            worker.start(waiting.pop())
        busy = {worker.connection: worker for worker in workers}
        while busy:
            for ready in wait(list(busy)):
                worker = busy[ready]  # type: ignore[index]  # wait returns what it was given
                message = worker.receive()
                if isinstance(message, int):
                    report(message)
                    continue
                yield worker.task, message.result
                if waiting:
                    worker.start(waiting.pop())
                else:
                    del busy[worker.connection]
    finally:
        for worker in workers:
            worker.end()


@dataclass(frozen=True)
class _Done(Generic[Result]):
    result: Result


class _Worker(Generic[Result]):
    def __init__(self, tasks: Sequence[Task[Result]]) -> None:
        fork = multiprocessing.get_context("fork")
        self.connection, theirs = fork.Pipe()
        self._process: ForkProcess = fork.Process(target=_work, args=(tasks, theirs, os.getpid()))
        self._process.start()
        theirs.close()  # else its end would not be noticed

    def start(self, task: int) -> None:
        self.task = task
        with suppress(ConnectionError):  # receiving says why
            self.connection.send(task)

    def receive(self) -> int | _Done[Result]:
        """Bytes, or what the task has returned. Raises what it has raised."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise Interrupted(_ended(self._process.exitcode or 0)) from error
        if isinstance(message, Exception):
            raise message
        found: int | _Done[Result] = message
        return found

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _ended(exitcode: int) -> str:
    if exitcode == -signal.SIGKILL:
        return "a worker process was killed, as the system does where memory runs out; take fewer --processes"
    how = f"by signal {signal.Signals(-exitcode).name}" if exitcode < 0 else f"with exit code {exitcode}"
    return f"a worker process ended {how}"


def _work(tasks: Sequence[Task[Result]], connection: Connection, parent: int) -> None:
    end_with_parent()
    if os.getppid() != parent:  # it ended before that
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the parent to handle
    reuse_memory()
    gc.freeze()  # what is the parent's stays shared with it
    torch.set_num_threads(1)
    unreported = 0

    def report(nbytes: int) -> None:
        nonlocal unreported
        unreported += nbytes
        if unreported >= _REPORTED:
            connection.send(unreported)
            unreported = 0

    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            result = tasks[task](report)
        except Exception as error:
            connection.send(portable(error))
            return
        if unreported:
            connection.send(unreported)
            unreported = 0
        connection.send(_Done(result))


def portable(error: Exception) -> OpdError | OSError:
    """What can go to another process, and be shown in one line."""
    if isinstance(error, OpdError):
        return error
    causes = (error, error.__cause__, error.__context__)
    if any(_is_out_of_memory(cause) for cause in causes):
        return Interrupted("out of memory; take fewer --processes, or a machine with more of it")
    for cause in causes:  # torch's archive writer hides the system's reason behind its own
        if isinstance(cause, OSError):
            return OSError(cause.errno, cause.strerror, cause.filename)
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" at {os.path.basename(each.filename)}:{each.lineno}" for each in place)
    return Interrupted(f"failed unexpectedly: {type(error).__name__}{where}: {' '.join(str(error).split())}")


def one_line(error: Exception) -> str:
    return root_cause(cause) if isinstance(cause := portable(error), OSError) else str(cause)


def _is_out_of_memory(error: BaseException | None) -> bool:
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and "allocate memory" in str(error))
    )
