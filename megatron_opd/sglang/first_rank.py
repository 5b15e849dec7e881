"""What the first rank alone can do, with its outcome on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.types import OpdError, RunStopped, UnexpectedError

Result = TypeVar("Result")
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
        return self.rank == 0

    @property
    def rank(self) -> int:
        """This process's in the world."""
        return dist.get_rank()

    def run(self, action: Callable[[], Result]) -> Result:
        """The first rank's result on every rank; its OpdError and RunStopped as such. Collective over the world."""
        result, failure, cause = _attempt(action) if self.here else (None, None, None)
        outcome: list[tuple[Result | None, _Failure | None]] = [(result, failure)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        result, failure = outcome[0]
        if failure is not None:
            raise failure.error() from cause
        return result  # type: ignore[return-value]

    def everywhere(self, action: Callable[[], Result]) -> Result:
        """Each rank's own result; where one fails, the first failure on every rank. Collective over the world.

        ``action`` itself is not collective over the world, or is on all ranks alike, whatever fails.
        """
        result, failure, cause = _attempt(action)
        first = next((each for each in self.gather(failure) if each is not None), None)
        if first is not None:
            raise first.error() from cause
        return result  # type: ignore[return-value]

    def bring(self, tensor: Tensor | None, source: int, like: Tensor) -> Tensor | None:
        """On the first rank what the global rank ``source`` has, None elsewhere; CPU tensors shaped and typed as ``like``.

        Point to point; ``tensor`` is looked at on ``source`` alone.
        """
        if source == dist.get_rank():
            assert tensor is not None
            if self.here:
                return tensor
            dist.send(tensor, 0, group=self._group)
        elif self.here:
            received = torch.empty_like(like)
            dist.recv(received, source, group=self._group)
            return received
        return None

    def gather(self, value: Result) -> list[Result]:
        """Every rank's value, in the order of the ranks, on every rank. Collective over the world."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


@dataclass(frozen=True)
class _Failure:
    """What travels of an exception."""

    kind: type[OpdError | RunStopped]
    message: str

    def error(self) -> OpdError | RunStopped:
        return self.kind(self.message)


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, _Failure | None, Exception | None]:
    try:
        return action(), None, None
    except (OpdError, RunStopped) as error:
        return None, _Failure(type(error), str(error)), error
    except Exception as error:  # the other ranks wait for an outcome, whatever it is
        return None, _Failure(UnexpectedError, f"{type(error).__name__}: {error}"), error
