"""Process groups beside torch's world, and waiting in them without hanging."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, TCPStore, Work
from torch.distributed.distributed_c10d import Backend, GroupName, _new_process_group_helper, _world

from megatron_opd.sglang.client import EngineError

Bucket = list[tuple[str, Tensor]]  # HF name, full tensor
_POLL_SECONDS = 0.0005


def process_group(host: str, port: int, size: int, backend: str, name: str, timeout: float) -> ProcessGroup:
    """The first rank of a group, which waits for the others; ``timeout``: seconds."""
    limit = timedelta(seconds=timeout)
    store = TCPStore(host, port, size, is_master=True, timeout=limit, wait_for_workers=False)
    group, _ = _new_process_group_helper(
        size, 0, [], Backend(backend), PrefixStore(name, store), group_name=GroupName(name), timeout=limit
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group


def wait_for(sending: Sequence[Work], receiving: Sequence[Future[Any]], timeout: float) -> None:
    """Until both are done. Raises EngineError: a server that refused would never receive, and the send would wait for it."""
    deadline = time.monotonic() + timeout
    while not all(work.is_completed() for work in sending):
        results([call for call in receiving if call.done() and call.exception() is not None])
        if time.monotonic() > deadline:
            raise EngineError(f"SGLang: weights were not received in {timeout:.0f} s; see the logs of the servers")
        time.sleep(_POLL_SECONDS)
    results(receiving)


def results(calls: Sequence[Future[Any]]) -> None:
    """Raises the first failure."""
    for call in calls:
        call.result()
