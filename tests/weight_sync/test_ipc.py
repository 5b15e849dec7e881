"""The carrier for colocated engines and the loader in an engine's process, without SGLang; on GPUs tests/gpu has the same."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_models import make_model
from tests.weight_sync.ipc_push import Pushed, check, push_twice
from tests.worker_pool import WorkerPool


def test_engine_has_what_the_trainer_exported(pool: WorkerPool, tmp_path: Path) -> None:
    make_model(tmp_path / "student", "qwen3", layers=3, seed=1)
    pushes: list[list[Pushed]] = pool.run(1, push_twice, tmp_path / "student", tmp_path, 40_000)
    check(pushes[0])
