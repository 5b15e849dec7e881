"""Device memory lent to another phase: storages are emptied in place, so that every view of them stays valid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, UntypedStorage

from megatron_opd.mcore.platform import Platform


@dataclass(frozen=True)
class Waiting:
    """Storages without device memory, and their content in (pinned) host memory."""

    copies: Sequence[tuple[UntypedStorage, Tensor]]  # [bytes] uint8 each
    platform: Platform

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the tensors can be read; what is written to them is lost."""
        self.restore()
        try:
            yield
        finally:
            for storage, _ in self.copies:
                storage.resize_(0)

    def restore(self) -> None:
        for storage, copy in self.copies:
            storage.resize_(copy.numel())
            _bytes(storage).copy_(copy, non_blocking=True)
        if self.platform.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the host copies can be freed


@contextmanager
def offloaded(kept: Iterable[Tensor], discarded: Iterable[Tensor], platform: Platform) -> Iterator[Waiting]:
    """The storages of the tensors take no device memory inside; nothing may read or write the tensors there.

    Those of ``kept`` come back as they were, from (pinned) host memory; those of ``discarded`` with undefined content. Tensors
    may share storages. On CPU host and device memory are the same, and the same copies are made. Yields ``kept``.
    """
    waiting = Waiting([(storage, _host_copy(storage, platform)) for storage in _storages(kept)], platform)
    empty = [(storage, storage.nbytes()) for storage in _storages(discarded)]
    for storage, _ in (*waiting.copies, *empty):
        storage.resize_(0)
    try:
        yield waiting
    finally:
        for storage, size in empty:
            storage.resize_(size)
        waiting.restore()


def _storages(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """Each once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
    return [storage for storage in storages.values() if storage.nbytes()]


def _host_copy(storage: UntypedStorage, platform: Platform) -> Tensor:
    """[bytes] uint8."""
    pinned = platform.device.type == "cuda"
    return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned).copy_(_bytes(storage))


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
