"""A run that is asked to end: by Slurm before its time limit, by a preemption, by ``kill``."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from megatron_opd.processes import STOP_SIGNALS


class StopSignal:
    """Within this context SIGTERM and SIGUSR1 do not end the process: the loop asks, and ends after the step that it is in.

    For the main thread. Schedulers send a signal to some of a run's processes or to all of them, at times that differ.
    """

    def __init__(self) -> None:
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def received(self) -> str | None:
        """The signal's name, if any rank has one by now. Collective over the world, equal on all ranks."""
        number = torch.tensor([self._received])  # on CPU: no device is made to wait
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if int(number) else None

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received = number
