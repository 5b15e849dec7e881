"""Weights to engines on the trainer's own devices: through memory that both have, CUDA IPC on GPU, a shared file on CPU.

Each trainer rank writes what its neighbour on the same device keeps into a buffer; the engine rank copies it from there. Only
handles cross a wire.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from megatron_opd.mcore.trainer import Trainer
from megatron_opd.sglang.client import Endpoint
from megatron_opd.sglang.engine_side.opd_weights import digest, synchronize
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.weight_sync.delivery import Delivery
from megatron_opd.weight_sync.members import Members, Ordered, Reports, SharedTensor
from megatron_opd.weight_sync.plan import Digests, Parcel, Plan, conclude, make_plan

_BUFFERS = 2  # one is filled while the engine copies the other


@dataclass(frozen=True)
class _Neighbour:
    """The engine rank on this trainer rank's device."""

    engine: int
    rank: int


class Ipc:
    """A :class:`~megatron_opd.weight_sync.delivery.Carrier` for engines that share the trainer's devices."""

    def __init__(
        self, trainer: Trainer, first_rank: FirstRank, home: Callable[[Endpoint], int], *, tp: int, bucket_bytes: int
    ) -> None:
        """Args:
        home: the trainer's rank on the device of an engine's first rank, whose others follow; asked on the first rank.
        tp: tensor-parallel ranks of each engine.
        bucket_bytes: of the tensors that lie in a buffer together; a larger one lies there by itself.
        """
        self._trainer, self._first_rank, self._home = trainer, first_rank, home
        self._tp, self._bucket_bytes = tp, bucket_bytes
        self._plan: Plan | None = None
        self._neighbour: _Neighbour | None = None  # None: the engine here is lost
        self._buffers: list[_Buffer] = []

    def form(self, members: Members | None) -> None:
        layout, export = self._trainer.layout, self._trainer.export()
        speaks = layout.tp_rank == layout.cp_rank == layout.dp_rank == 0  # one rank of each stage
        offered = self._first_rank.gather(list(export.tensors()) if speaks else [])
        known = {tensor.name: tensor for tensors in offered for tensor in tensors}
        stream = [known[name] for name in export.names()]

        def plan() -> tuple[Plan, list[int]]:
            assert members is not None
            found = make_plan([stream], members, self._trainer.spec.dims, self._bucket_bytes)
            members.reports(members.order(lambda engine, rank: {"action": "join", "groups": [], **found.command(rank)}))
            return found, [self._home(endpoint) for endpoint in members.endpoints]

        self._plan, homes = self._first_rank.run(plan)
        places = {home + rank: _Neighbour(engine, rank) for engine, home in enumerate(homes) for rank in range(self._tp)}
        self._neighbour = places.get(dist.get_rank())

    def send(self, members: Members | None, version: int, *, check: bool) -> Delivery:
        plan = self._plan
        assert plan is not None
        stream = self._trainer.export().whole()
        own: list[list[int]] = []  # digests
        under_way: list[Ordered] = []
        reports: list[Reports] = []
        try:
            for number in range(len(plan.parcels[0])):

                def fill(number: int = number) -> str | SharedTensor | None:
                    return self._fill(stream, plan.parcels[0][number], number, own if check else None)

                handle = self._first_rank.everywhere(fill)
                handles = self._first_rank.gather((self._neighbour, handle))
                last = number == len(plan.parcels[0]) - 1

                def place(number: int = number, handles: list[Any] = handles, last: bool = last) -> None:
                    """Hand this bucket over, and wait until the one before is copied: its buffer comes next."""
                    assert members is not None
                    if last:  # its report has the digests of all
                        reports.extend(members.reports(ordered) for ordered in under_way)
                        under_way.clear()
                    under_way.append(_order(members, number, handles, version, digests=check and last))
                    while len(under_way) >= (1 if last else _BUFFERS):
                        reports.append(members.reports(under_way.pop(0)))

                self._first_rank.run(place)
        finally:
            for _ in stream:  # collective, on every rank to its end
                pass
            self._close_buffers()  # device memory that the rollouts have now
        everyone = self._first_rank.gather((self._neighbour, own)) if check else []
        first_engine = {place.rank: digests for place, digests in everyone if place is not None and place.engine == 0}
        sent: list[Digests] = [[first_engine[rank] for rank in range(self._tp)]] if check else []
        return self._first_rank.run(lambda: conclude(plan, members, _merge(reports), sent))

    def leave(self, members: Members | None) -> None:
        self._close_buffers()
        self._plan = self._neighbour = None

    def _close_buffers(self) -> None:
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []

    def _fill(
        self, stream: Iterator[tuple[str, Tensor]], bucket: Sequence[Parcel], number: int, digests: list[list[int]] | None
    ) -> str | SharedTensor | None:
        """What this rank's neighbour keeps of the next tensors, in a buffer; its handle, None where there is no neighbour.

        Whatever goes wrong, the bucket is read to its end: the stream is collective.
        """
        failure: Exception | None = None
        for name in bucket[0].names:
            found, full = next(stream)
            if self._neighbour is None or failure is not None:
                continue
            try:
                assert found == name
                parcel = bucket[self._neighbour.rank]
                parcel.write(name, full, self._buffer(number).flat)
                if digests is not None and (own := parcel.cut(name, full)) is not None:
                    digests.append(digest(own))
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure
        synchronize(self._trainer.device)
        return None if self._neighbour is None else self._buffer(number).handle()

    def _buffer(self, number: int) -> _Buffer:
        if not self._buffers:
            assert self._plan is not None and self._neighbour is not None
            largest = max(bucket[self._neighbour.rank].nbytes for bucket in self._plan.parcels[0])
            self._buffers = [_Buffer(largest, self._trainer.device) for _ in range(_BUFFERS)]
        return self._buffers[number % _BUFFERS]


class _Buffer:
    """[bytes] uint8 that another process on this machine can reach."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._file: int | None = None
        if device.type == "cpu":  # without a name: nothing is left of it, however this process ends
            self._file = os.memfd_create("megatron_opd_weights")
            self.flat = torch.from_file(self._path, shared=True, size=size, dtype=torch.uint8)
        else:
            self.flat = torch.empty(size, dtype=torch.uint8, device=device)

    @property
    def _path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def handle(self) -> str | SharedTensor:
        return self._path if self._file is not None else SharedTensor(*reduce_tensor(self.flat))

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _order(members: Members, bucket: int, handles: list[Any], version: int, *, digests: bool) -> Ordered:
    shared = {(place.engine, place.rank): handle for place, handle in handles if place is not None}

    def command(engine: int, rank: int) -> dict[str, Any]:
        handle = shared[engine, rank]
        file = {"file": handle} if isinstance(handle, str) else {}
        return {"action": "place", "sender": 0, "bucket": bucket, "digests": digests, **file}

    def data(engine: int, rank: int) -> SharedTensor | None:
        handle = shared[engine, rank]
        return handle if isinstance(handle, SharedTensor) else None

    return members.order(command, version=version, data=data)


def _merge(reports: list[Reports]) -> Reports:
    """Of all buckets: the bytes added up, the digests of the last one, which are those of all pieces."""
    merged = []
    for engine in range(len(reports[-1]) if reports else 0):
        ranks = []
        for rank, last in enumerate(reports[-1][engine]):
            ranks.append({**last, "bytes": sum(each[engine][rank]["bytes"] for each in reports)})
        merged.append(ranks)
    return merged
