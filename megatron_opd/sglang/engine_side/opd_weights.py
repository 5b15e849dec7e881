"""Runs inside SGLang's model processes, as a custom weight loader: receives this rank's part of each tensor and nothing else.

Imports torch alone: the servers have an environment of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, ProcessGroup, TCPStore
from torch.distributed.distributed_c10d import Backend, _new_process_group_helper, _world

# HF name of a part → the parameter that SGLang fuses it into
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_groups: dict[str, ProcessGroup] = {}  # by name; they live as long as this process


def receive(model: nn.Module, named_tensors: list[tuple[str, Tensor]]) -> None:
    """``named_tensors``: one, whose bytes are this rank's plan as JSON. Raises KeyError or ValueError where it does not fit."""
    ((_, data),) = named_tensors
    plan = json.loads(bytes(data.cpu().tolist()))
    if "tensors" not in plan:
        _join(plan)
        return
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    flat = torch.empty(plan["bytes"], dtype=torch.uint8, device=device)
    dist.broadcast(flat, group_src=0, group=_groups[plan["group"]])
    start = 0
    with torch.no_grad():
        for name, dtype, shape in plan["tensors"]:
            size = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
            _place(model, parameters, name, flat[start : start + size].view(getattr(torch, dtype)).view(shape))
            start += size


def _join(plan: dict[str, Any]) -> None:
    name, size, timeout = plan["group"], plan["size"], timedelta(seconds=plan["timeout"])
    if name in _groups:  # of a run before, at a server that outlives it
        dist.destroy_process_group(_groups.pop(name))
    store = TCPStore(plan["host"], plan["port"], size, is_master=False, timeout=timeout, wait_for_workers=False)
    group, _ = _new_process_group_helper(
        size, plan["rank"], [], Backend(plan["backend"]), PrefixStore(name, store), group_name=name, timeout=timeout
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    _groups[name] = group


def _place(model: nn.Module, parameters: Mapping[str, Tensor], name: str, part: Tensor) -> None:
    *_, module, _kind = name.split(".")
    fused = _FUSED.get(module)
    if fused is None:
        target = parameters[name].data
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):  # the rest of the rows is padding
            target = target[: part.shape[0]]
    else:
        target_name = name.replace(module, fused)
        owner = model.get_submodule(target_name.rpartition(".")[0])
        target = parameters[target_name].data.narrow(0, _offset(owner, module, part.shape[0]), part.shape[0])
    if target.shape != part.shape:
        raise ValueError(f"{name}: received {list(part.shape)}, but this rank has {list(target.shape)}")
    target.copy_(part)


def _offset(owner: Any, module: str, rows: int) -> int:
    if module in ("gate_proj", "up_proj"):
        return 0 if module == "gate_proj" else rows
    return {"q_proj": 0, "k_proj": owner.q_proj_shard_size, "v_proj": owner.q_proj_shard_size + owner.kv_proj_shard_size}[
        module
    ]
