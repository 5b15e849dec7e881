"""Scores from a frozen Megatron model that sits on the student's ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.types import FrozenScores, PackedBatch


class MegatronScorer:
    """A :class:`~megatron_opd.types.Scorer` that gives full hidden states, hence exact full-vocabulary divergences."""

    def __init__(self, model: FrozenModel) -> None:
        self.model = model

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The weights stay where they are: one owner for the phase, so that offloading has a place to be."""
        yield

    def score(self, batches: Sequence[PackedBatch]) -> list[FrozenScores]:
        hidden = self.model.hidden_states(batches)
        if hidden is None:
            return [FrozenScores() for _ in batches]
        return [FrozenScores(each, self.model.lm_head) for each in hidden]
