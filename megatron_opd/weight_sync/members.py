"""The engines that take the weights together, as the trainer's first rank reaches them."""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_opd.sglang.client import Client, Endpoint, EngineError
from megatron_opd.sglang.engine_side.opd_weights import ABORT
from megatron_opd.sglang.server import LOADER
from megatron_opd.sglang.store import open_store

Result = TypeVar("Result")
Command = dict[str, Any]  # for one engine rank's loader
Report = dict[str, Any]  # what it says of one
Reports = list[list[Report]]  # [engine][rank]
_GRACE = 30.0  # seconds that a call outlasts what it waits for, so that the one who waits can say why
_CONTROL_SECONDS = 60.0  # for calls that move nothing, at most


@dataclass(frozen=True)
class SharedTensor:
    """A tensor in GPU memory, [bytes] uint8, as another process of the trainer shares it: what rebuilds it, and of what."""

    rebuild: Callable[..., Tensor]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Ordered:
    """A command to each rank of each engine, under way."""

    keys: list[list[str]]  # [engine][rank], where they report
    calls: list[Future[dict[str, Any]]]  # to each engine


class Members:
    """Calls go to all engines at the same time. Those that fail in a call are in :attr:`failed`."""

    def __init__(self, endpoints: Sequence[Endpoint], tp: int, host: str, timeout: float) -> None:
        """Args:
        tp: tensor-parallel ranks of each engine.
        host: the trainer's address, as the engines reach it.
        timeout: seconds of one transfer.
        """
        self.endpoints, self.tp = list(endpoints), tp
        self.failed: dict[Endpoint, str] = {}
        self._timeout = timeout
        self._clients = [Client(endpoint, min(timeout, _CONTROL_SECONDS)) for endpoint in endpoints]
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(self._clients)))
        self.store = open_store(host, timeout)
        self.address = (host, int(self.store.port))
        self._orders = 0
        self._sessions = False

    def __len__(self) -> int:
        return len(self._clients)

    def call(self, action: Callable[[Client], Result]) -> list[Result]:
        """The results, when all have answered. Raises the first EngineError."""
        return self.results([self._threads.submit(action, client) for client in self._clients])

    def post(self, path: str, body: Callable[[int], Command]) -> list[Future[dict[str, Any]]]:
        """Calls to each engine that last as long as a transfer, under way; ``body``: of engine ``[0]``."""
        limit = self._timeout + _GRACE

        def deliver(engine: int) -> dict[str, Any]:
            return self._clients[engine].post(path, timeout=limit, **body(engine))

        calls = [self._threads.submit(deliver, engine) for engine in range(len(self))]
        for call in calls:
            call.add_done_callback(self._abort_if_failed)
        return calls

    def results(self, calls: Sequence[Future[Result]]) -> list[Result]:
        """Of calls to each engine. Raises the first EngineError when all have ended."""
        wait(calls)
        for endpoint, call in zip(self.endpoints, calls, strict=True):
            if isinstance(call.exception(), EngineError):
                self.failed[endpoint] = str(call.exception())
        return [call.result() for call in calls]

    def negotiate(self) -> None:
        """Between 0.5.19 and 0.5.21 SGLang put updates into sessions. Raises EngineError where an engine does not answer."""
        self._sessions = all(self.call(lambda client: client.supports("/begin_weight_update")))

    def begin(self) -> None:
        """What is sent from now to :meth:`end` becomes the model then. Raises EngineError."""
        if self._sessions:
            self.call(_begin)

    def end(self) -> None:
        if self._sessions:
            self.call(lambda client: client.post("/end_weight_update"))

    def meet(self) -> Reports:
        """[engine][rank]: what each engine rank has. Raises EngineError."""
        host, port = self.address
        command = {"action": "meet", "host": host, "port": port, "timeout": self._timeout}
        return self.reports(self.order(lambda engine, rank: command))

    def order(
        self,
        command: Callable[[int, int], Command],
        *,
        version: int | None = None,
        data: Callable[[int, int], SharedTensor | None] = lambda engine, rank: None,
    ) -> Ordered:
        """Send commands, and return at once.

        Args:
            command: for rank ``[1]`` of engine ``[0]``.
            version: what the engines call their weights from then on.
            data: what goes along with a command.
        """
        self._orders += 1
        keys = [[f"{self._orders}/{engine}/{rank}" for rank in range(self.tp)] for engine in range(len(self))]

        def body(engine: int) -> Command:
            payloads = []
            for rank, key in enumerate(keys[engine]):
                text = json.dumps({**command(engine, rank), "report": key}).encode()
                named: list[tuple[str, Tensor | SharedTensor]] = []
                named.append(("command", torch.tensor(list(text), dtype=torch.uint8)))  # a tensor is all that a loader gets
                if (given := data(engine, rank)) is not None:
                    named.append(("data", given))
                payloads.append(_serialize(named))
            named_version = {} if version is None else {"weight_version": str(version)}
            return {"serialized_named_tensors": payloads, "load_format": LOADER, "flush_cache": False, **named_version}

        return Ordered(keys, self.post("/update_weights_from_tensor", body))

    def reports(self, ordered: Ordered) -> Reports:
        """[engine][rank]: what they say when they are done. Raises EngineError with the first engine, rank and failure."""
        self.results(ordered.calls)
        reports = [
            [self._report(endpoint, key) for key in keys] for endpoint, keys in zip(self.endpoints, ordered.keys, strict=True)
        ]
        for endpoint, ranks in zip(self.endpoints, reports, strict=True):
            for rank, report in enumerate(ranks):
                if report["error"] is not None and not report["victim"]:
                    self.failed[endpoint] = report["error"]
                    raise EngineError(f"SGLang server {endpoint.url}, rank {rank}: {report['error']}")
        for endpoint, ranks in zip(self.endpoints, reports, strict=True):
            for rank, report in enumerate(ranks):
                if report["error"] is not None:
                    raise EngineError(f"SGLang server {endpoint.url}, rank {rank}: {report['error']}")
        return reports

    def abort(self, reason: str) -> None:
        """Nobody waits any longer for a transfer that is under way."""
        self.store.set(ABORT, reason)

    def _abort_if_failed(self, call: Future[dict[str, Any]]) -> None:
        if not call.cancelled() and call.exception() is not None:
            self.abort(str(call.exception()))

    def close(self) -> None:
        """The engines' loaders lose their store."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for client in self._clients:
            client.close()

    def _report(self, endpoint: Endpoint, key: str) -> Report:
        if not self.store.check([key]):
            self.failed[endpoint] = "its loader did not report"
            raise EngineError(f"SGLang server {endpoint.url}: its loader did not report; see its log")
        report: Report = json.loads(self.store.get(key))
        return report


def _begin(client: Client) -> None:
    try:
        client.post("/begin_weight_update")
    except EngineError as error:
        if "already open" not in str(error):
            raise
        client.post("/end_weight_update")  # a trainer before this one died inside
        client.post("/begin_weight_update")


class _Pickler(pickle.Pickler):
    """Shared tensors as the tensors that the reader then has; bytes, [n] uint8, as a list.

    Not as torch pickles them: megatron-core 0.19 puts a function of its own in the place of torch's reader of storages, and no
    engine reads what names it.
    """

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, SharedTensor):
            return obj.rebuild, obj.arguments
        return (torch.ByteTensor, (obj.tolist(),)) if isinstance(obj, Tensor) else NotImplemented


def _serialize(named: Sequence[tuple[str, Tensor | SharedTensor]]) -> str:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(named)
    return base64.b64encode(buffer.getvalue()).decode()
