"""Device memory lent to another phase: storages are emptied in place, so that every view of them stays valid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, UntypedStorage

from megatron_opd.mcore.platform import Platform


@contextmanager
def offloaded(kept: Iterable[Tensor], discarded: Iterable[Tensor], platform: Platform) -> Iterator[None]:
    """The storages of the tensors take no device memory inside; nothing may read or write the tensors there.

    Those of ``kept`` come back as they were, from (pinned) host memory; those of ``discarded`` with undefined content. Tensors
    may share storages. On CPU host and device memory are the same, and the same copies are made.
    """
    waiting = [(storage, _host_copy(storage, platform)) for storage in _storages(kept)]
    empty = [(storage, storage.nbytes()) for storage in _storages(discarded)]
    for storage, _ in (*waiting, *empty):
        storage.resize_(0)
    try:
        yield
    finally:
        for storage, size in empty:
            storage.resize_(size)
        for storage, copy in waiting:
            storage.resize_(copy.numel())
            _bytes(storage).copy_(copy, non_blocking=True)
        if platform.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the host copies are freed now


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
