"""One step's responses, each from the one who is to write it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.data import gold_rollout
from megatron_opd.types import OpdError, Rollout, RolloutEngine, RolloutRequest, SamplingParams, Source


def collect(
    plan: Sequence[RolloutRequest],
    student_engine: RolloutEngine | None,
    teacher_engine: RolloutEngine | None,
    sampling: SamplingParams,
) -> list[Rollout]:
    """The plan's rollouts in the plan's order; collective where the engines are. Gold solutions need no engine.

    Raises:
        OpdError: the plan asks for a source that has no engine, a gold solution is missing, or an engine refuses a request.
    """
    engines = {Source.STUDENT: student_engine, Source.TEACHER: teacher_engine}
    rollouts: dict[int, Rollout] = {}  # by position in the plan
    for source in Source:
        places = [place for place, request in enumerate(plan) if request.source is source]
        if not places:
            continue
        requests = [plan[place] for place in places]
        if source is Source.GOLD:
            written = [gold_rollout(request) for request in requests]
        else:
            engine = engines[source]
            if engine is None:
                raise OpdError(
                    f"mixture.{source}: asks for responses, but no engine holds the {source}; set mixture.{source}=0"
                )
            written = engine.generate(requests, sampling)
        rollouts.update(zip(places, written, strict=True))
    return [rollouts[place] for place in range(len(plan))]
