"""To each engine rank whole tensors, by SGLang's own broadcast: for what has no rule for shards."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_opd.sglang.client import Client
from megatron_opd.sglang.server import free_port
from megatron_opd.weight_sync.groups import Bucket, process_group, results, wait_for

_GROUP = "megatron_opd_weights"


class WholeTensors:
    """A transport of :class:`~megatron_opd.weight_sync.collective.CollectiveSync`."""

    def __init__(self, tp: int, timeout: float) -> None:
        self._tp, self._timeout = tp, timeout
        self._group: ProcessGroup | None = None

    def join(self, clients: Sequence[Client], threads: ThreadPoolExecutor, host: str, backend: str) -> None:
        """One group of this process and every rank of every engine."""
        size, port = 1 + self._tp * len(clients), free_port(host)
        joining = [
            threads.submit(
                client.post,
                "/init_weights_update_group",
                master_address=host,
                master_port=port,
                rank_offset=1 + self._tp * number,
                world_size=size,
                group_name=_GROUP,
                backend=backend,
            )
            for number, client in enumerate(clients)
        ]
        self._group = process_group(host, port, size, backend, _GROUP, self._timeout)
        results(joining)

    def send(self, bucket: Bucket, version: int, clients: Sequence[Client], threads: ThreadPoolExecutor) -> int:
        """Returns the bytes that an engine rank received."""
        receiving: list[Future[Any]] = [
            threads.submit(
                client.post,
                "/update_weights_from_distributed",
                names=[name for name, _ in bucket],
                dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                shapes=[list(tensor.shape) for _, tensor in bucket],
                group_name=_GROUP,
                flush_cache=False,
                load_format="flattened_bucket",
                weight_version=str(version),
            )
            for client in clients
        ]
        flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])  # [bytes]
        wait_for([dist.broadcast(flat, group_src=0, group=self._group, async_op=True)], receiving, self._timeout)
        return flat.nbytes

    def leave(self, clients: Sequence[Client]) -> None:
        if self._group is not None:
            for client in clients:
                client.post("/destroy_weights_update_group", group_name=_GROUP)
            dist.destroy_process_group(self._group)
            self._group = None
