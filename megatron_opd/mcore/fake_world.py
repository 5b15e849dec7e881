"""One rank of a world that does not exist: Megatron's own modules, buffers and passes with shapes and no memory.

torch's fake process group answers every collective at once, and its fake tensors have shape, dtype and storage size but no
content. So one process on any machine builds what a rank of 64 would build, in a fraction of a second.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, UntypedStorage
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_opd.mcore.cpu_compat import alone_in_a_fake_world
from megatron_opd.mcore.platform import Platform

FAKE = Platform(torch.device("cpu"), "fake", transformer_engine=False)

# Collectives in place, for which torch has no meta implementation; Megatron's reductions of gradients are made of them.
_WITHOUT_META = {
    torch.ops.c10d.allreduce_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
}


@dataclass(frozen=True, kw_only=True)
class _Shallow(Platform):
    layers: int

    def block_spec(self, config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> TransformerBlockSubmodules:
        block = super().block_spec(config, vp_stage, pp_rank)
        return replace(block, layer_specs=(block.layer_specs or [])[: self.layers])


def shallow(layers: int) -> Platform:
    """Builds no more than the first ``layers`` of each chunk."""
    return _Shallow(**vars(FAKE), layers=layers)


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process is ``rank`` of ``world_size``, and tensors made inside have no content.

    Raises RuntimeError where a process group is there already, for a process is in one world at a time, or a GPU: Megatron
    would address it.
    """
    if dist.is_initialized() or torch.cuda.is_available():
        raise RuntimeError("a fake rank needs a process without a process group, and with its GPUs hidden")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with alone_in_a_fake_world(), _Shapes():
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class _Shapes(FakeTensorMode):
    """Fake tensors where a number read back from one is the one that :func:`reads_back` has said."""

    number: int | None = None

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.number is not None and func is torch.ops.aten._local_scalar_dense.default:
            return self.number
        if func in _WITHOUT_META:
            return FakeWork().boxed()
        return super().dispatch(func, types, args, kwargs or {})


@contextmanager
def reads_back(number: int | None) -> Iterator[None]:
    """Within a fake rank: any number that Megatron reads back from a tensor is this one; None: such a read is an error."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert isinstance(mode, _Shapes)
    mode.number = number
    try:
        yield
    finally:
        mode.number = None


class Known(Tensor):
    """A tensor whose content stays known among fake ones: sequence boundaries, which decide shapes."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with unset_fake_temporarily():
            return super().__torch_function__(func, types, args, kwargs or {})

    @staticmethod
    def of(values: Iterable[int], dtype: torch.dtype) -> Tensor:
        """[n]."""
        with unset_fake_temporarily():
            return torch.tensor(list(values), dtype=dtype).as_subclass(Known)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside make, from their making until they are freed.

    Works on fake tensors and on real ones alike. Storages of ``besides`` are there already and not counted.
    """

    def __init__(self, besides: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0  # bytes
        self._known: weakref.WeakKeyDictionary[UntypedStorage, None] = weakref.WeakKeyDictionary()
        for tensor in besides:
            self._known[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and not isinstance(each, Known):
                self._count(each.untyped_storage())
        return result

    def _count(self, storage: UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = None
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


class SavedBytes:
    """Counts the bytes of the storages that autograd keeps for the backward, each once; those of ``besides`` not at all."""

    def __init__(self, besides: Iterable[Tensor]) -> None:
        self.now = self.peak = 0  # bytes
        self._uses = {tensor.untyped_storage()._cdata: 1 for tensor in besides}

    def keep(self, tensor: Tensor) -> _Kept | Tensor:
        """Counted until what is returned is freed."""
        return tensor if isinstance(tensor, Known) else _Kept(tensor, self)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self.keep, _given_back):
            yield

    def take(self, storage: UntypedStorage) -> None:
        uses = self._uses.get(storage._cdata, 0)
        self._uses[storage._cdata] = uses + 1
        if not uses:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def release(self, storage: UntypedStorage) -> None:
        self._uses[storage._cdata] -= 1
        if not self._uses[storage._cdata]:
            del self._uses[storage._cdata]
            self.now -= storage.nbytes()


class _Kept:
    def __init__(self, tensor: Tensor, saved: SavedBytes) -> None:
        self.tensor, self._storage, self._saved = tensor, tensor.untyped_storage(), saved
        saved.take(self._storage)

    def __del__(self) -> None:
        self._saved.release(self._storage)


def _given_back(kept: _Kept | Tensor) -> Tensor:
    return kept.tensor if isinstance(kept, _Kept) else kept
