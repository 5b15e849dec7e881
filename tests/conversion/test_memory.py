"""The whole model is never in memory: conversions of one that is larger than each process may be."""

from __future__ import annotations

import filecmp
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import make_model

CAP_MIB = 96  # writable memory of each process beyond the imports: RLIMIT_DATA
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"arch": "llama", "hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "layers": 20, "vocab_size": 1000},
    "experts": {"arch": "mixtral", "hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "layers": 7, "vocab_size": 1000},
}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_model_larger_than_the_memory_there_is_goes_there_and_back(tmp_path: Path, model: str) -> None:
    make_model(tmp_path / "model", max_shard_size="60MB", **MODELS[model])
    assert sum(file.stat().st_size for file in (tmp_path / "model").iterdir()) > 2.5 * CAP_MIB * 2**20
    for command, source, target in (
        ("to-megatron", "model", "megatron"),
        ("to-hf", "megatron", "back"),
        ("verify", "model", "back"),
        ("verify", "megatron", "back"),
    ):
        shards = [] if command == "verify" else ["--shard-gb", "0.1"]
        arguments = [command, str(tmp_path / source), str(tmp_path / target), "--processes", "3", *shards]
        done = capped(CAP_MIB, arguments)
        assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.slow
def test_too_little_memory_ends_in_one_line_and_more_of_it_goes_on(tmp_path: Path) -> None:
    sizes = {"hidden": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "layers": 2, "vocab_size": 40_000}
    make_model(tmp_path / "model", "llama", tied=True, **sizes)  # type: ignore[arg-type]
    arguments = ["to-megatron", str(tmp_path / "model"), str(tmp_path / "out"), "--processes", "1", "--shard-gb", "0.01"]
    done = capped(64, arguments)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("convert: ")]  # the imports warn
    assert line.startswith(f"convert: {tmp_path / 'out'}: out of memory; take fewer --processes"), line
    assert not (tmp_path / "out").exists()
    assert capped(512, arguments).returncode == 0
    assert capped(512, ["verify", str(tmp_path / "model"), str(tmp_path / "out")]).returncode == 0


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_within_the_same_memory(tmp_path: Path) -> None:
    make_model(tmp_path / "model", max_shard_size="60MB", **MODELS["dense"])
    for command, source, target in (("to-megatron", "model", "megatron"), ("to-hf", "megatron", "back")):
        options = ["--processes", "2", "--shard-gb", "0.03"]
        assert capped(CAP_MIB, [command, str(tmp_path / source), str(tmp_path / target), *options]).returncode == 0
        killed = [command, str(tmp_path / source), str(tmp_path / f"{target}-killed"), *options]
        process = subprocess.Popen(capped_command(CAP_MIB, killed), stderr=subprocess.DEVNULL)
        journal = tmp_path / f".{target}-killed.partial" / "journal.jsonl"
        while not journal.exists() or journal.read_bytes().count(b"\n") < 3:  # what is converted, and two files
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (tmp_path / f"{target}-killed").exists()
        resumed = capped(CAP_MIB, killed)
        assert resumed.returncode == 0, resumed.stderr[-500:]
        assert "resumed; " in resumed.stderr
        names = [sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
                 for folder in (tmp_path / target, tmp_path / f"{target}-killed")]  # fmt: skip
        assert names[0] == names[1]
        _, *unequal = filecmp.cmpfiles(tmp_path / target, tmp_path / f"{target}-killed", map(str, names[0]), shallow=False)
        assert unequal == [[], []]


def capped(mib: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(capped_command(mib, arguments), capture_output=True, text=True)


def capped_command(mib: int, arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "tests.conversion.capped", str(mib), *arguments]
