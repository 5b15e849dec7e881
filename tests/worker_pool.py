"""Persistent worker processes for distributed tests: the imports of torch and Megatron are paid once a session."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_opd.processes import loading

# After the first failure the other ranks get this long to report theirs: the first to speak is often only the victim of
# another rank's error ("connection closed by peer").
GRACE_SECONDS = 1.0
# Megatron's DDP is never freed (its gradient hooks are a cycle through C++), nor are its gloo groups, each of which polls its
# sockets from a thread of its own: workers with many of them take the cores from the tests that follow.
MAX_THREADS = 200
START_SECONDS = 300.0


class WorkerError(RuntimeError):
    """``fn`` raised on a rank or the rank's process died; the message holds the traceback of each rank that reported one."""


@dataclass(frozen=True)
class _Job:
    rank: int
    world_size: int
    folder: Path  # of this run: where the ranks meet, and where they leave their stacks when they hang
    timeout: float
    call: bytes  # pickled (fn, args), unpickled inside the worker's try block


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection


class WorkerPool:
    """Runs module-level functions under a gloo process group, one spawned process for each rank.

    Processes are started when first needed and kept; an error or a timeout kills all of them, so no test inherits the state of
    a failed one. Arguments and results are copied (plain pickle, no shared memory and no file descriptors).
    """

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """``fn(*args)`` on ranks 0..world_size-1, each with a fresh default process group; returns the results by rank.

        ``fn`` must be importable by name. ``timeout`` is in seconds and excludes the start of new workers. Raises WorkerError
        with the failing ranks' tracebacks, or TimeoutError with the stacks of the ranks that hang.
        """
        call = pickle.dumps((fn, args))
        try:
            self._start(world_size)
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                for rank, worker in enumerate(self._workers[:world_size]):
                    job = _Job(rank, world_size, folder, timeout, call)
                    worker.connection.send_bytes(pickle.dumps(job))
                replies = self._collect(world_size, timeout, folder)
            results = [pickle.loads(replies[rank]) for rank in range(world_size)]
            if any(psutil.Process(worker.process.pid).num_threads() > MAX_THREADS for worker in self._workers):
                self.close()
            return results
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the workers with all that they started; a later ``run`` starts new ones."""
        for worker in self._workers:
            assert worker.process.pid is not None
            with contextlib.suppress(ProcessLookupError):  # dead already, or not yet at the head of its group
                os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def _start(self, world_size: int) -> None:
        # Forked from a process that has imported, and done nothing: from this one they would inherit torch's threads and locks.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preloaded"])
        new = []
        for rank in range(len(self._workers), world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), name=f"test-rank-{rank}")
            process.start()
            theirs.close()  # else the worker's death would not show as end of file
            new.append(_Worker(process, ours))
        self._workers += new
        for worker in new:
            if not worker.connection.poll(START_SECONDS):
                raise TimeoutError(f"{worker.process.name} did not start within {START_SECONDS:g} s")
            worker.connection.recv_bytes()

    def _collect(self, world_size: int, timeout: float, folder: Path) -> dict[int, bytes]:
        pending = {worker.connection: rank for rank, worker in enumerate(self._workers[:world_size])}
        results: dict[int, bytes] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    succeeded, payload = pickle.loads(connection.recv_bytes())
                except EOFError:
                    process = self._workers[rank].process
                    process.join()
                    succeeded, payload = False, f"the process died with exit code {process.exitcode}"
                if succeeded:
                    results[rank] = payload
                else:
                    failures.append(f"rank {rank} of {world_size}: {payload}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            raise WorkerError("\n".join(failures))
        if pending:
            late = sorted(pending.values())
            stacks = [f"rank {rank}:\n{(folder / f'stack-{rank}').read_text()}" for rank in late]
            raise TimeoutError("\n".join([f"ranks {late} of {world_size} did not return within {timeout:g} s", *stacks]))
        return results


def _serve(connection: Connection) -> None:
    """A worker's life: jobs in, ``(succeeded, pickled result or traceback)`` out, until the pool goes away."""
    os.setsid()  # heads a process group, so that what it starts (Megatron's checkpoint writers) can be killed with it
    torch.set_num_threads(1)
    # Megatron must never be imported before its CPU patches, and an argument made beside a patched Megatron may name it.
    with loading():
        import_module("megatron_opd.mcore")
    connection.send_bytes(b"ready")
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        with (job.folder / f"stack-{job.rank}").open("w") as stack:
            faulthandler.dump_traceback_later(0.9 * job.timeout, file=stack)
            try:
                reply: tuple[bool, bytes | str] = (True, _execute(job))
            except BaseException:  # pytest's own outcomes do not derive from Exception
                reply = (False, traceback.format_exc())
            faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(pickle.dumps(reply))


def _execute(job: _Job) -> bytes:
    torch.manual_seed(job.rank)  # whatever ran before in this process
    # Longer than the pool's own timeout, which then speaks first and names all the ranks that hang, not one of their victims.
    patience = timedelta(seconds=2 * job.timeout)
    dist.init_process_group(
        "gloo", init_method=(job.folder / "rendezvous").as_uri(), rank=job.rank, world_size=job.world_size, timeout=patience
    )
    fn, args = pickle.loads(job.call)
    result = pickle.dumps(fn(*args))
    dist.barrier()  # a rank that closes its sockets early would break the others' last collective
    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    dist.destroy_process_group()
    return result
