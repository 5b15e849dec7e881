"""Which collectives a rank calls, in which of a layout's groups, and with how many bytes: seen as torch dispatches them.

The same observer serves a fake rank, where nothing is sent, and a real run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_opd.mcore.parallel import ParallelLayout


class Kind(StrEnum):
    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_TO_ALL = "all-to-all"
    BROADCAST = "broadcast"
    SEND = "send"  # point to point; what is received is counted where it is sent

    def sent(self, payload: float, ranks: int) -> float:
        """Bytes that each rank sends, at least, in a group of ``ranks`` with ``payload`` bytes.

        The ring algorithms' volumes, https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md.
        """
        if ranks == 1:
            return 0.0
        if self is Kind.ALL_REDUCE:
            return 2 * payload * (ranks - 1) / ranks
        return payload if self in (Kind.BROADCAST, Kind.SEND) else payload * (ranks - 1) / ranks


# The kind of each operation, and the argument whose bytes are its payload: the largest side.
_OPERATIONS = {
    "allreduce_": (Kind.ALL_REDUCE, 0),
    "allreduce_coalesced_": (Kind.ALL_REDUCE, 0),
    "allgather_": (Kind.ALL_GATHER, 0),
    "_allgather_base_": (Kind.ALL_GATHER, 0),
    "allgather_into_tensor_coalesced_": (Kind.ALL_GATHER, 0),
    "_reduce_scatter_base_": (Kind.REDUCE_SCATTER, 1),
    "reduce_scatter_": (Kind.REDUCE_SCATTER, 1),
    "reduce_scatter_tensor_coalesced_": (Kind.REDUCE_SCATTER, 1),
    "alltoall_base_": (Kind.ALL_TO_ALL, 1),
    "alltoall_": (Kind.ALL_TO_ALL, 1),
    "broadcast_": (Kind.BROADCAST, 0),
    "send": (Kind.SEND, 0),
}
_UNCOUNTED = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_"}


class Flow(NamedTuple):
    group: str  # one of a layout's, see :func:`group_names`
    kind: Kind


@dataclass(frozen=True)
class Amount:
    calls: float
    payload: float  # bytes

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.calls + other.calls, self.payload + other.payload)

    def __mul__(self, times: float) -> Amount:
        return Amount(self.calls * times, self.payload * times)


Traffic = dict[Flow, Amount]


def total(parts: Iterable[Traffic]) -> Traffic:
    result: Traffic = {}
    for part in parts:
        for flow, amount in part.items():
            result[flow] = result.get(flow, Amount(0, 0)) + amount
    return result


def times(traffic: Traffic, factor: float) -> Traffic:
    return {flow: amount * factor for flow, amount in traffic.items()}


class Observed(TorchDispatchMode):
    """The traffic of everything inside, in groups of more than one rank."""

    def __init__(self, names: dict[str, str]) -> None:
        """``names``: of groups, by torch's own names of them; others keep those."""
        super().__init__()
        self.traffic: Traffic = {}
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: Any) -> None:
        if operation in _UNCOUNTED:
            return
        kind, place = _OPERATIONS[operation]  # KeyError: one that was never seen in a step
        group = _group_of(args)
        if group.size() == 1:
            return
        payload = sum(each.nbytes for each in tree_leaves(args[place]) if isinstance(each, Tensor))
        flow = Flow(self._names.get(group.group_name, group.group_name), kind)
        self.traffic[flow] = self.traffic.get(flow, Amount(0, 0)) + Amount(1, payload)


def group_names(layout: ParallelLayout) -> dict[str, str]:
    """Names of a layout's groups by torch's; the world is "world"."""
    groups = layout.groups
    own = {
        "world": torch.distributed.group.WORLD,
        "optimizer": vars(groups).get("intra_dist_opt"),
        "embd": groups.embd,
        "expt_dp": groups.expt_dp,
        "tp_ep": groups.tp_ep,
        "ep": groups.ep,
        "dp": groups.dp,
        "dp_cp": groups.dp_cp,
        "pp": groups.pp,
        "cp": groups.cp,
        "tp": groups.tp,
    }
    return {group.group_name: name for name, group in own.items() if isinstance(group, ProcessGroup)}


def _group_of(args: Any) -> ProcessGroup:
    for each in args:
        if isinstance(each, torch.ScriptObject):
            try:
                return ProcessGroup.unbox(each)
            except RuntimeError:  # another class, such as ReduceOp
                continue
    raise TypeError("a collective without a process group")
