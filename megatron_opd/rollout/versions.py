"""Whose weights wrote the responses: this run's, and none that are older than it allows."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.types import OpdError, Rollout, Source


def check_versions(rollouts: Sequence[Rollout], version: int, lag: int) -> None:
    """Every part of the student's ``rollouts`` is by weights from ``version - lag`` to ``version``. Not for a frozen model's.

    Raises OpdError, on every rank that has the rollouts: another run pushes to the same servers, or they missed a push.
    """
    allowed = range(max(0, version - lag), version + 1)
    written = {each for rollout in rollouts if rollout.source is Source.STUDENT for each in _versions(rollout)}
    if wrong := sorted(written.difference(allowed)):
        raise OpdError(
            f"SGLang: responses were written by weights of version {', '.join(map(str, wrong))}, but this run's are version "
            f"{' or '.join(map(str, allowed))}; look for another run that uses the same servers, and give each run its own"
        )


def _versions(rollout: Rollout) -> set[int]:
    return {span.version for span in rollout.versions} or {rollout.policy_version}
