"""Portable modules for Megatron's local layer spec, which lacks packed sequences and sequence-parallel norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter


class PortableCoreAttention(torch.nn.Module):
    """Causal attention over THD-packed sequences with grouped queries, by torch's scaled-dot-product attention.

    With ``softmax_type="learnable"`` each head has a sink, ``softmax_offset`` [heads/tp]: one more logit in the denominator.

    Each sequence is attended on its own, so a token's result does not depend on what it was packed with, and memory is that of
    the longest sequence, not of the micro-batch squared. Heads are this tensor-parallel rank's. Under context parallelism rank
    r of cp holds chunks r and 2 cp - 1 - r of the 2 cp equal chunks of each sequence, keys and values of all are gathered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__()
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal) or attention_type != "self":
            raise ValueError(f"portable attention is causal self-attention, got {attn_mask_type} {attention_type}")
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.dropout = config.attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window: int | None = config.window_size[0] + 1 if windowed else None  # tokens, the query's own among them
        self.cp: ProcessGroup | None = pg_collection.cp if config.context_parallel_size > 1 else None
        self.tp: ProcessGroup = pg_collection.tp
        self.softmax_offset: Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // self.tp.size()
            self.softmax_offset = Parameter(torch.empty(heads, dtype=config.params_dtype))
        elif config.softmax_type != "vanilla":
            raise ValueError(f"portable attention has no softmax of type {config.softmax_type}")

    def forward(
        self,
        query: Tensor,  # [T, heads/tp, d]
        key: Tensor,  # [T, groups/tp, d]
        value: Tensor,  # [T, groups/tp, d]
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Returns [T, heads/tp * d]. Raises ValueError without ``packed_seq_params``: every batch of ours is packed."""
        if packed_seq_params is None:
            raise ValueError("portable attention takes packed sequences only")
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()  # of whole sequences
        if self.cp is not None:
            return self._context_parallel(query, key, value, lengths, self.cp)
        sequences = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        return torch.cat([self._attend(q, k, v) for q, k, v in sequences]).flatten(1)  # [T, heads/tp * d]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron's own attention has it."""
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        return result

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], cp: ProcessGroup) -> Tensor:
        """Each of this rank's two chunks of a sequence attends to everything up to its end."""
        size, rank = cp.size(), cp.rank()
        keys, values = (_gather_sequences(each, lengths, cp) for each in (key, value))  # whole sequences
        parts, start = [], 0
        for length, k, v in zip(lengths, keys, values, strict=True):
            chunk = length // (2 * size)
            for number in (rank, 2 * size - 1 - rank):
                end = (number + 1) * chunk
                parts.append(self._attend(query[start : start + chunk], k[:end], v[:end]))
                start += chunk
        return torch.cat(parts).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The last rows of a sequence [rows, heads/tp, d] to all of it up to their end [end, groups/tp, d]; as the queries."""
        rows, end = len(query), len(key)
        mask = None
        if self.softmax_offset is not None or rows < end or (self.window is not None and end > self.window):
            mask = torch.ones(rows, end, dtype=torch.bool, device=query.device).tril(end - rows)
            if self.window is not None:
                mask = mask.triu(end - rows - self.window + 1)
        if self.softmax_offset is not None:
            mask, key, value = _with_sink(self.softmax_offset, mask, key, value)
        result: Tensor = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],  # [1, heads/tp, rows, d]
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return result[0].transpose(0, 1)


def _with_sink(sink: Tensor, mask: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more key, of value zero, that every query sees with the logit ``sink`` of its head.

    [heads/tp], [rows, end], twice [end, groups/tp, d] to what is added to logits [heads/tp, rows, end + 1], keys and values.
    """
    assert mask is not None
    hidden = torch.zeros(mask.shape, dtype=key.dtype, device=key.device).masked_fill(~mask, float("-inf"))
    logits = [hidden.expand(len(sink), -1, -1), sink.to(key.dtype)[:, None, None].expand(-1, len(mask), 1)]
    one_more = (0, 0, 0, 0, 0, 1)
    return torch.cat(logits, dim=2), F.pad(key, one_more), F.pad(value, one_more)


def _gather_sequences(local: Tensor, lengths: list[int], cp: ProcessGroup) -> list[Tensor]:
    """This rank's zigzag slices [T/cp, ...] of all sequences → the sequences, each [length, ...]."""
    size = cp.size()
    by_rank = [part.split([length // size for length in lengths]) for part in _AllGather.apply(local, cp).chunk(size)]
    sequences = []
    for number in range(len(lengths)):
        halves = [part[number].chunk(2) for part in by_rank]
        sequences.append(torch.cat([half[0] for half in halves] + [half[1] for half in reversed(halves)]))
    return sequences


class _AllGather(torch.autograd.Function):
    """[T, ...] → [size * T, ...]; every rank uses all of it, so the backward sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)  # gloo has no reduce-scatter
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


class PortableNorm:
    """RMSNorm or LayerNorm whose gradients Megatron sums over the tensor-parallel group under sequence parallelism."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        rms_class = _ZeroCentredRMSNorm if config.layernorm_zero_centered_gamma else torch.nn.RMSNorm
        norm_class = rms_class if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = norm_class(normalized_shape=hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class _ZeroCentredRMSNorm(torch.nn.RMSNorm):
    """Scales by 1 + weight, all in fp32 whatever the input's dtype, as Transformer Engine does."""

    def forward(self, rows: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        return F.rms_norm(rows.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(rows.dtype)
