"""Where a group's ranks are, and what its collectives take: NVLink within a node, the network between nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_opd.mcore.collectives import Amount, Kind, Traffic
from megatron_opd.planner.hardware import Efficiencies, Gpu

Groups = Mapping[str, Sequence[int]]  # global ranks of each of a layout's groups


@dataclass(frozen=True)
class Span:
    """A group over nodes of equal GPUs."""

    ranks: int
    on_node: int  # of its ranks, on the node with the fewest

    @property
    def crosses(self) -> bool:
        return self.on_node < self.ranks

    @staticmethod
    def of(ranks: Sequence[int], per_node: int) -> Span:
        return Span(len(ranks), min(Counter(rank // per_node for rank in ranks).values()))


@dataclass(frozen=True)
class Volume:
    """Of one kind of collective in one group, of one rank in a step."""

    group: str
    kind: Kind
    span: Span
    amount: Amount

    @property
    def sent(self) -> float:
        """Bytes."""
        return self.kind.sent(self.amount.payload, self.span.ranks)


def volumes(traffic: Traffic, groups: Groups, per_node: int) -> list[Volume]:
    return [Volume(flow.group, flow.kind, Span.of(groups[flow.group], per_node), amount) for flow, amount in traffic.items()]


def seconds(found: Sequence[Volume], gpu: Gpu, rates: Efficiencies) -> float:
    return sum(seconds_of(each, gpu, rates) for each in found)


def seconds_of(volume: Volume, gpu: Gpu, rates: Efficiencies) -> float:
    """A ring over nodes leaves each of them by as many ports as it has ranks there; a send by one."""
    nvlink, network = gpu.nvlink_bytes * rates.nvlink, gpu.network_bytes * rates.network
    fixed, sent, span = volume.amount.calls * rates.call, volume.sent, volume.span
    if not span.crosses:
        return fixed + sent / nvlink
    if volume.kind is Kind.ALL_TO_ALL:
        outside = (span.ranks - span.on_node) / (span.ranks - 1)
        return fixed + max(sent * outside / network, sent * (1 - outside) / nvlink)
    ports = 1 if volume.kind is Kind.SEND else span.on_node
    return fixed + sent / min(nvlink, network * ports)
