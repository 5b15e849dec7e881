"""Safetensors shards written tensor by tensor: the header is known before any tensor is, so none has to be kept.

The format: 8 bytes of header length, a JSON header with dtype, shape and offsets of each tensor, then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_opd.hf_folder import INDEX, SINGLE
from megatron_opd.mcore.hf_export import TensorInfo
from megatron_opd.types import OpdError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_named(name: str, where: str) -> torch.dtype:
    """Raises OpdError, which begins with ``where``, for a dtype that is not a plain floating-point number."""
    if name not in _DTYPES:
        raise OpdError(f"{where}: dtype {name} is not supported; supported are {', '.join(_DTYPES)}")
    return _DTYPES[name]


def plan_shards(tensors: Iterable[TensorInfo], shard_bytes: int) -> list[list[TensorInfo]]:
    """In order, each shard at most ``shard_bytes`` large; more where one tensor is larger."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


class ShardedWriter:
    """Files of a Hugging Face folder, with an index where there are several; tensors come in the order of the plan."""

    def __init__(self, folder: Path, shards: list[list[TensorInfo]]) -> None:
        self._folder, self._shards = folder, shards
        self._file: BinaryIO | None = None
        self._open = -1
        self._place: dict[str, int] = {}
        self._shard_of = {info.name: number for number, shard in enumerate(shards) for info in shard}

    def write(self, name: str, tensor: Tensor, index: int | None = None) -> None:
        """The whole tensor, or what has ``index`` in its first axis."""
        shard = self._shard_of[name]
        if shard != self._open:
            self._close()
            self._start(shard)
        assert self._file is not None
        self._file.seek(self._place[name] + (index or 0) * tensor.nbytes)
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        self._close()
        if len(self._shards) > 1:
            weight_map = {name: self._name(shard) for name, shard in sorted(self._shard_of.items())}
            total = sum(info.nbytes for shard in self._shards for info in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _name(self, shard: int) -> str:
        return SINGLE if len(self._shards) == 1 else f"model-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _start(self, shard: int) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        # Readers map the file and need each tensor aligned to its elements: the wide ones go first.
        for info in sorted(self._shards[shard], key=lambda info: -info.dtype.itemsize):
            header[info.name] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [end, end + info.nbytes],
            }
            offsets[info.name] = end
            end += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self._folder / self._name(shard)).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._place = {name: 8 + len(text) + offset for name, offset in offsets.items()}
        self._open = shard

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
