"""Safetensors files: every dtype as the safetensors library reads it, and files that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opd.shard import Shard
from megatron_opd.types import OpdError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    weights = {
        "matrix": torch.randn(5, 3),
        "half": torch.randn(2, 2).bfloat16(),
        "eighth": torch.randn(4).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "number": torch.tensor(7),
        "nothing": torch.empty(0, 3),
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_tensors_are_those_of_the_safetensors_library(file: Path) -> None:
    shard, expected = Shard(file), load_file(file)
    assert shard.headers.keys() == expected.keys()
    assert shard.headers["half"] == ((2, 2), "BF16")
    for name, tensor in expected.items():
        found = shard.tensor(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert torch.equal(shard.rows("matrix", 1, 4), expected["matrix"][1:4])


def with_header(file: Path, change: Callable[[dict], object]) -> None:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:]),
        lambda file: file.write_bytes((10).to_bytes(8, "little") + b"[1, 2, 3] "),
        lambda file: with_header(file, lambda header: header["matrix"].update(shape=[5, 4])),
        lambda file: with_header(file, lambda header: header["matrix"].update(data_offsets=[-60, 0])),
        lambda file: with_header(file, lambda header: header["matrix"].pop("dtype")),
    ],
    ids=["empty", "truncated", "endless header", "no header", "other shape", "negative offset", "no dtype"],
)
def test_what_is_no_safetensors_file_is_named(file: Path, change: Callable[[Path], object]) -> None:
    change(file)
    with pytest.raises(OpdError, match=r"model\.safetensors: truncated or not a safetensors file"):
        Shard(file)


def test_dtype_that_torch_lacks_is_named_when_it_is_read(file: Path) -> None:
    with_header(file, lambda header: header["half"].update(dtype="F4"))
    shard = Shard(file)
    assert shard.headers["half"] == ((2, 2), "F4")
    with pytest.raises(OpdError, match="half: dtype F4 is not supported"):
        shard.tensor("half")


def test_file_that_is_written_after_its_header_was_read_is_named(file: Path) -> None:
    shard = Shard(file)
    os.utime(file, ns=(0, 0))
    with pytest.raises(OpdError, match="has changed"):
        shard.tensor("matrix")
