"""Responses by other weights than the run's are refused, whether these are newer or too old."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_opd.rollout.versions import check_versions
from megatron_opd.types import OpdError, Rollout, Source, VersionSpan
from tests.data.factories import make_rollout


def written_by(*versions: int, source: Source = Source.STUDENT) -> Rollout:
    """Two tokens by each."""
    spans = tuple(VersionSpan(2 * place, 2 * place + 2, version) for place, version in enumerate(versions))
    return replace(make_rollout(source, tokens=2 * len(spans)), policy_version=min(versions), versions=spans)


@pytest.mark.parametrize(("versions", "lag"), [((2,), 0), ((2,), 1), ((1,), 1), ((1, 2), 1)])
def test_versions_of_now_and_as_old_as_allowed_pass(versions: tuple[int, ...], lag: int) -> None:
    check_versions([written_by(2), written_by(*versions)], 2, lag)


@pytest.mark.parametrize(("versions", "lag"), [((3,), 0), ((3,), 1), ((1,), 0), ((0,), 1), ((2, 3), 1), ((1, 2), 0)])
def test_newer_and_older_versions_are_refused(versions: tuple[int, ...], lag: int) -> None:
    with pytest.raises(OpdError, match=rf"version {max(versions) if 3 in versions else min(versions)}, but .* another run"):
        check_versions([written_by(2), written_by(*versions)], 2, lag)


def test_version_without_spans_counts_and_frozen_writers_are_exempt() -> None:
    check_versions([written_by(0, source=Source.TEACHER), make_rollout(Source.GOLD)], 2, 0)
    with pytest.raises(OpdError, match="version 0, but this run's are version 2;"):
        check_versions([make_rollout()], 2, 0)
