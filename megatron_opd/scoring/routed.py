"""Several teachers: each micro-batch is scored by its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from megatron_opd.types import FrozenScores, PackedBatch, Scorer


class RoutedScorer:
    """A :class:`~megatron_opd.types.Scorer` over scorers by name; one at a time is in device memory."""

    def __init__(self, scorers: Mapping[str, Scorer]) -> None:
        self.scorers = scorers
        self._asked: list[str] = []

    @contextmanager
    def on_device(self) -> Iterator[None]:
        yield  # each scorer's own phase lies inside `score`

    def score(self, shares: Sequence[Sequence[PackedBatch]]) -> list[FrozenScores]:
        scores: dict[int, FrozenScores] = {}
        self._asked = []
        for name, scorer in self.scorers.items():
            places = [place for place, batch in enumerate(shares[0]) if batch.teacher == name]  # the same in each share
            if places:
                self._asked.append(name)
                own = [[share[place] for place in places] for share in shares]
                with scorer.on_device():
                    scores.update(zip(places, scorer.score(own), strict=True))
        return [scores[place] for place in range(len(shares[0]))]

    def figures(self) -> dict[str, float | None]:
        """Of those that the last :meth:`score` asked; each figure's name ends with the teacher's."""
        own = {name: self.scorers[name].figures() for name in self._asked}
        return {f"{figure}/{name}": value for name, figures in own.items() for figure, value in figures.items()}
