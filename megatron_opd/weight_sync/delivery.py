"""What carries weights to engines, and what it says of a delivery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_opd.types import OpdError
from megatron_opd.weight_sync.members import Members


@dataclass(frozen=True)
class Delivery:
    """Of one version, over all engines; equal on all ranks."""

    received: float  # bytes, by an engine rank, on average
    kept: float  # bytes of its own parameters, on average


class Carrier(Protocol):
    """The first two methods are collective over the trainer's world, and raise on all ranks or none.

    ``members`` is None but on the first rank.
    """

    def form(self, members: Members | None) -> None:
        """Get to know the engines; before the first :meth:`send`, and after each change among them. Raises OpdError."""
        ...

    def send(self, members: Members | None, version: int, *, check: bool) -> Delivery:
        """The student's current weights, within a session of the engines.

        Args:
            check: compare a digest of every tensor that an engine rank then has with one of what it was sent.

        Raises OpdError where a transfer fails, WeightsDiffer where a digest does.
        """
        ...

    def leave(self, members: Members | None) -> None:
        """Give up what :meth:`form` made. Not collective.

        ``members``: on the first rank, at the end of a run without failure, to be told. One that does not answer is no error.
        """
        ...


class WeightsDiffer(OpdError):
    """An engine has other weights than it was sent; names engine and tensor."""
