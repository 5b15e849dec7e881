"""The step that is planned has the micro-batches that a run packs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opd.config_file import validate_config
from megatron_opd.data.packing import Multiples, pack
from megatron_opd.mcore.fake_world import FAKE
from megatron_opd.planner.mean_step import Lengths, mean_step
from megatron_opd.preflight import check_models
from megatron_opd.types import Prompt, Rollout, Source
from tests.tiny_models import make_model


@pytest.mark.parametrize(("fp8", "padding"), [(None, ()), ("current", (8,)), ("mxfp8", (8,))])
def test_micro_batches_are_those_that_a_run_packs(fp8: str | None, padding: tuple[int, ...], tmp_path: Path) -> None:
    make_model(tmp_path / "model", "qwen3", hidden=64, seed=1)
    tree = {
        "run": {"name": "planned"},
        "student": {
            "model": str(tmp_path / "model"),
            "fp8": fp8,
            "dtype": "bfloat16",
            "parallel": {"tp": 2, "sequence_parallel": True},
        },
        "teacher": {"model": str(tmp_path / "model"), "self_distillation": True},
        "rollout": {"sampling": {"max_new_tokens": 16}},
        "data": {"prompts": "none.jsonl", "prompts_per_step": 8, "max_context": 64},
        "mixture": {"student": 1, "gold": 0},
        "packing": {"max_tokens_per_microbatch": 150},
    }
    config = validate_config(tree)
    mean = mean_step(config, check_models(config, FAKE, 2), 2, Lengths(prompt=20, response=11))
    rollouts = [
        Rollout(Prompt(str(number), (1,) * 20, ""), Source.STUDENT, (2,) * 11, (-1.0,) * 11, "length", 0, "")
        for number in range(mean.responses)
    ]
    (batches,) = pack(
        rollouts,
        dp_size=1,
        max_tokens=config.packing.max_tokens_per_microbatch,
        aggregation="token",
        multiples=Multiples.of(config.layouts.values(), config.row_multiple),
    )
    assert [tuple(batch.cu_seqlens.diff().tolist()) for batch in batches] == [mean.lengths] * mean.microbatches
    assert mean.lengths == (30, 30, 30, 30, *padding)
