"""Weights to SGLang servers, over process groups of the trainer's first rank and the engines' ranks.

The trainer's HF-named stream is sent in buckets of bounded size; a transport knows what each engine rank gets of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_opd.mcore.hf_mapping import export_weights
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.sglang.client import Client, EngineError
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.roster import Roster
from megatron_opd.types import OpdError
from megatron_opd.weight_sync.groups import Bucket, results


class Transport(Protocol):
    """On the trainer's first rank alone; raises EngineError."""

    def join(self, clients: Sequence[Client], threads: ThreadPoolExecutor, host: str, backend: str) -> None: ...

    def send(self, bucket: Bucket, version: int, clients: Sequence[Client], threads: ThreadPoolExecutor) -> int:
        """Returns the bytes that an engine rank received, on average."""
        ...

    def leave(self, clients: Sequence[Client]) -> None: ...


class CollectiveSync:
    """Every method is collective over the trainer's world, but for :meth:`leave`."""

    def __init__(
        self,
        trainer: Trainer,
        first_rank: FirstRank,
        roster: Roster,
        transport: Transport,
        *,
        host: str,
        backend: str,
        bucket_bytes: int,
        timeout: float,
    ) -> None:
        """Join the groups. Raises OpdError on every rank.

        Args:
            roster: of the servers, on the first rank.
            host: the trainer's address, as the servers reach it.
            backend: "nccl" or "gloo".
            bucket_bytes: of the tensors that are sent together; a larger one goes by itself.
            timeout: seconds for one call.
        """
        self._trainer, self._transport, self._bucket_bytes = trainer, transport, bucket_bytes
        self._first_rank = first_rank
        self._clients = [Client(endpoint, timeout) for endpoint in roster.candidates()]
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(self._clients)))
        self._sessions = False
        self.received = 0  # bytes, by an engine rank in the last push; on the first rank
        first_rank.run(lambda: self._join(host, backend))

    def _join(self, host: str, backend: str) -> None:
        # Between 0.5.19 and 0.5.21 SGLang put updates into sessions.
        self._sessions = all(client.supports("/begin_weight_update") for client in self._clients)
        with self._session():
            self._transport.join(self._clients, self._threads, host, backend)

    def push(self, version: int) -> None:
        """The student's current weights become the servers'; their later responses carry ``version``.

        Raises OpdError on every rank, with the server's name, where a call fails or a server then reports another version.
        """
        trainer = self._trainer
        trainer.complete_parameters()
        stream = export_weights(trainer.chunks, trainer.spec.architecture, trainer.spec.dims, trainer.layout)
        failure: Exception | None = None
        if dist.get_rank() == 0:
            try:
                self._send(stream, version)
            except (OpdError, RuntimeError) as error:
                failure = error
        for _ in stream:  # collective, on every rank to its end
            pass

        def outcome() -> None:
            if failure is not None:
                raise failure

        self._first_rank.run(outcome)

    def leave(self) -> None:
        """The first rank and the servers forget the groups; not collective."""
        if dist.get_rank() == 0:
            self._transport.leave(self._clients)

    def _send(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.received = 0
        with self._session():
            for bucket in buckets(stream, self._bucket_bytes):
                self.received += self._transport.send(bucket, version, self._clients, self._threads)
        self._all(lambda client: client.post("/flush_cache"))
        for client in self._clients:
            found = client.get("/model_info").get("weight_version")
            if found != str(version):
                raise EngineError(f"SGLang server {client.endpoint.url}: has weights of version {found}, not {version}")

    @contextmanager
    def _session(self) -> Iterator[None]:
        """What is sent inside becomes the model when it ends; after a failure inside the engines are of no use."""
        if self._sessions:
            self._all(lambda client: client.post("/begin_weight_update"))
        yield
        if self._sessions:
            self._all(lambda client: client.post("/end_weight_update"))

    def _all(self, call: Callable[[Client], object]) -> None:
        results([self._threads.submit(call, client) for client in self._clients])


def buckets(stream: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[Bucket]:
    """Consecutive tensors of at most ``limit`` bytes together, or one that is larger."""
    bucket: Bucket = []
    size = 0
    for name, tensor in stream:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach().clone()))  # the stream may reuse its buffers
        size += tensor.nbytes
    if bucket:
        yield bucket
