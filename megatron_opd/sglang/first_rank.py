"""What the first rank alone can do, with its outcome on every rank."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_opd.types import OpdError, RunStopped

Result = TypeVar("Result")
_Failure = tuple[type[Exception], str]
_PATIENCE = timedelta(days=7)


class FirstRank:
    """Control over a gloo group of its own.

    The other ranks wait for rollouts as long as these take: a time-out would end a healthy run. Where the first rank dies its
    connections break, and they learn it at once; where a server hangs, the first rank's own time-outs name it.
    """

    def __init__(self) -> None:
        """Collective over the world."""
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def here(self) -> bool:
        return dist.get_rank() == 0

    def run(self, action: Callable[[], Result]) -> Result:
        """The first rank's result on every rank; its OpdError and RunStopped too. Collective over the world."""
        cause: Exception | None = None
        outcome: list[tuple[Result | None, _Failure | None]] = [(None, None)]
        if self.here:
            try:
                outcome = [(action(), None)]
            except Exception as error:  # the other ranks wait for an outcome, whatever it is
                cause = error
                outcome = [(None, _failure(error))]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        result, failure = outcome[0]
        if failure is not None:
            kind, message = failure
            raise kind(message) from cause
        return result  # type: ignore[return-value]

    def everywhere(self, action: Callable[[], Result]) -> Result:
        """Each rank's own result; where one fails, the first failure on every rank. Collective over the world.

        ``action`` itself is not collective over the world, or is on all ranks alike, whatever fails.
        """
        result, failure, cause = None, None, None
        try:
            result = action()
        except Exception as error:
            failure, cause = _failure(error), error
        first = next((each for each in self.gather(failure) if each is not None), None)
        if first is not None:
            kind, message = first
            raise kind(message) from cause
        return result  # type: ignore[return-value]

    def gather(self, value: Result) -> list[Result]:
        """Every rank's value, in the order of the ranks, on every rank. Collective over the world."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def _failure(error: Exception) -> _Failure:
    """As what the other ranks raise it."""
    if isinstance(error, RunStopped):
        return RunStopped, str(error)
    return OpdError, str(error) if isinstance(error, OpdError) else f"{type(error).__name__}: {error}"
