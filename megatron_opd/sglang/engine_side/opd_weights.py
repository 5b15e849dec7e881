"""Runs inside SGLang's model processes, as a custom weight loader: this rank's part of each tensor, and nothing else.

Imports torch alone: the servers have an environment of their own. A loader that raises would end the server, so every failure
is reported instead, through the key-value store that the trainer opens.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ABORT = "abort"  # key: somebody failed, nobody shall wait any longer
_POLL_SECONDS, _ABORT_SECONDS = 0.0002, 0.5  # between looks at a transfer, and at the key above
_NCCL_ERRORS, _NEVER = "TORCH_NCCL_ASYNC_ERROR_HANDLING", timedelta(days=7)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_IN_FLIGHT = 4  # buckets of each sender
_CHUNK = 1 << 22  # elements of a digest's step
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so a product tells each place from the others


class TransferFailed(RuntimeError):
    """Bytes did not go through; who is at fault does not show here."""


def receive(model: nn.Module, named_tensors: list[tuple[str, Tensor]]) -> None:
    """``named_tensors``: first a command for this rank, JSON as bytes; behind it, where the command says so, its data."""
    (_, command), *data = named_tensors
    order = json.loads(bytes(command.cpu().tolist()))
    receiver = vars(model).get("opd_receiver")
    if order["action"] == "meet" or receiver is None:
        if receiver is not None:  # of a trainer before this one
            receiver.close()
        receiver = vars(model)["opd_receiver"] = Receiver(model)
    receiver.obey(order, [tensor for _, tensor in data])


class Receiver:
    """Lives as long as the model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._device = next(iter(self._parameters.values())).device
        self._store: Any = None
        self._timeout = 0.0  # seconds
        self._groups: list[Any] = []  # one for each sender
        self._buckets: list[list[dict[str, Any]]] = []  # of each sender, in the order in which they come

    def obey(self, order: dict[str, Any], data: Sequence[Tensor]) -> None:
        """Do it, and report under the order's key: ``{"error": text or null, ...}``."""
        report: dict[str, Any] = {"error": None, "victim": False}
        try:
            self._parameters = dict(self._model.named_parameters())  # SGLang puts new ones in the place of some
            if order["action"] == "meet":
                self._meet(order)
            report |= self._act(order, data)
        except TransferFailed as error:
            report |= {"error": str(error), "victim": True}
        except Exception as error:  # whatever it is, the server goes on and the trainer learns of it
            report["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if self._store is not None:
            try:
                self._store.set(order["report"], json.dumps(report))
                if report["error"] is not None and not report["victim"]:  # those who send to this rank would wait
                    self._store.set(ABORT, report["error"])
            except Exception:  # the trainer is gone
                self.close()
        if order["action"] == "leave":
            self.close()

    def _act(self, order: dict[str, Any], data: Sequence[Tensor]) -> dict[str, Any]:
        match order["action"]:
            case "meet":
                shapes = {name: [list(each.shape), each.nbytes] for name, each in self._parameters.items()}
                return {"parameters": shapes, "up_first": self._has_up_first()}
            case "join":
                return self._join(order)
            case "load":
                return self._load(order)
            case "place":
                return self._place(order, data)
            case "leave":
                return {}
        raise ValueError(f"unknown action {order['action']}")

    def _has_up_first(self) -> bool:
        """Whether stacked experts have the up projection before the gate, as some of SGLang's kernels want it."""
        methods = (vars(module).get("quant_method") for module in self._model.modules())
        return any(getattr(method, "load_up_proj_weight_first", False) for method in methods)

    def close(self) -> None:
        for group in self._groups:
            group.abort()
        self._groups, self._store = [], None

    def _meet(self, order: dict[str, Any]) -> None:
        self._timeout = order["timeout"]
        self._store = dist.TCPStore(
            order["host"], order["port"], is_master=False, timeout=timedelta(seconds=self._timeout), wait_for_workers=False
        )

    def _join(self, order: dict[str, Any]) -> dict[str, Any]:
        """One group for each sender, with the ranks of this number of all engines; parts that nobody sends are zero."""
        self._buckets = order["buckets"]
        with torch.no_grad():
            for name in order["zeros"]:
                self._parameters[name].zero_()
        for group in self._groups:
            group.abort()
        self._groups = []
        for name in order["groups"]:
            group = process_group(order["backend"], self._store, name, order["rank"], order["size"], self._timeout)
            # NCCL connects in its first collective.
            finish([group.broadcast([torch.empty(1, device=self._device)])], self._store, self._timeout)
            self._groups.append(group)
        return {}

    def _load(self, order: dict[str, Any]) -> dict[str, Any]:
        with ThreadPoolExecutor(max_workers=len(self._groups)) as threads:  # the senders send at the same time
            received = sum(threads.map(self._load_from, self._groups, self._buckets))
        synchronize(self._device)
        return {"bytes": received, "digests": list(self._digests()) if order["digests"] else None}

    def _load_from(self, group: Any, buckets: Sequence[dict[str, Any]]) -> int:
        """One sender's buckets, several under way at once."""
        received = 0
        waiting: deque[tuple[dict[str, Any], Tensor | None, Any]] = deque()
        for bucket in buckets:
            if not bucket["bytes"]:
                continue
            if len(waiting) == _IN_FLIGHT:
                self._put_when_here(*waiting.popleft())
            memory = self._memory_of(bucket)
            flat = torch.empty(bucket["bytes"], dtype=torch.uint8, device=self._device) if memory is None else None
            waiting.append((bucket, flat, group.broadcast([memory if flat is None else flat])))
            received += bucket["bytes"]
        for each in waiting:
            self._put_when_here(*each)
        return received

    def _memory_of(self, bucket: dict[str, Any]) -> Tensor | None:
        """[bytes] uint8: where a bucket of one piece belongs, if that is one stretch of memory."""
        if len(bucket["pieces"]) > 1 or bucket["pieces"][0]["target"] is None:
            return None
        (piece,) = bucket["pieces"]
        target = self._target(piece)
        if not target.is_contiguous() or str(target.dtype) != f"torch.{piece['dtype']}":
            return None
        return target.view(-1).view(torch.uint8)

    def _put_when_here(self, bucket: dict[str, Any], flat: Tensor | None, work: Any) -> None:
        finish([work], self._store, self._timeout)
        if flat is not None:
            self._put(bucket, flat)

    def _place(self, order: dict[str, Any], data: Sequence[Tensor]) -> dict[str, Any]:
        """A bucket that lies in memory which the trainer shares: a file on CPU, a CUDA IPC handle on GPU."""
        bucket = self._buckets[order["sender"]][order["bucket"]]
        shared = data[0] if data else torch.from_file(order["file"], shared=True, size=bucket["bytes"], dtype=torch.uint8)
        self._put(bucket, shared)
        synchronize(self._device)
        last = order["digests"]
        return {"bytes": bucket["bytes"], "digests": list(self._digests()) if last else None}

    def _put(self, bucket: dict[str, Any], flat: Tensor) -> None:
        start = 0
        with torch.no_grad():
            for piece in bucket["pieces"]:
                dtype = getattr(torch, piece["dtype"])
                size = torch.Size(piece["shape"]).numel() * dtype.itemsize
                part = flat[start : start + size].view(dtype).view(piece["shape"])
                start += size
                if piece["target"] is None:  # no rule for it: the whole tensor, by SGLang's own loader
                    self._model.load_weights([(piece["name"], part.to(self._device))])
                else:
                    self._target(piece).copy_(part)

    def _target(self, piece: dict[str, Any]) -> Tensor:
        """The region of this rank's parameter that the piece becomes, in the piece's shape."""
        target = self._parameters[piece["target"]].data
        for dim, (first, count) in enumerate(piece["place"]):
            target = target.narrow(dim, first, count)
        if list(target.shape) != piece["shape"]:
            target = target.squeeze(0)  # one expert of many
        if list(target.shape) != piece["shape"]:
            raise ValueError(f"{piece['name']}: sent as {piece['shape']}, but this rank has {list(target.shape)}")
        return target

    def _digests(self) -> Iterator[list[int] | None]:
        """Of every piece as it lies in the parameters; None for what SGLang's own loader has placed."""
        for buckets in self._buckets:
            for bucket in buckets:
                for piece in bucket["pieces"]:
                    yield None if piece["target"] is None else digest(self._target(piece))


def process_group(backend: str, store: Any, name: str, rank: int, size: int, timeout: float) -> Any:
    """A group beside torch's world, over ``store``, when all members are there; ``timeout``: seconds."""
    own, limit = dist.PrefixStore(name, store), timedelta(seconds=timeout)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NEVER  # ours come first: its own watchdog would end the process, and with it trainer or server
        handling = os.environ.get(_NCCL_ERRORS)
        os.environ[_NCCL_ERRORS] = "0"  # likewise for a peer that is gone; torch reads it while the group is made
        try:
            return dist.ProcessGroupNCCL(own, rank, size, options)
        finally:
            if handling is None:
                del os.environ[_NCCL_ERRORS]
            else:
                os.environ[_NCCL_ERRORS] = handling
    return dist.ProcessGroupGloo(own, rank, size, limit)


def finish(works: Sequence[Any], store: Any, timeout: float) -> None:
    """Until all are done.

    Raises TransferFailed after ``timeout`` seconds, where one failed, or where :data:`ABORT` is set.
    """
    now = time.monotonic()
    deadline, look = now + timeout, now + _ABORT_SECONDS
    while not all(work.is_completed() for work in works):
        now = time.monotonic()
        if now > deadline:
            raise TransferFailed(f"weights did not go through in {timeout:.0f} s")
        if now > look:
            if store.check([ABORT]):
                raise TransferFailed(f"given up: {store.get(ABORT).decode()}")
            look = now + _ABORT_SECONDS
        time.sleep(_POLL_SECONDS)
    try:
        for work in works:
            work.wait()
    except RuntimeError as error:
        raise TransferFailed(str(error)) from error


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def digest(tensor: Tensor) -> list[int]:
    """Two sums of the elements' bits modulo 2^64, one of them by place: equal for equal bits, on any device."""
    words = tensor.contiguous().flatten().view(_WORDS[tensor.element_size()])
    plain = torch.zeros((), dtype=torch.int64, device=tensor.device)
    placed = torch.zeros_like(plain)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + len(part), device=tensor.device) * _MULTIPLIER
        plain += part.sum()
        placed += (part * places).sum()
    return [int(plain), int(placed)]
