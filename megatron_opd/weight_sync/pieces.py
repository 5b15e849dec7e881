"""Which part of each Hugging Face tensor an engine rank keeps, and where: read off the shapes of its own parameters.

SGLang fuses q, k, v and gate, up, stacks experts, and pads. The engine says what it has; a tensor whose place follows from that
is sent in parts, any other one whole, for SGLang's own loader to take what it needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from megatron_opd.mcore.hf_export import TensorInfo
from megatron_opd.mcore.sharding import Dimensions

Region = tuple[tuple[int, int], ...]  # first index and count of each dimension
Shapes = Mapping[str, Sequence[int]]  # of an engine rank's parameters, by name

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_GATES, _UPS = ("gate_proj", "w1"), ("up_proj", "w3")


@dataclass(frozen=True)
class Piece:
    """``source`` of a tensor becomes ``place`` of the parameter ``target``; None: the engine's own loader takes it whole."""

    tensor: TensorInfo
    source: Region
    target: str | None = None
    place: Region = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(count for _, count in self.source)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.tensor.dtype.itemsize

    def cut(self, full: torch.Tensor) -> torch.Tensor:
        """Of the full tensor; a view."""
        for dim, (first, count) in enumerate(self.source):
            full = full.narrow(dim, first, count)
        return full


def piece_of(tensor: TensorInfo, engine: Shapes, rank: int, tp: int, dims: Dimensions) -> Piece:
    """What tensor-parallel rank ``rank`` of ``tp`` with the parameters ``engine`` keeps of ``tensor``; may be empty."""
    rule = _dense if ".experts." not in tensor.name else _expert
    found = rule(tensor, engine, rank, tp, dims)
    return found if found is not None else Piece(tensor, _all(tensor.shape))


def unsent(pieces: Iterable[Piece], engine: Shapes) -> Iterator[str]:
    """Parameters that pieces fill in part: what SGLang pads them with must be zero, and a random start is not."""
    filled: dict[str, int] = {}
    for piece in pieces:
        if piece.target is not None:
            filled[piece.target] = filled.get(piece.target, 0) + prod(piece.shape)
    return (name for name, count in filled.items() if count < prod(engine[name]))


def _dense(tensor: TensorInfo, engine: Shapes, rank: int, tp: int, dims: Dimensions) -> Piece | None:
    *parents, module, kind = tensor.name.split(".")
    if kind == "sinks":  # SGLang chooses their dtype
        return None
    if module in ("q_proj", "k_proj", "v_proj"):
        return _attention(tensor, ".".join([*parents, "qkv_proj", kind]), module, engine, rank, tp, dims)
    if module in ("gate_proj", "up_proj"):
        target = ".".join([*parents, "gate_up_proj", kind])
        rows = engine.get(target, (0,))[0] // 2
        return _rows(tensor, target, engine, rank, rows, tp, offset=rows if module == "up_proj" else 0)
    shape = engine.get(tensor.name)
    if shape is None:
        return None
    if module in ("embed_tokens", "lm_head"):
        return _rows(tensor, tensor.name, engine, rank, shape[0], tp)
    if module in ("o_proj", "down_proj") and kind == "weight":
        return _columns(tensor, tensor.name, engine, rank, shape[1], tp)
    return Piece(tensor, _all(tensor.shape), tensor.name, _all(shape)) if tuple(shape) == tensor.shape else None


def _attention(
    tensor: TensorInfo, target: str, module: str, engine: Shapes, rank: int, tp: int, dims: Dimensions
) -> Piece | None:
    """Each query group is whole on one rank, or, where there are fewer than ranks, on several."""
    heads, groups = dims.heads // tp, max(1, dims.query_groups // tp)
    divides = dims.heads % tp == 0 and (dims.query_groups % tp == 0 or tp % dims.query_groups == 0)
    if not divides or engine.get(target, (0,))[0] != (heads + 2 * groups) * dims.head_dim:
        return None
    if module == "q_proj":
        first, count, offset = rank * heads, heads, 0
    else:
        first, count = rank * dims.query_groups // tp, groups
        offset = heads if module == "k_proj" else heads + groups
    rows = (first * dims.head_dim, count * dims.head_dim)
    return _place(tensor, 0, rows, target, (offset * dims.head_dim, rows[1]), engine)


def _expert(tensor: TensorInfo, engine: Shapes, rank: int, tp: int, dims: Dimensions) -> Piece | None:
    """Every rank has a part of each expert, or each rank has experts of its own."""
    match = _EXPERT.fullmatch(tensor.name)
    if match is None:
        return None
    block, expert, module = match[1], int(match[2]), match[3]
    down = module not in _GATES + _UPS
    target = f"{block}.w2_weight" if down else f"{block}.w13_weight"
    if target not in engine:
        return None
    experts, *shape = engine[target]  # [H, ffn] or [2 ffn, H]
    if experts * tp == dims.experts and tp > 1:
        first, rank, parts = rank * experts, 0, 1
    elif experts == dims.experts:
        first, parts = 0, tp
    else:
        return None
    one = {target: shape}
    if down:
        piece = _columns(tensor, target, one, rank, shape[1], parts)
    else:
        rows = shape[0] // 2
        piece = _rows(tensor, target, one, rank, rows, parts, offset=rows if module in _UPS else 0)
    if piece is None:
        return None
    here = first <= expert < first + experts
    if not here:
        return Piece(tensor, tuple((0, 0) for _ in tensor.shape), target, ((0, 0), *piece.place))
    return Piece(tensor, piece.source, target, ((expert - first, 1), *piece.place))


def _rows(
    tensor: TensorInfo, target: str, engine: Shapes, rank: int, rows: int, parts: int, *, offset: int = 0
) -> Piece | None:
    """``rows`` for each rank, the last of them padding where that is more than the tensor has."""
    own = _own(tensor.shape[0], rank, rows, parts)
    return None if own is None else _place(tensor, 0, own, target, (offset, own[1]), engine)


def _columns(tensor: TensorInfo, target: str, engine: Shapes, rank: int, columns: int, parts: int) -> Piece | None:
    own = _own(tensor.shape[1], rank, columns, parts)
    return None if own is None else _place(tensor, 1, own, target, (0, own[1]), engine)


def _own(size: int, rank: int, each: int, parts: int) -> tuple[int, int] | None:
    if each == size:  # the same on all ranks
        return (0, size)
    first = min(rank * each, size)
    return (first, min(each, size - first)) if each * parts >= size else None


def _place(
    tensor: TensorInfo, dim: int, source: tuple[int, int], target: str, place: tuple[int, int], engine: Shapes
) -> Piece | None:
    shape = engine.get(target)
    if shape is None or len(shape) != len(tensor.shape):
        return None
    others_fit = all(own == full for at, (own, full) in enumerate(zip(shape, tensor.shape, strict=True)) if at != dim)
    if not others_fit or sum(place) > shape[dim]:
        return None
    return Piece(tensor, _with(_all(tensor.shape), dim, source), target, _with(_all(shape), dim, place))


def _all(shape: Sequence[int]) -> Region:
    return tuple((0, size) for size in shape)


def _with(region: Region, dim: int, own: tuple[int, int]) -> Region:
    return (*region[:dim], own, *region[dim + 1 :])
