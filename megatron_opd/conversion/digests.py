"""Digests of files: kept while they are written, listed in a manifest beside them, and compared later.

BLAKE2b is for ``verify``. A conversion compares its source by CRC32, a fifth of the work, which finds every flipped bit and
misses one in 2³² of other damages; files that were recorded without one it compares by BLAKE2b.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_opd.conversion.workers import Report, Task
from megatron_opd.mcore.checkpoint_files import STATE, list_files, read_state, root_cause
from megatron_opd.types import OpdError

MANIFEST = "manifest.json"
_STORED = {".safetensors", ".distcp"}
_BLOCK = 1 << 20  # bytes; what is digested is still in the processor's cache when it is written


@dataclass(frozen=True)
class Digests:
    """Of a file that was written."""

    nbytes: int
    blake2b: str
    crc32: int | None  # None: not known


class Digesting:
    """Passes on what is written, and keeps its digests."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._hash, self._crc = stream, hashlib.blake2b(digest_size=16), 0
        self.tell, self.flush = stream.tell, stream.flush

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            self._hash.update(block)
            self._crc = zlib.crc32(block, self._crc)
            self._stream.write(block)
        return len(view)

    def digests(self) -> Digests:
        return Digests(self.tell(), self._hash.hexdigest(), self._crc)


def manifest_text(files: dict[str, Digests]) -> str:
    """``files`` by path within the folder."""
    listed = {}
    for name, each in sorted(files.items()):
        crc = {} if each.crc32 is None else {"crc32": f"{each.crc32:08x}"}
        listed[name] = {"bytes": each.nbytes, "blake2b": each.blake2b, **crc}
    return json.dumps({"files": listed}, indent=2) + "\n"


def manifest(folder: Path) -> dict[str, Digests]:
    """By path within ``folder``; nothing where it has none. Raises OpdError."""
    file = folder / MANIFEST
    if not file.is_file():
        return {}
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["files"]
        return {
            name: Digests(int(entry["bytes"]), str(entry["blake2b"]), int(entry["crc32"], 16) if "crc32" in entry else None)
            for name, entry in listed.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OpdError(f"{file}: cannot be read ({root_cause(error)}); delete it to compare without it") from error


@dataclass(frozen=True)
class SourceCheck:
    """Compares one file of a conversion's source with what is recorded of it. Raises OpdError where it differs."""

    folder: Path
    name: str
    expected: Digests

    def __call__(self, report: Report) -> None:
        for line in _difference(self.folder, self.name, self.expected, report, quick=self.expected.crc32 is not None):
            raise OpdError(f"{line}; copy it again, or take it as it is with --trust-source")


def source_checks(folders: Sequence[Path]) -> list[SourceCheck]:
    """Of all files of weights, in the order of their numbers. Raises OpdError where a manifest or state is damaged."""
    checks = [SourceCheck(folder, *each) for folder in folders for each in _recorded(folder).items()]
    return sorted(checks, key=lambda check: (len(check.name), check.name))


def file_check(folder: Path, name: str, expected: Digests) -> Task[list[str]]:
    """How one file differs from the manifest of ``folder``, if it does: a line. By BLAKE2b."""
    return lambda report: _difference(folder, name, expected, report, quick=False)


def _recorded(folder: Path) -> dict[str, Digests]:
    """Of the weights' files, by a conversion's manifest or a run's ``state.json``. Raises OpdError."""
    files = manifest(folder)
    if (folder / STATE).is_file():
        for name, (size, digest, *crc) in read_state(folder)["files"].items():
            files[name] = Digests(int(size), str(digest), int(crc[0], 16) if crc else None)  # earlier versions kept none
    return {name: entry for name, entry in files.items() if Path(name).suffix in _STORED or Path(name).name == ".metadata"}


def _difference(folder: Path, name: str, expected: Digests, report: Report, *, quick: bool) -> list[str]:
    file = folder / name
    if not file.is_file():
        return [f"{file}: missing"]
    if quick:
        same = _size_and_crc32(file) == (expected.nbytes, expected.crc32)
    else:
        same = list_files([file], folder, to_disk=False)[name][:2] == (expected.nbytes, expected.blake2b)
    report(expected.nbytes)
    return [] if same else [f"{file}: has changed since it was written"]


def _size_and_crc32(file: Path) -> tuple[int, int]:
    block, size, crc = memoryview(bytearray(_BLOCK)), 0, 0
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            size, crc = size + count, zlib.crc32(block[:count], crc)
    return size, crc
