"""Scores from a frozen Megatron model that sits on the student's ranks, in a layout of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from megatron_opd.data.packing import context_slice
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.scoring.exchange import Exchange
from megatron_opd.types import FrozenScores, PackedBatch


class MegatronScorer:
    """A :class:`~megatron_opd.types.Scorer` that gives full hidden states, hence exact full-vocabulary divergences."""

    def __init__(self, model: FrozenModel) -> None:
        self.model = model

    def on_device(self) -> AbstractContextManager[None]:
        return self.model.on_device()

    def score(self, shares: Sequence[Sequence[PackedBatch]]) -> list[FrozenScores]:
        model, layout = self.model, self.model.layout
        exchange = Exchange(shares, model.student, layout, model.platform)
        own = [context_slice(exchange.batches[number], layout.cp_rank, layout.cp_size) for number in exchange.scored_here()]
        hidden = model.hidden_states(own) if own else []
        received = exchange.run(hidden, model.hidden_size, model.dtype)
        return [FrozenScores(each, model.lm_head) if each is not None else FrozenScores() for each in received]

    def figures(self) -> dict[str, float | None]:
        return {}
