"""A model's parameters and its family's table, brought together: canonical names, and weights that are loaded by them.

Canonical names are those of the local layer spec, with global layer and expert numbers; ``_TE_NAMES`` states where the
Transformer Engine spec fuses a norm into the linear layer behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from torch.nn import Parameter

from megatron_opd.mcore.families import EMBEDDING, LM_HEAD, family_of
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.sharding import Dimensions, Entry
from megatron_opd.types import OpdError

# Transformer Engine spec's name → the local spec's
_TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}

_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")  # Transformer Engine's grouped linear layers
LOCAL_EXPERT = re.compile(r"local_experts\.(\d+)\.")


def entries(architecture: str, dims: Dimensions) -> Iterator[Entry]:
    """The table with layer numbers filled in, in an order that is the same on every rank. Raises OpdError."""
    for entry in family_of(architecture).table:
        if (entry is LM_HEAD and dims.tied) or (entry.bias and not dims.biases):
            continue
        if "{i}" not in entry.megatron:
            yield entry
            continue
        for i in _layers(entry, dims):
            for e in range(dims.experts) if "{e}" in entry.megatron else (None,):
                hf = tuple(name.format(i=i, e=e) for name in entry.hf)
                yield Entry(entry.megatron.format(i=i, e=e), hf, entry.sharding, entry.layers, e)


def _layers(entry: Entry, dims: Dimensions) -> range:
    if entry.layers == "all" or not dims.experts:
        return range(dims.layers)
    return range(dims.dense_layers) if entry.layers == "dense" else range(dims.dense_layers, dims.layers)


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
