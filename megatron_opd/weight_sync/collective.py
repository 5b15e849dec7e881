"""Each engine rank receives its own shard: every pipeline stage broadcasts its layers, all stages at the same time.

A group for each stage and each tensor-parallel rank of the engines holds that stage's sender and that rank of every engine, so
what a rank does not keep never reaches it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.mcore.trainer import Trainer
from megatron_opd.sglang.client import EngineError
from megatron_opd.sglang.engine_side.opd_weights import ABORT, digest, finish, process_group, synchronize
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.weight_sync.delivery import Delivery
from megatron_opd.weight_sync.members import Members, Reports
from megatron_opd.weight_sync.plan import Digests, Parcel, Plan, conclude, make_plan

_ALONE_BYTES = 1 << 20  # of a tensor that is sent from where it lies to where it belongs, copied nowhere


class Collective:
    """A :class:`~megatron_opd.weight_sync.delivery.Carrier` over NCCL or gloo, for engines on devices of their own."""

    def __init__(
        self, trainer: Trainer, first_rank: FirstRank, *, tp: int, backend: str, bucket_bytes: int, timeout: float
    ) -> None:
        """Args:
        tp: tensor-parallel ranks of each engine.
        backend: "nccl" or "gloo".
        bucket_bytes: under way at once, but for a tensor that is larger.
        timeout: seconds for all transfers of one version.
        """
        self._trainer, self._first_rank = trainer, first_rank
        self._tp, self._backend, self._bucket_bytes, self._timeout = tp, backend, bucket_bytes, timeout
        self._generation = 0
        self._plan: Plan | None = None
        self._sender: int | None = None  # this rank's number among the senders
        self._store: Any = None
        self._groups: list[Any] = []  # of each engine rank

    def form(self, members: Members | None) -> None:
        layout, first_rank = self._trainer.layout, self._first_rank
        self.leave(None)
        self._generation += 1
        export = self._trainer.export()
        sends = layout.tp_rank == layout.cp_rank == layout.dp_rank == 0  # one rank of each stage
        offered = first_rank.gather(list(export.tensors()) if sends else None)
        senders = [rank for rank, tensors in enumerate(offered) if tensors is not None]
        streams = [tensors for tensors in offered if tensors is not None]

        def plan() -> tuple[Plan, tuple[str, int], int]:
            assert members is not None
            found = make_plan(streams, members, self._trainer.spec.dims, self._bucket_bytes, _ALONE_BYTES)
            return found, members.address, len(members)

        self._plan, (host, port), engines = first_rank.run(plan)

        def join() -> None:
            ordered = None if members is None else members.order(lambda engine, rank: self._join_command(engine, rank, engines))
            if sends:
                self._sender = senders.index(dist.get_rank())
                self._store = dist.TCPStore(host, port, wait_for_workers=False) if members is None else members.store
                self._groups = [self._join(rank, engines) for rank in range(self._tp)]
            if members is not None and ordered is not None:
                members.reports(ordered)

        first_rank.everywhere(join)

    def send(self, members: Members | None, version: int, *, check: bool) -> Delivery:
        plan, stream = self._plan, self._trainer.export().stage()
        assert plan is not None

        def transfer() -> tuple[Digests, Reports]:
            command = {"action": "load", "digests": check}
            ordered = None if members is None else members.order(lambda engine, rank: command, version=version)
            digests, failure = self._broadcast(stream, plan, check=check)
            # What the engines say comes first: it has a name, and a broken group has none.
            reports = [] if members is None or ordered is None else members.reports(ordered)
            if failure is not None:
                raise EngineError(f"weights to SGLang: {failure}")
            return digests, reports

        digests, reports = self._first_rank.everywhere(transfer)
        sent = [each for each in self._first_rank.gather(digests) if each] if check else []
        return self._first_rank.run(lambda: conclude(plan, members, reports, sent))

    def leave(self, members: Members | None) -> None:
        if members is not None:
            with suppress(EngineError):
                members.begin()
                members.reports(members.order(lambda engine, rank: {"action": "leave"}))
                members.end()
        for group in self._groups:
            group.abort()
        self._groups, self._store, self._sender, self._plan = [], None, None, None

    def _broadcast(self, stream: Iterator[tuple[str, Tensor]], plan: Plan, *, check: bool) -> tuple[Digests, str | None]:
        """Send this stage's tensors, where this rank does; the digests of all pieces, and what went wrong.

        Whatever goes wrong, the stream is read to its end: it is collective over the stage.
        """
        digests: Digests = []
        failure = None
        if self._sender is not None:
            try:
                digests = self._send_buckets(stream, plan.parcels[self._sender], check=check)
            except Exception as error:
                failure = " ".join(f"{type(error).__name__}: {error}".split())
                with suppress(RuntimeError):  # the first rank's store may be what failed
                    self._store.set(ABORT, failure)
        for _ in stream:
            pass
        return digests, failure

    def _send_buckets(
        self, stream: Iterator[tuple[str, Tensor]], parcels: Sequence[Sequence[Parcel]], *, check: bool
    ) -> Digests:
        """``parcels``: [bucket][engine rank]."""
        under_way: deque[tuple[list[Tensor], list[Any]]] = deque()
        digests: Digests = [[] for _ in range(self._tp)]
        for bucket in parcels:
            contents = self._contents(stream, bucket, digests if check else None)
            while under_way and _bytes(contents, *(sent for sent, _ in under_way)) > self._bucket_bytes:
                finish(under_way.popleft()[1], self._store, self._timeout)
            pairs = zip(self._groups, contents, strict=True)
            under_way.append((contents, [group.broadcast([content]) for group, content in pairs if content.nbytes]))
        for _, works in under_way:
            finish(works, self._store, self._timeout)
        synchronize(self._trainer.device)
        return digests

    def _contents(
        self, stream: Iterator[tuple[str, Tensor]], bucket: Sequence[Parcel], digests: Digests | None
    ) -> list[Tensor]:
        """[bytes] uint8 for each engine rank: the next tensors of the stream, one that is large where it lies."""
        device, together = self._trainer.device, len(bucket[0].names) > 1
        contents = [torch.empty(parcel.nbytes if together else 0, dtype=torch.uint8, device=device) for parcel in bucket]
        for name in bucket[0].names:
            found, full = next(stream)
            assert found == name
            for rank, parcel in enumerate(bucket):
                own = parcel.cut(name, full)
                if own is None:
                    continue
                if digests is not None:
                    digests[rank].append(digest(own))
                if together:
                    parcel.write(name, full, contents[rank])
                else:
                    contents[rank] = own.contiguous().flatten().view(torch.uint8)
        return contents

    def _join(self, rank: int, engines: int) -> Any:
        """This sender's group with engine rank ``rank``; NCCL connects in its first collective."""
        assert self._sender is not None
        group = process_group(self._backend, self._store, self._name(self._sender, rank), 0, 1 + engines, self._timeout)
        finish([group.broadcast([torch.empty(1, device=self._trainer.device)])], self._store, self._timeout)
        return group

    def _join_command(self, engine: int, rank: int, engines: int) -> dict[str, Any]:
        assert self._plan is not None
        return {
            "action": "join",
            "backend": self._backend,
            "groups": [self._name(sender, rank) for sender in range(len(self._plan.parcels))],
            "rank": 1 + engine,
            "size": 1 + engines,
            **self._plan.command(rank),
        }

    def _name(self, sender: int, rank: int) -> str:
        return f"{self._generation}/{sender}/{rank}"


def _bytes(*contents: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for each in contents for tensor in each)
