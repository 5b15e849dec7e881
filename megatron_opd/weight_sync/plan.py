"""Who gets which bytes in which order: the same plan in the trainer and, as JSON, in the engines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from megatron_opd.mcore.hf_export import TensorInfo
from megatron_opd.mcore.sharding import Dimensions
from megatron_opd.sglang.client import EngineError
from megatron_opd.weight_sync.delivery import Delivery, WeightsDiffer
from megatron_opd.weight_sync.members import Members, Reports
from megatron_opd.weight_sync.pieces import Piece, Shapes, piece_of, unsent

Digests = list[list[list[int]]]  # [engine rank][piece]


@dataclass(frozen=True)
class Parcel:
    """What one engine rank gets of one bucket: the pieces one behind the other, as bytes."""

    names: tuple[str, ...]  # of the bucket's tensors
    pieces: tuple[Piece, ...]  # those of which this rank keeps something

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @cached_property
    def _places(self) -> dict[str, tuple[Piece, int]]:
        """Each tensor's piece and first byte."""
        places, start = {}, 0
        for piece in self.pieces:
            places[piece.tensor.name] = (piece, start)
            start += piece.nbytes
        return places

    def cut(self, name: str, full: Tensor) -> Tensor | None:
        """What this rank keeps of the tensor ``name``, a view of ``full``; None where that is nothing."""
        return self._places[name][0].cut(full) if name in self._places else None

    def write(self, name: str, full: Tensor, flat: Tensor) -> None:
        """Copy that to its place in ``flat`` [nbytes] uint8."""
        if name in self._places:
            piece, start = self._places[name]
            flat[start : start + piece.nbytes].view(piece.tensor.dtype).view(piece.shape).copy_(piece.cut(full))


@dataclass(frozen=True)
class Plan:
    """For all engines alike."""

    parcels: list[list[list[Parcel]]]  # [sender][bucket][engine rank]
    zeros: list[list[str]]  # [engine rank]: parameters that are padding in part
    kept: float  # bytes of an engine rank's parameters, on average

    def pieces(self, rank: int) -> Iterable[Piece]:
        """Of an engine rank, in the order in which it reports them."""
        return (piece for sender in self.parcels for bucket in sender for piece in bucket[rank].pieces)

    def command(self, rank: int) -> dict[str, Any]:
        """An engine rank's part, as its loader reads it."""
        return {
            "zeros": self.zeros[rank],
            "buckets": [
                [{"bytes": parcel.nbytes, "pieces": [_as_json(piece) for piece in parcel.pieces]} for parcel in parcels]
                for parcels in ([bucket[rank] for bucket in sender] for sender in self.parcels)
            ],
        }


def make_plan(
    streams: Sequence[Sequence[TensorInfo]],
    members: Members,
    dims: Dimensions,
    bucket_bytes: int,
    alone_from: int | None = None,
) -> Plan:
    """Ask the engines what they have, and cut each sender's stream for it.

    Args:
        bucket_bytes: of the tensors that go together, at most; a larger one goes by itself.
        alone_from: bytes from which a tensor goes by itself in any case.

    Raises EngineError where an engine does not answer, or has other parameters than the first one.
    """
    met = members.meet()
    first, *others = [[report["parameters"] for report in engine] for engine in met]
    for endpoint, other in zip(members.endpoints[1:], others, strict=True):
        if other != first:
            raise EngineError(
                f"SGLang server {endpoint.url}: has other parameters than {members.endpoints[0].url}; start them alike"
            )
    shapes = [{name: shape for name, (shape, _) in each.items()} for each in first]
    if any(report["up_first"] for engine in met for report in engine):  # their halves are swapped: let SGLang place them
        shapes = [{name: shape for name, shape in each.items() if not name.endswith("w13_weight")} for each in shapes]

    ranks = range(members.tp)
    _check_attention(shapes[0], members.endpoints[0].url)
    pieces = [
        {tensor.name: piece_of(tensor, shapes[rank], rank, members.tp, dims) for stream in streams for tensor in stream}
        for rank in ranks
    ]
    for rank in ranks:
        _check_complete(pieces[rank].values(), shapes[rank], f"SGLang server {members.endpoints[0].url}, rank {rank}")

    def parcel(bucket: Sequence[TensorInfo], rank: int) -> Parcel:
        names = tuple(tensor.name for tensor in bucket)
        return Parcel(names, tuple(pieces[rank][name] for name in names if pieces[rank][name].nbytes))

    return Plan(
        [[[parcel(bucket, rank) for rank in ranks] for bucket in buckets(each, bucket_bytes, alone_from)] for each in streams],
        [list(unsent(pieces[rank].values(), shapes[rank])) for rank in ranks],
        sum(size for each in first for _, size in each.values()) / len(first),
    )


def _check_attention(shapes: Shapes, engine: str) -> None:
    """SGLang fuses latent attention's projections, and derives others from kv_b_proj, in one call of its own loader alone."""
    for name in shapes:
        if name.endswith(".kv_b_proj.weight"):
            raise EngineError(
                f"SGLang server {engine}: serves latent attention ({name}), from which SGLang derives weights that are not "
                "sent one by one; set rollout.weight_sync: native or disk"
            )


def _check_complete(pieces: Iterable[Piece], shapes: Shapes, engine: str) -> None:
    """Raises EngineError with the first parameter that no tensor belongs to, unless SGLang's own loader places some."""
    targets = {piece.target for piece in pieces}
    missing = [name for name in shapes if name not in targets]
    if missing and None not in targets:
        raise EngineError(f"{engine}: the student has nothing for its parameter {missing[0]}; serve the student's own model")


def buckets(tensors: Iterable[TensorInfo], limit: int, alone_from: int | None = None) -> list[list[TensorInfo]]:
    """Consecutive tensors of at most ``limit`` bytes together; one that is larger, or has ``alone_from`` bytes, by itself."""
    found: list[list[TensorInfo]] = []
    room = 0
    for tensor in tensors:
        if tensor.nbytes > room or (alone_from is not None and tensor.nbytes >= alone_from):
            found.append([])
            room = limit
        found[-1].append(tensor)
        room = 0 if alone_from is not None and tensor.nbytes >= alone_from else room - tensor.nbytes
    return found


def conclude(plan: Plan, members: Members | None, reports: Reports, sent: Sequence[Digests]) -> Delivery:
    """What the engines' reports on a whole delivery say; on the first rank.

    Raises WeightsDiffer with the first engine, rank and tensor whose digest is not that of what was sent.

    Args:
        sent: of each sender; none where digests were not asked for.
    """
    assert members is not None
    for endpoint, ranks in zip(members.endpoints, reports, strict=True):
        for rank, report in enumerate(ranks):
            expected = [digest for sender in sent for digest in sender[rank]]
            for piece, own, found in zip(plan.pieces(rank), expected, report["digests"] or [], strict=bool(sent)):
                if found is not None and found != own:
                    raise WeightsDiffer(
                        f"SGLang server {endpoint.url}, rank {rank}: {piece.tensor.name} is not what the trainer sent"
                    )
    ranks = [report for engine in reports for report in engine]
    return Delivery(sum(report["bytes"] for report in ranks) / len(ranks), plan.kept)


def _as_json(piece: Piece) -> dict[str, Any]:
    return {
        "name": piece.tensor.name,
        "dtype": str(piece.tensor.dtype).removeprefix("torch."),
        "shape": list(piece.shape),
        "target": piece.target,
        "place": piece.place,
    }
