"""This process, and those beside it."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # by which schedulers ask a run to end
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_SYNC_FILE_RANGE_WRITE = 2  # fcntl.h
# Looked up here: between fork and exec of a process with threads, a lock of the dynamic loader may be held for ever.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_prctl = _libc.prctl if _libc is not None else None

_mallopt = getattr(_libc, "mallopt", None)
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def end_with_parent(ignored: Iterable[signal.Signals] = STOP_SIGNALS) -> None:
    """Called in a child: the kernel kills it when the parent's *thread* that started it ends, however it ends. Linux only.

    ``ignored``, which outlasts an exec: schedulers send the signals to all processes, and the parent still needs this one.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def reuse_memory() -> None:
    """What this process frees it keeps for itself: large tensors are then made without the kernel's zeroing pages for each.

    Its memory stays at its peak. glibc only.
    """
    if _mallopt is not None:
        _mallopt(_M_MMAP_MAX, 0)
        _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def begin_sync(descriptor: int, start: int, nbytes: int) -> None:
    """The system begins to write these bytes of a file to the disk, and this process goes on: ``fsync`` then waits less.

    Elsewhere than on Linux, and where the file system refuses, the whole is left to ``fsync``.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, start, nbytes, _SYNC_FILE_RANGE_WRITE)


@contextmanager
def loading() -> Iterator[None]:
    """For imports of torch and Megatron: what they make lives as long as the process, and is no garbage to look for."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class QuickExit:
    """Ends this process, once ``code`` is set, without freeing its objects one by one: seconds for each rank.

    What others have registered with ``atexit`` since has been called by then.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self._end)

    def _end(self) -> None:
        if self.code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)
