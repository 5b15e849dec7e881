"""One safetensors file, read at the offsets of its header: nothing is mapped, and memory holds no more than is asked for.

The format: 8 bytes of header length, a JSON header with dtype, shape and offsets of each tensor, then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opd.types import OpdError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LARGEST_HEADER = 100_000_000  # bytes; what the format allows


@dataclass(frozen=True)
class _Stored:
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    start: int  # offset in the file
    nbytes: int


class Shard:
    """Raises OpdError where the file is missing, truncated, no safetensors file, or changed after its header was read."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            with file.open("rb") as stream:
                self._state = _state(stream.fileno())
                self._stored = _read_header(stream, os.fstat(stream.fileno()).st_size)
        except FileNotFoundError as error:
            raise OpdError(f"{file}: listed in the index but missing; download the shard again") from error
        except OSError as error:
            raise OpdError(f"{file}: cannot be read ({error.strerror}); download it again") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._unreadable(str(error) or type(error).__name__) from error

    @property
    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Tensor name → shape, and dtype as safetensors spells it (``BF16``)."""
        return {name: (stored.shape, stored.dtype) for name, stored in self._stored.items()}

    def nbytes(self, name: str) -> int:
        return self._stored[name].nbytes

    def tensor(self, name: str, into: Tensor | None = None) -> Tensor:
        """A copy of its own, or in ``into``: uint8 of as many bytes."""
        stored = self._stored[name]
        return self._read(name, 0, stored.nbytes, into).reshape(stored.shape)

    def rows(self, name: str, start: int, stop: int, into: Tensor | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, all within it: [stop - start, ...]"""
        stored = self._stored[name]
        size = stored.nbytes // stored.shape[0] if stored.shape[0] else 0
        return self._read(name, start * size, (stop - start) * size, into).reshape(stop - start, *stored.shape[1:])

    def _read(self, name: str, start: int, nbytes: int, into: Tensor | None) -> Tensor:
        stored = self._stored[name]
        if stored.dtype not in _DTYPES:
            raise OpdError(f"{self._file}: {name}: dtype {stored.dtype} is not supported; supported are {', '.join(_DTYPES)}")
        content = torch.empty(nbytes, dtype=torch.uint8) if into is None else into
        try:
            with self._file.open("rb", buffering=0) as stream:
                if _state(stream.fileno()) != self._state:
                    raise OpdError(f"{self._file}: has changed while it was in use; start again")
                fill(stream.fileno(), stored.start + start, content.numpy().data)
        except OSError as error:
            raise OpdError(f"{self._file}: {name} cannot be read ({error.strerror}); download it again") from error
        return content.view(_DTYPES[stored.dtype])

    def _unreadable(self, reason: str) -> OpdError:
        return OpdError(f"{self._file}: truncated or not a safetensors file ({reason}); download it again")


def _read_header(stream: Any, size: int) -> dict[str, _Stored]:
    """Raises ValueError, KeyError, TypeError or AttributeError where it does not fit the file's ``size``."""
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise ValueError(f"its header would have {length} bytes, the file has {size}")
    stored, end = {}, 0
    for name, entry in json.loads(stream.read(length)).items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        shape = tuple(int(each) for each in entry["shape"])
        dtype = _DTYPES.get(entry["dtype"])
        if not 0 <= start <= stop or (dtype is not None and prod(shape) * dtype.itemsize != stop - start):
            raise ValueError(f"{name} has offsets that do not fit its shape")
        stored[name] = _Stored(entry["dtype"], shape, 8 + length + start, stop - start)
        end = max(end, 8 + length + stop)
    if end > size:
        raise ValueError(f"its tensors end at byte {end}, the file has {size}")
    covered = 8 + length
    for name, each in sorted(stored.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if each.start != covered:
            raise ValueError(f"{name} begins at byte {each.start}, what precedes it ends at {covered}")
        covered += each.nbytes
    if covered != size:
        raise ValueError(f"its tensors end at byte {covered}, the file has {size}")
    return stored


def fill(descriptor: int, offset: int, view: memoryview) -> None:
    """``view`` with the file's bytes from ``offset`` on. Raises OSError."""
    while view:
        count = os.preadv(descriptor, [view], offset)  # no more than 2 GiB at once
        if not count:
            raise OSError(0, "the file ends before")
        view, offset = view[count:], offset + count


def _state(descriptor: int) -> tuple[int, int, int]:
    found = os.fstat(descriptor)
    return found.st_ino, found.st_size, found.st_mtime_ns
