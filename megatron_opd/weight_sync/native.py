"""Whole tensors to every engine rank, by SGLang's own broadcast: for servers that were started without our loader.

tp times the bytes that a rank keeps, all from the trainer's first rank, and no digests: the probe alone proves the outcome.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import Backend, GroupName, _new_process_group_helper, _world

from megatron_opd.mcore.trainer import Trainer
from megatron_opd.sglang.client import EngineError
from megatron_opd.sglang.engine_side.opd_weights import TransferFailed, finish
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.store import open_store
from megatron_opd.weight_sync.delivery import Delivery
from megatron_opd.weight_sync.members import Members

_FUSED = ("q_a_proj.weight", "kv_a_proj_with_mqa.weight")  # of latent attention, neighbours in the stream
Bucket = list[tuple[str, Tensor]]  # Hugging Face name, full tensor


class Native:
    """A :class:`~megatron_opd.weight_sync.delivery.Carrier` that any SGLang server takes."""

    def __init__(
        self, trainer: Trainer, first_rank: FirstRank, *, host: str, backend: str, bucket_bytes: int, timeout: float
    ) -> None:
        """As :class:`~megatron_opd.weight_sync.collective.Collective`; ``host``: the trainer's, as the engines reach it."""
        self._trainer, self._first_rank = trainer, first_rank
        self._host, self._backend, self._bucket_bytes, self._timeout = host, backend, bucket_bytes, timeout
        self._group: Any = None  # this process and every rank of every engine; on the first rank
        self._name = ""  # another one each time: neither side takes a name twice

    def form(self, members: Members | None) -> None:
        def join() -> None:
            assert members is not None
            self.leave(None)
            self._name = f"megatron_opd_weights_{secrets.token_hex(4)}"
            store = open_store(self._host, self._timeout)
            size = 1 + members.tp * len(members)
            calls = members.post(
                "/init_weights_update_group",
                lambda engine: {
                    "master_address": self._host,
                    "master_port": int(store.port),
                    "rank_offset": 1 + members.tp * engine,
                    "world_size": size,
                    "group_name": self._name,
                    "backend": self._backend,
                },
            )
            self._group = _torch_group(self._backend, store, self._name, size, self._timeout)
            members.results(calls)

        self._first_rank.run(join)

    def send(self, members: Members | None, version: int, *, check: bool) -> Delivery:
        stream = self._trainer.export().whole()

        def transfer() -> float:
            try:
                return (
                    0.0 if members is None else sum(self._broadcast(each, members, version) for each in self._buckets(stream))
                )
            finally:
                for _ in stream:  # collective, on every rank to its end
                    pass

        received = self._first_rank.everywhere(transfer)
        tp = self._first_rank.run(lambda: 1 if members is None else members.tp)
        total = self._first_rank.run(lambda: received)
        return Delivery(total, total / tp)

    def leave(self, members: Members | None) -> None:
        if members is not None:
            with suppress(EngineError):
                members.results(members.post("/destroy_weights_update_group", lambda engine: {"group_name": self._name}))
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _broadcast(self, bucket: Bucket, members: Members, version: int) -> int:
        """Returns the bytes that an engine rank receives."""
        calls = members.post(
            "/update_weights_from_distributed",
            lambda engine: {
                "names": [name for name, _ in bucket],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                "shapes": [list(tensor.shape) for _, tensor in bucket],
                "group_name": self._name,
                "flush_cache": False,
                "load_format": "flattened_bucket",
                "weight_version": str(version),
            },
        )
        flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])  # [bytes]
        work = dist.broadcast(flat, group_src=0, group=self._group, async_op=True)
        try:
            finish([work], members.store, self._timeout)
        except TransferFailed as error:
            raise EngineError(f"weights to SGLang: {error}") from error
        members.results(calls)
        return flat.nbytes

    def _buckets(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
        """Consecutive tensors of at most ``bucket_bytes`` together, or what is larger and cannot be parted."""
        bucket: Bucket = []
        size = 0
        for name, tensor in stream:
            # SGLang fuses the two in one call of its loader, and forgets one that comes without the other.
            fused = name.endswith(_FUSED[1]) and bucket and bucket[-1][0] == name.replace(_FUSED[1], _FUSED[0])
            if bucket and size + tensor.nbytes > self._bucket_bytes and not fused:
                yield bucket
                bucket, size = [], 0
            bucket.append((name, tensor.detach().clone()))  # the stream may reuse its buffers
            size += tensor.nbytes
        if bucket:
            yield bucket


def _torch_group(backend: str, store: TCPStore, name: str, size: int, timeout: float) -> Any:
    """As SGLang makes its side: a group of torch.distributed beside the world; this process is its first rank."""
    group, _ = _new_process_group_helper(
        size,
        0,
        [],
        Backend(backend),
        PrefixStore(name, store),
        group_name=GroupName(name),
        timeout=timedelta(seconds=timeout),
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group
