"""A model's weights on their way out: full Hugging Face tensors, gathered from the shards by the mapping table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_opd.mcore.fp8_weights import dequantized
from megatron_opd.mcore.hf_mapping import LOCAL_EXPERT, by_tensors, entries, named_weights, stacked
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.sharding import Dimensions, Entry


@dataclass(frozen=True)
class TensorInfo:
    """A full Hugging Face tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Export:
    """A model's weights as full, unpadded Hugging Face tensors, one at a time."""

    def __init__(self, chunks: Sequence[GPTModel], architecture: str, dims: Dimensions, layout: ParallelLayout) -> None:
        self._dims, self._layout = dims, layout
        self._experts_here = dims.experts // layout.ep_size
        self._weights = named_weights(chunks, layout.ep_rank * self._experts_here)
        self._groups = list(by_tensors(entries(architecture, dims)))

    def tensors(self) -> Iterator[TensorInfo]:
        """What :meth:`stage` gives, without the weights."""
        for group in self._groups:
            parameter = self._weights.get(self._own_name(group[0]))
            if parameter is not None:
                shards = 1 if group[0].expert is not None else self._layout.tp_size
                like = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                parts = stacked(group, (self._split(entry, [like] * shards) for entry in group))
                for name, part in zip(group[0].hf, parts, strict=True):
                    yield TensorInfo(name, part.dtype, tuple(part.shape))

    def names(self) -> list[str]:
        """Of all stages' tensors, in the order of :meth:`whole`."""
        return [name for group in self._groups for name in group[0].hf]

    @torch.no_grad()
    def stage(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of this rank's pipeline stage, on every rank of it.

        Collective over the tensor-parallel group (gather), for experts over the expert-parallel group (broadcast from the
        owner): all ranks of the stage must consume the whole stream.
        """
        for group in self._groups:
            if self._own_name(group[0]) in self._weights:
                parts = stacked(group, (self._split(entry, self._gather(entry)) for entry in group))
                yield from zip(group[0].hf, parts, strict=True)

    @torch.no_grad()
    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, on every rank of this data-parallel replica.

        Collective as :meth:`stage` is, and over the pipeline-parallel group (broadcast from the owning stage).
        """
        layout = self._layout
        owned: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{} for _ in range(layout.pp_size)]
        own = {name: (each.shape, each.dtype) for name, each in self._weights.items()}
        dist.all_gather_object(owned, own, group=layout.pp)
        device = next(each.device for each in self._weights.values())

        def full(entry: Entry) -> Tensor:
            owner = next(stage for stage, weights in enumerate(owned) if self._own_name(entry) in weights)
            if layout.pp_rank == owner:
                shards = self._gather(entry)
            else:
                count = 1 if entry.expert is not None else layout.tp_size
                shape, dtype = owned[owner][self._own_name(entry)]
                shards = [torch.empty(shape, dtype=dtype, device=device) for _ in range(count)]
            whole = _unsharded(entry, shards)
            if layout.pp_size > 1:
                whole = whole.contiguous()
                dist.broadcast(whole, dist.get_global_rank(layout.pp, owner), group=layout.pp)
            return whole

        for group in self._groups:
            parts = stacked(group, (entry.sharding.split(full(entry), self._dims) for entry in group))
            yield from zip(group[0].hf, parts, strict=True)

    def entries(self) -> list[Entry]:
        """Of this rank's pipeline stage: one for each parameter, those of all experts among them."""
        return [entry for group in self._groups for entry in group if self._own_name(entry) in self._weights]

    def _split(self, entry: Entry, shards: list[Tensor]) -> list[Tensor]:
        return entry.sharding.split(_unsharded(entry, shards), self._dims)

    def _own_name(self, entry: Entry) -> str:
        """A rank of a stage has as many experts as any other, so one of its own tells stage and shape."""
        if entry.expert is None:
            return entry.megatron
        place = entry.expert % self._experts_here
        return LOCAL_EXPERT.sub(f"local_experts.{self._layout.ep_rank * self._experts_here + place}.", entry.megatron)

    def _gather(self, entry: Entry) -> list[Tensor]:
        """The shards of all tensor-parallel ranks; of an expert, which is whole on one rank, its owner's."""
        parameter = dequantized(self._weights[self._own_name(entry)])
        if entry.expert is not None:
            full = parameter.clone()
            owner = dist.get_global_rank(self._layout.ep, entry.expert // self._experts_here)
            dist.broadcast(full, owner, group=self._layout.ep)
            return [full]
        local = parameter.contiguous()
        if self._layout.tp_size == 1:
            return [local]
        shards = [torch.empty_like(local) for _ in range(self._layout.tp_size)]
        dist.all_gather(shards, local, group=self._layout.tp)
        return shards


def _unsharded(entry: Entry, shards: list[Tensor]) -> Tensor:
    """One shard is the whole, and need not be copied."""
    return shards[0] if len(shards) == 1 else entry.sharding.unshard(shards)
