"""Several teachers: each request is written by its prompt's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_opd.types import Rollout, RolloutEngine, RolloutRequest, SamplingParams


class RoutedEngine:
    """A :class:`~megatron_opd.types.RolloutEngine` over frozen engines by name, each with end tokens of its own."""

    def __init__(self, engines: Mapping[str, RolloutEngine], stop_ids: Mapping[str, tuple[int, ...]]) -> None:
        self.engines, self.stop_ids = engines, stop_ids

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Rollout]:
        rollouts: dict[int, Rollout] = {}
        for name, engine in self.engines.items():
            places = [place for place, request in enumerate(requests) if request.prompt.teacher == name]
            if places:
                own = replace(sampling, stop_ids=self.stop_ids[name])
                rollouts.update(zip(places, engine.generate([requests[place] for place in places], own), strict=True))
        return [rollouts[place] for place in range(len(requests))]

    def sleep(self) -> None:
        for engine in self.engines.values():
            engine.sleep()

    def figures(self) -> dict[str, float | None]:
        return {}  # a step's are the student's
