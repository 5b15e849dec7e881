"""The engine over several ranks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_opd.data import load_tokenizer
from megatron_opd.rollout import EmbeddedEngine
from megatron_opd.types import Rollout
from tests.rollout.requests import requests, sampling
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool


def _generate(folder: Path, count: int, alone: bool) -> list[Rollout]:
    engine = EmbeddedEngine(
        folder,
        load_tokenizer(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_batch_size=3,
        load=True,
        group=None if alone else dist.group.WORLD,
    )
    return engine.generate(requests(count), sampling(16, stop_ids=(7, 20, 33)))


def test_two_ranks_share_the_work_and_return_what_one_would(pool: WorkerPool, tmp_path: Path) -> None:
    make_model(tmp_path)
    for count in (1, 9):  # rank 1 without work, and unequal shares
        expected = _generate(tmp_path, count, alone=True)
        first, second = pool.run(2, _generate, tmp_path, count, False)
        assert first == second
        for one, other in zip(expected, first, strict=True):
            assert (one.prompt, one.response_ids, one.finish_reason, one.text) == (
                other.prompt,
                other.response_ids,
                other.finish_reason,
                other.text,
            )
            torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-4, rtol=0)
