"""What the first rank alone can do, with its outcome on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_opd.types import OpdError

Result = TypeVar("Result")


def on_first_rank(action: Callable[[], Result]) -> Result:
    """The first rank's result on every rank; its OpdError too."""
    cause: Exception | None = None
    outcome: list[tuple[Result | None, str | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(action(), None)]
        except OpdError as error:
            outcome = [(None, str(error))]
        except Exception as error:  # the other ranks wait for an outcome, whatever it is
            cause = error
            outcome = [(None, f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise OpdError(failure) from cause
    return result  # type: ignore[return-value]
