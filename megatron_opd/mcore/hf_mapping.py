"""A model's parameters and its family's table, brought together: canonical names, and weights that are loaded by them.

Canonical names are those of the local layer spec, with global layer and expert numbers; ``_TE_NAMES`` states where the
Transformer Engine spec fuses a norm into the linear layer behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_opd.mcore.families import EMBEDDING, LM_HEAD, family_of
from megatron_opd.mcore.fp8_weights import fill
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.sharding import Dimensions, Entry
from megatron_opd.types import OpdError

# Transformer Engine spec's name → the local spec's
_TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
_BUFFERS = {"expert_bias"}  # of Megatron's routers: weights of a model, which no gradient moves

_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)")  # Transformer Engine's grouped linear layers
LOCAL_EXPERT = re.compile(r"local_experts\.(\d+)\.")


def entries(architecture: str, dims: Dimensions) -> Iterator[Entry]:
    """The table with layer numbers filled in, in an order that is the same on every rank. Raises OpdError."""
    for entry in family_of(architecture).table:
        if (entry is LM_HEAD and dims.tied) or entry.megatron in dims.absent:
            continue
        if "{i}" not in entry.megatron:
            yield entry
            continue
        for i in _layers(entry, dims):
            for e in range(dims.experts) if "{e}" in entry.megatron else (None,):
                hf = tuple(name.format(i=i, e=e) for name in entry.hf)
                index = None if "{e}" in entry.hf[0] else e
                yield replace(entry, megatron=entry.megatron.format(i=i, e=e), hf=hf, expert=e, index=index)


def by_tensors(table: Iterable[Entry]) -> Iterator[list[Entry]]:
    """The entries of the same HF tensors together: one entry, or those of all experts of a stack."""
    for _, group in groupby(table, key=lambda entry: entry.hf):
        yield list(group)


def stacked(group: list[Entry], parts: Iterable[list[Tensor]]) -> list[Tensor]:
    """The HF tensors of a group, whose entries are split into ``parts``. A stack is filled expert by expert."""
    if group[0].index is None:
        (only,) = parts
        return only
    stacks: list[Tensor] = []
    for entry, split in zip(group, parts, strict=True):
        stacks = stacks or [part.new_empty(len(group), *part.shape) for part in split]
        for stack, part in zip(stacks, split, strict=True):
            stack[entry.index] = part
    return stacks


def _layers(entry: Entry, dims: Dimensions) -> range:
    if entry.layers == "all" or not dims.experts:
        return range(dims.layers)
    return range(dims.dense_layers) if entry.layers == "dense" else range(dims.dense_layers, dims.layers)


def own_weights(chunk: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and buffers that are weights of the model too, by the module's own names."""
    yield from chunk.named_parameters()
    yield from ((name, buffer) for name, buffer in chunk.named_buffers() if name.rpartition(".")[2] in _BUFFERS)


def named_weights(chunks: Sequence[GPTModel], first_expert: int) -> dict[str, Tensor]:
    """This rank's :func:`own_weights` by their canonical names: local-spec spelling, global layer and expert numbers."""
    named: dict[str, Tensor] = {}
    for chunk in chunks:
        named |= _named_weights(chunk, first_expert)
    return named


def _named_weights(chunk: GPTModel, first_expert: int) -> dict[str, Tensor]:
    first_layer = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    named = {}
    for name, weight in own_weights(chunk):
        if name.startswith("decoder.layers."):
            _, _, number, rest = name.split(".", 3)
            rest = _GROUPED_EXPERT.sub(r"mlp.experts.local_experts.\3.\1.\2", _TE_NAMES.get(rest, rest))
            rest = LOCAL_EXPERT.sub(lambda match: f"local_experts.{int(match[1]) + first_expert}.", rest)
            name = f"decoder.layers.{int(number) + first_layer}.{rest}"
        named[name] = weight
    return named


@torch.no_grad()
def load_weights(
    chunks: Sequence[GPTModel],
    architecture: str,
    dims: Dimensions,
    read: Callable[[str, int | None], Tensor],
    layout: ParallelLayout,
) -> None:
    """Fill this rank's shard; ``read`` gives a full HF tensor by name, or the one that has an index in a stack.

    Every parameter is filled, or OpdError is raised.
    """
    parameters = named_weights(chunks, layout.ep_rank * (dims.experts // layout.ep_size))
    if dims.tied and LM_HEAD.megatron in parameters:  # the last stage's copy of a tied embedding
        table = [*entries(architecture, dims), Entry(LM_HEAD.megatron, EMBEDDING.hf, EMBEDDING.sharding)]
    else:
        table = list(entries(architecture, dims))
    for entry in table:
        if entry.megatron not in parameters:
            continue
        full = entry.sharding.merge([read(name, entry.index) for name in entry.hf], dims)
        shard = full if entry.expert is not None else entry.sharding.shard(full, layout.tp_rank, layout.tp_size)
        parameter = parameters.pop(entry.megatron)
        if shard.shape != parameter.shape:
            raise OpdError(f"{entry.megatron}: weights have shape {list(shard.shape)}, the model {list(parameter.shape)}")
        fill(parameter, shard)
    if parameters:
        raise OpdError(
            f"{architecture}: no weights are mapped to {', '.join(parameters)}; its config has parts that are not supported"
        )
