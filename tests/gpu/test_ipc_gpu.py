"""CUDA IPC: the product's carrier to an engine in another process, which reads the trainer's buffers on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import Table
from tests.gpu.one_rank import alone
from tests.tiny_models import make_model
from tests.weight_sync.ipc_push import check, push_twice

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("bucket_bytes", [1 << 16, 1 << 30], ids=["many buckets", "one bucket"])
def test_engine_in_another_process_has_what_the_trainer_exported(tmp_path: Path, bucket_bytes: int, table: Table) -> None:
    make_model(tmp_path / "student", "qwen3", layers=8, hidden=256, heads=8, kv_heads=4, head_dim=64, seed=1)
    pushes = alone(push_twice, tmp_path / "student", tmp_path, bucket_bytes)
    check(pushes)
    held = " and ".join(f"{push.held / 2**20:.0f} MiB" for push in pushes)
    table.add("Weights by CUDA IPC", f"buckets of {bucket_bytes} bytes", f"{pushes[0].received:.0f} bytes; then held: {held}")
