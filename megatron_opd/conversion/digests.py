"""BLAKE3 digests of files: kept while they are written, listed in a manifest beside them, and compared later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from megatron_opd.mcore.checkpoint_files import STATE, list_files, read_files, root_cause
from megatron_opd.processes import begin_sync
from megatron_opd.types import OpdError
from megatron_opd.workers import Report, Task

MANIFEST = "manifest.json"
_STORED = {".safetensors", ".distcp"}
_BLOCK = 1 << 20  # bytes; what is digested is still in the processor's cache when it is written
_SYNCED = 1 << 23  # bytes


@dataclass(frozen=True)
class Digest:
    """Of a file that was written."""

    nbytes: int
    blake3: str


class Digesting:
    """Passes on what is written to a file, and keeps its digest. The disk has work while the next bytes are made."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._hash, self._begun = stream, blake3(), 0
        self.tell, self.flush = stream.tell, stream.flush

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            self._hash.update(block)
            self._stream.write(block)
            if (end := self.tell()) - self._begun >= _SYNCED:
                begin_sync(self._stream.fileno(), self._begun, end - self._begun)
                self._begun = end
        return len(view)

    def digest(self) -> Digest:
        return Digest(self.tell(), self._hash.hexdigest())


def manifest_text(files: dict[str, Digest]) -> str:
    """``files`` by path within the folder."""
    listed = {name: {"bytes": each.nbytes, "blake3": each.blake3} for name, each in sorted(files.items())}
    return json.dumps({"files": listed}, indent=2) + "\n"


def manifest(folder: Path) -> dict[str, Digest]:
    """By path within ``folder``; nothing where it has none. Raises OpdError."""
    file = folder / MANIFEST
    if not file.is_file():
        return {}
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["files"]
        return {name: Digest(int(entry["bytes"]), str(entry["blake3"])) for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OpdError(f"{file}: cannot be read ({root_cause(error)}); delete it to compare without it") from error


@dataclass(frozen=True)
class SourceCheck:
    """Compares one file of a conversion's source with what is recorded of it. Raises OpdError where it differs."""

    folder: Path
    name: str
    expected: Digest

    def __call__(self, report: Report) -> None:
        for line in _difference(self.folder, self.name, self.expected, report):
            raise OpdError(f"{line}; copy it again, or take it as it is with --trust-source")


def source_checks(folders: Sequence[Path]) -> list[SourceCheck]:
    """Of all files of weights in ``folders``, in the order of their numbers; each once, though several may record it.

    Raises OpdError where a manifest or state is damaged.
    """
    checks = {
        (folder / name).resolve(): SourceCheck(folder, name, expected)
        for folder in folders
        for name, expected in recorded(folder).items()
        if Path(name).suffix in _STORED or Path(name).name == ".metadata"
    }
    return sorted(checks.values(), key=lambda check: (len(check.name), check.name))


def file_check(folder: Path, name: str, expected: Digest) -> Task[list[str]]:
    """How one file differs from the manifest of ``folder``, if it does: a line."""
    return lambda report: _difference(folder, name, expected, report)


def recorded(folder: Path) -> dict[str, Digest]:
    """By a conversion's manifest or a run's ``state.json``; nothing where there is neither. Raises OpdError."""
    files = manifest(folder)
    if (folder / STATE).is_file():
        files |= {name: Digest(*entry) for name, entry in read_files(folder).items()}
    return files


def _difference(folder: Path, name: str, expected: Digest, report: Report) -> list[str]:
    file = folder / name
    if not file.is_file():
        return [f"{file}: missing"]
    try:
        found = Digest(*list_files([file], folder, to_disk=False)[name])
    except OSError as error:
        raise OpdError(f"{file}: cannot be read ({error.strerror}); copy it again") from error
    report(expected.nbytes)
    return [] if found == expected else [f"{file}: has changed since it was written"]
