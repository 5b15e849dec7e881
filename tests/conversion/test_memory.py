"""The whole model is never in memory: conversions of one that is larger than the process may be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import make_model

CAP_MIB = 96  # writable memory beyond the imports: RLIMIT_DATA, which counts mapped shards of the source too


@pytest.mark.slow
def test_a_model_larger_than_the_memory_there_is_goes_there_and_back(tmp_path: Path) -> None:
    sizes = {"hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "layers": 20, "vocab_size": 1000}
    make_model(tmp_path / "model", "llama", max_shard_size="8MB", **sizes)  # type: ignore[arg-type]
    assert sum(file.stat().st_size for file in (tmp_path / "model").iterdir()) > 2.5 * CAP_MIB * 2**20
    for command, source, target in (
        ("to-megatron", "model", "megatron"),
        ("to-hf", "megatron", "back"),
        ("verify", "model", "back"),
        ("verify", "megatron", "back"),
    ):
        shards = [] if command == "verify" else ["--shard-gb", "0.008"]
        arguments = [command, str(tmp_path / source), str(tmp_path / target), *shards]
        done = subprocess.run(
            [sys.executable, "-m", "tests.conversion.capped", str(CAP_MIB), *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-500:]
