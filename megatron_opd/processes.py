"""Processes beside this one."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Looked up here: between fork and exec of a process with threads, a lock of the dynamic loader may be held for ever.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Called in a child: the kernel kills it when the parent's *thread* that started it ends, however it ends. Linux only."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
