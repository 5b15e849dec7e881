"""Every source's responses, in the plan's order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_opd.data import load_tokenizer
from megatron_opd.rollout import EmbeddedEngine, collect
from megatron_opd.types import OpdError, Prompt, RolloutRequest, Source
from tests.rollout.requests import sampling
from tests.tiny_models import make_model


def _engine(folder: Path, seed: int) -> EmbeddedEngine:
    make_model(folder, seed=seed)
    tokenizer = load_tokenizer(folder)
    return EmbeddedEngine(
        folder, tokenizer, dtype=torch.float32, device=torch.device("cpu"), max_batch_size=4, load=True, group=None
    )


def _plan(sources: tuple[Source, ...]) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            Prompt(str(i), tuple(range(5, 7 + i)), "", solution_ids=(30 + i, 1), solution=f"w{30 + i}"), source, 0, seed=i
        )
        for i, source in enumerate(sources)
    ]


def test_each_source_writes_its_own_and_the_order_is_the_plans(tmp_path: Path) -> None:
    student, teacher = _engine(tmp_path / "student", 1), _engine(tmp_path / "teacher", 2)
    plan = _plan((Source.GOLD, Source.TEACHER, Source.STUDENT, Source.STUDENT, Source.GOLD, Source.TEACHER))
    rollouts = collect(plan, student, teacher, sampling())
    assert [(r.prompt.uid, r.source) for r in rollouts] == [(r.prompt.uid, r.source) for r in plan]
    for request, rollout in zip(plan, rollouts, strict=True):
        if request.source is Source.GOLD:
            assert rollout.response_ids == request.prompt.solution_ids and rollout.log_probs == ()
        else:
            writer = student if request.source is Source.STUDENT else teacher
            assert rollout.response_ids == writer.generate([request], sampling())[0].response_ids


def test_only_gold_needs_no_engine() -> None:
    assert [r.text for r in collect(_plan((Source.GOLD, Source.GOLD)), None, None, sampling())] == ["w30", "w31"]


def test_a_source_without_an_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match=r"^mixture.teacher: .* set mixture.teacher=0"):
        collect(_plan((Source.STUDENT, Source.TEACHER)), _engine(tmp_path, 1), None, sampling())
    with pytest.raises(OpdError, match=r"^mixture.student: "):
        collect(_plan((Source.STUDENT,)), None, None, sampling())
