"""To each engine rank its own shard: SGLang's custom loader receives it in a group for each tensor-parallel rank.

SGLang's own broadcast sends whole tensors to every rank, tp times what a rank keeps. Dense models only: experts are fused and
packed by the server's kernels.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_opd.mcore.hf_mapping import Dimensions
from megatron_opd.mcore.model import ModelSpec
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.server import LOADER, free_port
from megatron_opd.weight_sync.groups import Bucket, process_group, results, wait_for

_VOCAB_MULTIPLE = 64  # to which SGLang pads
_CPU_BLOCK = 64  # to a multiple of which it pads a rank's part of the feed-forward layer on CPU


class OwnShards:
    """A transport of :class:`~megatron_opd.weight_sync.collective.CollectiveSync`."""

    def __init__(self, dims: Dimensions, tp: int, timeout: float) -> None:
        self._dims, self._tp, self._timeout = dims, tp, timeout
        self._groups: list[ProcessGroup] = []

    def join(self, clients: Sequence[Client], threads: ThreadPoolExecutor, host: str, backend: str) -> None:
        """One group for each engine rank number: this process, and that rank of every engine."""
        ports = [free_port(host) for _ in range(self._tp)]
        joining = []
        for number, client in enumerate(clients):
            common = {"host": host, "size": 1 + len(clients), "rank": 1 + number, "backend": backend, "timeout": self._timeout}
            plans = [{**common, "group": _name(rank), "port": port} for rank, port in enumerate(ports)]
            joining.append(threads.submit(_deliver, client, plans, None))
        self._groups = [
            process_group(host, port, 1 + len(clients), backend, _name(rank), self._timeout) for rank, port in enumerate(ports)
        ]
        results(joining)

    def send(self, bucket: Bucket, version: int, clients: Sequence[Client], threads: ThreadPoolExecutor) -> int:
        """Returns the bytes that an engine rank received, on average."""
        parts = [
            [(name, engine_part(name, tensor, rank, self._tp, self._dims)) for name, tensor in bucket]
            for rank in range(self._tp)
        ]
        plans = [
            {
                "group": _name(rank),
                "bytes": sum(part.nbytes for _, part in own),
                "tensors": [(name, str(part.dtype).removeprefix("torch."), list(part.shape)) for name, part in own],
            }
            for rank, own in enumerate(parts)
        ]
        receiving: list[Future[Any]] = [threads.submit(_deliver, client, plans, version) for client in clients]
        flat = [torch.cat([part.flatten().view(torch.uint8) for _, part in own]) for own in parts]  # [bytes] of each rank
        sending = [
            dist.broadcast(each, group_src=0, group=group, async_op=True)
            for each, group in zip(flat, self._groups, strict=True)
        ]
        wait_for(sending, receiving, self._timeout)
        return sum(each.nbytes for each in flat) // self._tp

    def leave(self, clients: Sequence[Client]) -> None:
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups = []


def has_own_shards(spec: ModelSpec, tp: int, device: str) -> bool:
    """Whether :func:`engine_part` tells what an engine rank keeps: no experts, and nothing that SGLang pads or packs."""
    ffn_multiple = tp * (_CPU_BLOCK if device == "cpu" and tp > 1 else 1)
    dims = spec.dims
    groups_fit = dims.query_groups % tp == 0 or tp % dims.query_groups == 0
    return not dims.experts and dims.heads % tp == 0 and groups_fit and spec.hf.intermediate_size % ffn_multiple == 0


def engine_part(name: str, tensor: Tensor, rank: int, tp: int, dims: Dimensions) -> Tensor:
    """What a tensor-parallel rank of SGLang keeps of a full HF tensor: rows, columns, or all of it."""
    *_, module, kind = name.split(".")
    if module in ("embed_tokens", "lm_head"):
        multiple = (
            _VOCAB_MULTIPLE if -(-dims.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE % tp == 0 else _VOCAB_MULTIPLE * tp
        )
        rows = -(-dims.vocab_size // multiple) * multiple // tp
        return tensor[rank * rows : (rank + 1) * rows]
    if module in ("k_proj", "v_proj") and dims.query_groups < tp:  # each group on several ranks
        group = rank * dims.query_groups // tp
        return tensor[group * dims.head_dim : (group + 1) * dims.head_dim]
    if module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        return tensor.chunk(tp)[rank]
    if module in ("o_proj", "down_proj") and kind == "weight":
        return tensor.chunk(tp, dim=1)[rank].contiguous()
    return tensor


def _name(rank: int) -> str:
    return f"megatron_opd_weights_{rank}"


def _deliver(client: Client, plans: Sequence[dict[str, Any]], version: int | None) -> None:
    """One plan to each rank of an engine; a plan travels as the bytes of a tensor, the only content that a loader gets."""
    payloads = [[("plan", torch.tensor(list(json.dumps(plan).encode()), dtype=torch.uint8))] for plan in plans]
    client.post(
        "/update_weights_from_tensor",
        serialized_named_tensors=[base64.b64encode(pickle.dumps(payload)).decode() for payload in payloads],
        load_format=LOADER,
        flush_cache=False,
        **({} if version is None else {"weight_version": str(version)}),
    )
