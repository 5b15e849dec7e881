"""Hidden states on their way from the ranks that computed them to the ranks whose loss needs them.

Student and frozen model share the ranks but not the layout. The global batch's micro-batches are dealt in blocks to the frozen
model's data-parallel replicas; what its last stage computed, cut by its own context parallelism, goes to each rank of the
student's last stage, cut by the student's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.data.packing import context_positions
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.platform import Platform
from megatron_opd.types import PackedBatch


@dataclass(frozen=True)
class _Piece:
    """Positions of a micro-batch that one rank has and another wants."""

    source: int  # global ranks
    target: int
    given: Tensor  # [P] int64, places among those that the source has
    wanted: Tensor  # [P] int64, places among those that the target wants


class Exchange:
    """The way of one global batch's hidden states. Every rank finds the same one from the same micro-batches."""

    def __init__(
        self, shares: Sequence[Sequence[PackedBatch]], student: ParallelLayout, frozen: ParallelLayout, platform: Platform
    ) -> None:
        """``shares``: whole micro-batches of each data-parallel rank of the student, as ``data.pack`` gives them."""
        self.batches = list(chain.from_iterable(shares))  # micro-batch i of rank d has number d * per_rank + i
        self.per_rank = len(shares[0])
        self.student, self.frozen, self.platform = student, frozen, platform
        self.rank = dist.get_rank()

    def scored_here(self) -> list[int]:
        """The numbers of the micro-batches that this rank's replica of the frozen model scores.

        Ranks that share experts call each other in every layer: all replicas of such a model score equally many, and one that
        has fewer repeats a micro-batch, whose states nobody asks for.
        """
        own = [number for number in range(len(self.batches)) if self._replica(number) == self.frozen.dp_rank]
        if self.frozen.ep_size > 1:
            most = -(-len(self.batches) // self.frozen.dp_size)
            own += (own[-1:] or [0]) * (most - len(own))
        return own

    def run(self, hidden: Sequence[Tensor], size: int, dtype: torch.dtype) -> list[Tensor | None]:
        """[T/cp, H] in host memory for each of this rank's micro-batches; None away from the student's last stage.

        Point to point over the world, one micro-batch at a time.

        Args:
            hidden: [T/cp', H] in host memory, for each of :meth:`scored_here` on the frozen model's last stage; else nothing.
            size: H.
        """
        have = dict(zip(self.scored_here(), hidden, strict=False)) if hidden else {}
        received = [self._move(number, have.get(number), size, dtype) for number in range(len(self.batches))]
        first = self.student.dp_rank * self.per_rank
        return received[first : first + self.per_rank]

    def _replica(self, number: int) -> int:
        return number * self.frozen.dp_size // len(self.batches)

    def _move(self, number: int, states: Tensor | None, size: int, dtype: torch.dtype) -> Tensor | None:
        """This rank's part of one micro-batch, if its loss is computed here; ``states`` where this rank has scored it."""
        device = self.platform.device
        operations: list[dist.P2POp] = []
        parts: list[tuple[Tensor, Tensor]] = []  # places [P] and states [P, H]
        for piece in self._pieces(number):
            if piece.source == self.rank:
                assert states is not None
                whole = len(piece.given) == len(states)  # positions ascend on both sides
                given = states if whole else states[piece.given]
                if piece.target == self.rank:
                    parts.append((piece.wanted, given))
                else:
                    operations.append(dist.P2POp(dist.isend, given.to(device), piece.target))
            elif piece.target == self.rank:
                buffer = torch.empty(len(piece.wanted), size, dtype=dtype, device=device)
                operations.append(dist.P2POp(dist.irecv, buffer, piece.source))
                parts.append((piece.wanted, buffer))
        for request in dist.batch_isend_irecv(operations) if operations else []:
            request.wait()
        if len(parts) <= 1:
            return self.platform.to_host(parts[0][1]) if parts else None
        wanted = torch.cat([places for places, _ in parts]).to(device)
        states = torch.cat([part.to(device) for _, part in parts])
        return self.platform.to_host(torch.empty_like(states).index_copy_(0, wanted, states))

    def _pieces(self, number: int) -> Iterator[_Piece]:
        """All that moves of one micro-batch, in the same order on every rank."""
        student, frozen = self.student, self.frozen
        boundaries = self.batches[number].cu_seqlens
        for cp in range(student.cp_size):
            wanted = context_positions(boundaries, cp, student.cp_size)  # [T/cp]
            for frozen_cp in range(frozen.cp_size):
                given = context_positions(boundaries, frozen_cp, frozen.cp_size)  # [T/cp']
                here, there = torch.isin(given, wanted).nonzero().flatten(), torch.isin(wanted, given).nonzero().flatten()
                if not len(here):
                    continue
                for tp in range(student.tp_size):
                    yield _Piece(
                        source=frozen.rank_of(
                            tp=tp % frozen.tp_size, cp=frozen_cp, dp=self._replica(number), pp=frozen.pp_size - 1
                        ),
                        target=student.rank_of(tp=tp, cp=cp, dp=number // self.per_rank, pp=student.pp_size - 1),
                        given=here,
                        wanted=there,
                    )
