"""Safetensors files written front to back: the header is known before any tensor is, so none has to be kept.

The format is described in ``shard.py``, which reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

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


def header(tensors: Iterable[TensorInfo]) -> bytes:
    """The beginning of a file in which these tensors' bytes follow, in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in tensors:
        entries[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def content(tensor: Tensor) -> memoryview:
    """Its bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def file_names(count: int) -> list[str]:
    return [SINGLE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]


def write_index(folder: Path, files: Mapping[str, Iterable[TensorInfo]]) -> None:
    """Where there are several files: what is in which."""
    if len(files) > 1:
        weight_map = {info.name: file for file, infos in files.items() for info in infos}
        total = sum(info.nbytes for infos in files.values() for info in infos)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
