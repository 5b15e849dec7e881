"""One declarative table for each architecture: where every Hugging Face tensor lives in Megatron, and how it is sharded.

The same table serves loading, export and weight sync; adding a family means adding a table. Megatron's names are those of the
local layer spec; ``_TE_NAMES`` states where the Transformer Engine spec fuses a norm into the linear layer behind it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch.nn import Parameter

from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.types import OpdError


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
    experts: int = 0  # of each layer; 0: dense


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


class GatedMLP(Sharding):
    """Gate and up projections, each split by itself: [2 * ffn/tp, H]."""

    def merge(self, parts: list[Tensor], dims: Dimensions) -> Tensor:
        return torch.cat(parts)

    def split(self, full: Tensor, dims: Dimensions) -> list[Tensor]:
        return list(full.chunk(2))

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])

    def unshard(self, shards: list[Tensor]) -> Tensor:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the HF tensors that it is made of; ``{i}`` is the layer's global number, ``{e}`` the expert's.

    An expert is whole on one rank of each expert-parallel group, its sharding that of a single tensor-parallel rank.
    """

    megatron: str
    hf: tuple[str, ...]
    sharding: Sharding
    expert: int | None = None


def _layer(megatron: str, sharding: Sharding, *hf: str) -> Entry:
    return Entry(f"decoder.layers.{{i}}.{megatron}", tuple(f"model.layers.{{i}}.{name}" for name in hf), sharding)


EMBEDDING = Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary())
LM_HEAD = Entry("output_layer.weight", ("lm_head.weight",), Vocabulary())
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_LLAMA = (
    EMBEDDING,
    _layer("input_layernorm.weight", Sharding(), "input_layernorm.weight"),
    _layer("self_attention.linear_qkv.weight", QKV(), *(f"{name}.weight" for name in _PROJECTIONS)),
    _layer("self_attention.linear_proj.weight", Row(), "self_attn.o_proj.weight"),
    _layer("pre_mlp_layernorm.weight", Sharding(), "post_attention_layernorm.weight"),
    _layer("mlp.linear_fc1.weight", GatedMLP(), "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    _layer("mlp.linear_fc2.weight", Row(), "mlp.down_proj.weight"),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Sharding()),
    LM_HEAD,
)
_QKV_BIAS = (_layer("self_attention.linear_qkv.bias", QKV(), *(f"{name}.bias" for name in _PROJECTIONS)),)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", Sharding(), "self_attn.q_norm.weight"),
    _layer("self_attention.k_layernorm.weight", Sharding(), "self_attn.k_norm.weight"),
)

_ATTENTION_AND_NORMS = tuple(entry for entry in _LLAMA if ".mlp." not in entry.megatron)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    local, hf = "mlp.experts.local_experts.{e}", f"{block}.experts.{{e}}"
    return (
        _layer("mlp.router.weight", Sharding(), f"{block}.gate.weight"),
        _layer(f"{local}.linear_fc1.weight", GatedMLP(), f"{hf}.{gate}.weight", f"{hf}.{up}.weight"),
        _layer(f"{local}.linear_fc2.weight", Row(), f"{hf}.{down}.weight"),
    )


TABLES: dict[str, tuple[Entry, ...]] = {
    "MixtralForCausalLM": _ATTENTION_AND_NORMS + _experts("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen3MoeForCausalLM": _ATTENTION_AND_NORMS + _QK_NORM + _experts("mlp", "gate_proj", "up_proj", "down_proj"),
    "LlamaForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA + _QKV_BIAS,
    "Qwen3ForCausalLM": _LLAMA + _QK_NORM,
}

# Transformer Engine spec's name → the local spec's
_TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}

_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")  # Transformer Engine's grouped linear layers
LOCAL_EXPERT = re.compile(r"local_experts\.(\d+)\.")


def table_for(architecture: str) -> tuple[Entry, ...]:
    """Raises OpdError for an architecture without a table."""
    if architecture not in TABLES:
        raise OpdError(f"architecture {architecture}: not supported; supported are {', '.join(TABLES)}")
    return TABLES[architecture]


def entries(architecture: str, dims: Dimensions) -> Iterator[Entry]:
    """The table with layer numbers filled in, in an order that is the same on every rank."""
    for entry in table_for(architecture):
        if entry is LM_HEAD and dims.tied:
            continue
        if "{i}" not in entry.megatron:
            yield entry
            continue
        numbers = range(dims.experts) if "{e}" in entry.megatron else (None,)
        for i, e in itertools.product(range(dims.layers), numbers):
            hf = tuple(name.format(i=i, e=e) for name in entry.hf)
            yield Entry(entry.megatron.format(i=i, e=e), hf, entry.sharding, e)


def named_parameters(chunks: Sequence[GPTModel], first_expert: int) -> dict[str, Parameter]:
    """This rank's parameters by their canonical names: local-spec spelling, global layer and expert numbers."""
    named: dict[str, Parameter] = {}
    for chunk in chunks:
        named |= _named_parameters(chunk, first_expert)
    return named


def _named_parameters(chunk: GPTModel, first_expert: int) -> dict[str, Parameter]:
    first_layer = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    named = {}
    for name, parameter in chunk.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, number, rest = name.split(".", 3)
            rest = _GROUPED_EXPERT.sub(r"mlp.experts.local_experts.\2.\1.weight", _TE_NAMES.get(rest, rest))
            rest = LOCAL_EXPERT.sub(lambda match: f"local_experts.{int(match[1]) + first_expert}.", rest)
            name = f"decoder.layers.{int(number) + first_layer}.{rest}"
        named[name] = parameter
    return named


@torch.no_grad()
def load_weights(
    chunks: Sequence[GPTModel], architecture: str, dims: Dimensions, read: Callable[[str], Tensor], layout: ParallelLayout
) -> None:
    """Fill this rank's shard; ``read`` gives a full HF tensor by name. Every parameter is filled, or OpdError is raised."""
    parameters = named_parameters(chunks, layout.ep_rank * (dims.experts // layout.ep_size))
    if dims.tied and LM_HEAD.megatron in parameters:  # the last stage's copy of a tied embedding
        table = [*entries(architecture, dims), Entry(LM_HEAD.megatron, EMBEDDING.hf, EMBEDDING.sharding)]
    else:
        table = list(entries(architecture, dims))
    for entry in table:
        if entry.megatron not in parameters:
            continue
        full = entry.sharding.merge([read(name) for name in entry.hf], dims)
        shard = full if entry.expert is not None else entry.sharding.shard(full, layout.tp_rank, layout.tp_size)
        parameter = parameters.pop(entry.megatron)
        if shard.shape != parameter.shape:
            raise OpdError(f"{entry.megatron}: weights have shape {list(shard.shape)}, the model {list(parameter.shape)}")
        parameter.copy_(shard)
    if parameters:
        raise OpdError(
            f"{architecture}: no weights are mapped to {', '.join(parameters)}; its config has parts that are not supported"
        )
