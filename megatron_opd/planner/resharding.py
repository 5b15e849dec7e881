"""Which part of each of the student's tensors goes to which engine rank: the run's own rules on the parameters that SGLang
makes of a model. At the start of a run each engine says what it has; here that is written down for SGLang 0.5.21."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_opd.mcore.hf_export import TensorInfo
from megatron_opd.mcore.sharding import Dimensions
from megatron_opd.weight_sync.pieces import Piece, piece_of

_VOCABULARY_ROWS = 64  # a multiple of which SGLang pads vocabularies to


@dataclass(frozen=True)
class Resharding:
    tp: int
    stages: list[list[TensorInfo]]  # by sender
    pieces: list[list[list[Piece]]]  # [sender][engine rank]

    @property
    def received(self) -> list[int]:
        """Bytes, by engine rank."""
        return [sum(piece.nbytes for sender in self.pieces for piece in sender[rank]) for rank in range(self.tp)]

    @property
    def sent(self) -> list[int]:
        """Bytes that each sender has to offer."""
        return [sum(tensor.nbytes for tensor in tensors) for tensors in self.stages]

    @property
    def whole(self) -> int:
        """Tensors that go whole through SGLang's own loader."""
        return sum(piece.target is None for sender in self.pieces for piece in sender[0])

    def by_name(self) -> list[dict[str, Any]]:
        return [
            {
                "sender": number,
                "name": tensor.name,
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "engine_ranks": [
                    {"source": piece.source, "target": piece.target, "place": piece.place, "bytes": piece.nbytes}
                    for piece in of_ranks
                ],
            }
            for number, (tensors, sender) in enumerate(zip(self.stages, self.pieces, strict=True))
            for tensor, *of_ranks in zip(tensors, *sender, strict=True)
        ]


def reshard(stages: Sequence[Sequence[TensorInfo]], dims: Dimensions, tp: int) -> Resharding:
    """``stages``: what each sender exports; ``tp``: ranks of an engine."""
    shapes = engine_shapes([tensor for stage in stages for tensor in stage], dims, tp)
    pieces = [[[piece_of(tensor, shapes, rank, tp, dims) for tensor in stage] for rank in range(tp)] for stage in stages]
    return Resharding(tp, [list(stage) for stage in stages], pieces)


def engine_shapes(tensors: Iterable[TensorInfo], dims: Dimensions, tp: int) -> dict[str, list[int]]:
    """Of an engine rank's parameters, by the names that SGLang has for them; the same on all ranks."""
    found: dict[str, list[int]] = {}
    for tensor in tensors:
        *parents, module, kind = tensor.name.split(".")
        rows, *columns = tensor.shape
        if ".experts." in tensor.name:
            block = tensor.name.split(".experts.")[0] + ".experts."
            if module in ("down_proj", "w2"):
                found[f"{block}w2_weight"] = [dims.experts, rows, columns[0] // tp]
            else:
                found[f"{block}w13_weight"] = [dims.experts, 2 * rows // tp, *columns]
        elif module in ("q_proj", "k_proj", "v_proj"):
            heads = dims.heads // tp + 2 * max(1, dims.query_groups // tp)
            found[".".join([*parents, "qkv_proj", kind])] = [heads * dims.head_dim, *columns]
        elif module in ("gate_proj", "up_proj"):
            found[".".join([*parents, "gate_up_proj", kind])] = [2 * rows // tp, *columns]
        elif module in ("o_proj", "down_proj") and kind == "weight":
            found[tensor.name] = [rows, columns[0] // tp]
        elif module in ("embed_tokens", "lm_head"):
            padded = -(-rows // _VOCABULARY_ROWS) * _VOCABULARY_ROWS
            found[tensor.name] = [padded // tp, *columns]
        else:
            found[tensor.name] = list(tensor.shape)
    return found
