"""How Megatron tensors are made of Hugging Face tensors, and split over tensor-parallel ranks: columns of mapping tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dimensions:
    """What the shardings need to know of a model."""

    layers: int
    heads: int
    query_groups: int
    head_dim: int
    vocab_size: int  # true rows
    padded_vocab_size: int  # divisible by tp
    tied: bool
    experts: int = 0  # of each layer that has any; 0: dense
    dense_layers: int = 0  # of a model with experts: the first layers, which have none
    absent: frozenset[str] = frozenset()  # Megatron names in the family's table that this model does not have


class Sharding:
    """How a Megatron tensor is made of HF tensors, and split over tensor-parallel ranks. This one: replicated as it is."""

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        """HF tensors → the full Megatron tensor."""
        return parts[0]

    def split(self, full: Tensor, dims: Dimensions) -> list[Tensor]:
        """The inverse of :meth:`merge`."""
        return [full]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The full Megatron tensor → the part of one tensor-parallel rank."""
        return full

    def unshard(self, shards: list[Tensor]) -> Tensor:
        """The inverse of :meth:`shard`."""
        return shards[0]


class Column(Sharding):
    """Output features split: [out/tp, in]."""

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size)[rank]

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards)


class Row(Sharding):
    """Input features split: [out, in/tp]."""

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, dim=1)[rank]

    def unshard(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards, dim=1)


class Vocabulary(Column):
    """Vocabulary rows split, after zero rows that make them divisible: [V_padded/tp, H]."""

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        rows = parts[0]
        if rows.shape[0] == dims.padded_vocab_size:
            return rows
        return torch.cat([rows, rows.new_zeros(dims.padded_vocab_size - rows.shape[0], rows.shape[1])])

    def split(self, full: Tensor, dims: Dimensions) -> list[Tensor]:
        return [full[: dims.vocab_size]]


class QKV(Column):
    """Query, key and value rows interleaved by query group: [groups/tp * (heads/groups + 2) * head_dim, ...]."""

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        return torch.cat([part.unflatten(0, (dims.query_groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(self, full: Tensor, dims: Dimensions) -> list[Tensor]:
        query_rows = dims.heads // dims.query_groups * dims.head_dim
        by_group = full.unflatten(0, (dims.query_groups, -1))  # [groups, (heads/groups + 2) * head_dim, ...]
        return [part.flatten(0, 1) for part in by_group.split([query_rows, dims.head_dim, dims.head_dim], dim=1)]


class FusedQKV(QKV):
    """Of one HF tensor that has all query rows, then all key and all value rows: [(heads + 2 * groups) * head_dim, ...]."""

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        groups = dims.query_groups * dims.head_dim
        return super().merge(list(parts[0].split([dims.heads * dims.head_dim, groups, groups])), dims)

    def split(self, full: Tensor, dims: Dimensions) -> list[Tensor]:
        return [torch.cat(super().split(full, dims))]


class GatedMLP(Sharding):
    """Gate and up projections, each split by itself: [2 * ffn/tp, H]."""

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        return _joined(parts)

    def split(self, full: Tensor, dims: Dimensions) -> list[Tensor]:
        return list(full.chunk(2))

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])

    def unshard(self, shards: list[Tensor]) -> Tensor:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])


class FusedGatedMLP(GatedMLP):
    """Of one HF tensor that has the gate's rows, then the up projection's: [2 * ffn, H], which is Megatron's own order."""

    def split(self, full: Tensor, dims: Dimensions) -> list[Tensor]:
        return [full]


class Transposed(Sharding):
    """A matrix that HF has as [in, out]."""

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        return parts[0].t().contiguous()

    def split(self, full: Tensor, dims: Dimensions) -> list[Tensor]:
        return [full.t()]


class AlternatingGatedMLP(GatedMLP):
    """Gate and up projections in one HF tensor, features by turns on its last axis: [H, 2 * ffn], or biases [2 * ffn]."""

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        features = parts[0].t()  # [2 * ffn, H] or [2 * ffn]
        return torch.cat([features[::2], features[1::2]])

    def split(self, full: Tensor, dims: Dimensions) -> list[Tensor]:
        return [torch.stack(full.chunk(2), dim=1).flatten(0, 1).t()]


def _joined(parts: list[Tensor]) -> Tensor:
    """Their rows, one after the other: a view where they lie so in one storage already."""
    first, rows, end = parts[0], 0, parts[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        here = part.untyped_storage().data_ptr() == storage and part.data_ptr() == end
        if not here or part.dtype != first.dtype or not part.is_contiguous():
            return torch.cat(parts)
        rows, end = rows + part.shape[0], end + part.nbytes
    return first.as_strided((rows, *first.shape[1:]), first.stride())


Layers = Literal["all", "dense", "experts"]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the HF tensors that it is made of; ``{i}`` is the layer's global number, ``{e}`` the expert's.

    HF tensors whose names lack ``{e}`` beside a parameter that has it are stacks of all experts: [experts, ...].

    An expert is whole on one rank of each expert-parallel group, its sharding that of a single tensor-parallel rank.
    """

    megatron: str
    hf: tuple[str, ...]
    sharding: Sharding
    layers: Layers = "all"  # that have it, where some layers of a model are dense and others have experts
    expert: int | None = None
    index: int | None = None  # of the expert in stacks of all
    buffer: bool = False  # a weight that no gradient moves; Megatron keeps it in fp32, and no change of dtype touches it
