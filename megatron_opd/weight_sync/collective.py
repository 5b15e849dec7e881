"""Weights to SGLang servers by broadcast in a process group of the trainer's first rank and every engine rank.

The trainer's HF-named stream is sent in buckets of bounded size, each one broadcast of bytes. An engine rank receives whole
tensors and keeps its shard: SGLang's broadcast offers nothing else.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, TCPStore
from torch.distributed.distributed_c10d import Backend, GroupName, _new_process_group_helper, _world

from megatron_opd.mcore.hf_mapping import export_weights
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.sglang.client import Client, Endpoint, EngineError
from megatron_opd.sglang.first_rank import on_first_rank
from megatron_opd.types import OpdError

_GROUP = "megatron_opd_weights"
Bucket = list[tuple[str, Tensor]]


class CollectiveSync:
    """Every method is collective over the trainer's world."""

    def __init__(
        self,
        trainer: Trainer,
        endpoints: Sequence[Endpoint],
        *,
        engine_tp: int,
        host: str,
        backend: str,
        bucket_bytes: int,
        timeout: float,
    ) -> None:
        """Join the group. Raises OpdError on every rank.

        Args:
            endpoints: of the servers, on the first rank.
            host: the trainer's address, as the servers reach it.
            backend: "nccl" or "gloo".
            bucket_bytes: of one broadcast; a larger tensor is one by itself.
            timeout: seconds for one call or broadcast.
        """
        self._trainer, self._bucket_bytes, self._timeout = trainer, bucket_bytes, timeout
        self._clients = [Client(endpoint, timeout) for endpoint in endpoints]
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(self._clients)))
        self._group: ProcessGroup | None = None
        self._sessions = False
        on_first_rank(lambda: self._join(engine_tp, host, backend))

    def _join(self, engine_tp: int, host: str, backend: str) -> None:
        size, port = 1 + engine_tp * len(self._clients), _free_port(host)
        joining = [
            self._threads.submit(
                client.post,
                "/init_weights_update_group",
                master_address=host,
                master_port=port,
                rank_offset=1 + engine_tp * number,
                world_size=size,
                group_name=_GROUP,
                backend=backend,
            )
            for number, client in enumerate(self._clients)
        ]
        self._group = _process_group(host, port, size, backend, timedelta(seconds=self._timeout))
        _results(joining)
        # Between 0.5.19 and 0.5.21 SGLang put updates into sessions.
        self._sessions = all(client.supports("/begin_weight_update") for client in self._clients)

    def push(self, version: int) -> None:
        """The student's current weights become the servers'; their later responses carry ``version``.

        Raises OpdError on every rank, with the server's name, where a call fails or a server then reports another version.
        """
        trainer = self._trainer
        trainer.complete_parameters()
        stream = export_weights(trainer.chunks, trainer.spec.architecture, trainer.spec.dims, trainer.layout)
        failure: OpdError | None = None
        if dist.get_rank() == 0:
            try:
                self._send(stream, version)
            except OpdError as error:
                failure = error
        for _ in stream:  # collective, on every rank to its end
            pass

        def outcome() -> None:
            if failure is not None:
                raise failure

        on_first_rank(outcome)

    def leave(self) -> None:
        """The servers and the first rank forget the group; not collective."""
        if self._group is not None:
            self._all(lambda client: client.post("/destroy_weights_update_group", group_name=_GROUP))
            dist.destroy_process_group(self._group)
            self._group = None

    def _send(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self._sessions:
            self._all(lambda client: client.post("/begin_weight_update"))
        for bucket in buckets(stream, self._bucket_bytes):
            self._broadcast(bucket, version)
        if self._sessions:
            self._all(lambda client: client.post("/end_weight_update"))
        self._all(lambda client: client.post("/flush_cache"))
        for client in self._clients:
            found = client.get("/model_info").get("weight_version")
            if found != str(version):
                raise EngineError(f"SGLang server {client.endpoint.url}: has weights of version {found}, not {version}")

    def _broadcast(self, bucket: Bucket, version: int) -> None:
        receiving = [
            self._threads.submit(
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
            for client in self._clients
        ]
        flat = torch.cat([tensor.detach().flatten().view(torch.uint8) for _, tensor in bucket])  # [bytes]
        sending = dist.broadcast(flat, src=0, group=self._group, async_op=True)
        deadline = time.monotonic() + self._timeout
        while not sending.is_completed():
            for call in receiving:
                if call.done() and call.exception() is not None:
                    _results([call])  # a server that refused never receives, and the broadcast would wait for it
            if time.monotonic() > deadline:
                raise EngineError(f"SGLang: a broadcast of weights was not received in {self._timeout:.0f} s")
            time.sleep(0.0005)
        _results(receiving)

    def _all(self, call: Callable[[Client], object]) -> None:
        _results([self._threads.submit(call, client) for client in self._clients])


def buckets(stream: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[Bucket]:
    """Consecutive tensors of at most ``limit`` bytes together, or one that is larger."""
    bucket: Bucket = []
    size = 0
    for name, tensor in stream:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.clone()))  # the stream may reuse its buffers
        size += tensor.nbytes
    if bucket:
        yield bucket


def _results(calls: Sequence[Future[Any]]) -> None:
    for call in calls:
        call.result()


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _process_group(host: str, port: int, size: int, backend: str, timeout: timedelta) -> ProcessGroup:
    """The first rank of a group beside torch's world, with the names under which SGLang's ranks meet us."""
    store = TCPStore(host, port, size, is_master=True, timeout=timeout, wait_for_workers=False)
    group, _ = _new_process_group_helper(
        size, 0, [], Backend(backend), PrefixStore(_GROUP, store), group_name=GroupName(_GROUP), timeout=timeout
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group
