"""The folder that a conversion makes: there when it is whole, with a manifest of its files, and never before.

Until then it is ``.NAME.partial`` beside the target: ``files``, which becomes the target by a rename, and a journal of those
that are finished, from which the same command goes on after a kill.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from transformers.utils.hub import CHAT_TEMPLATE_DIR

from megatron_opd.conversion.digests import MANIFEST, Digest, Digesting, SourceCheck, manifest_text
from megatron_opd.mcore.checkpoint_files import list_files, root_cause
from megatron_opd.types import OpdError
from megatron_opd.workers import Interrupted, Report, StartReport, Task, portable, share

_FILES, _JOURNAL = "files", "journal.jsonl"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_BUFFER = 1 << 16  # bytes


@dataclass(frozen=True)
class OutputFile:
    """One that a process writes by itself.

    Args:
        name: its path within the result.
        source_bytes: that are read for it.
        write: fills the stream from front to back and reports the bytes that it has read; returns what the result's index
            needs to know of the file.
    """

    name: str
    source_bytes: int
    write: Callable[[BinaryIO, Report], list[int]]


@dataclass(frozen=True)
class Written:
    """A file that is on the disk."""

    digest: Digest  # of the bytes on their way to the disk
    notes: list[int]  # what its `write` has returned


class Partial:
    """A result that is not yet whole."""

    def __init__(self, folder: Path, journal: BinaryIO, finished: dict[str, Written]) -> None:
        self.folder, self._journal, self.finished = folder, journal, finished

    def write(
        self, files: Sequence[OutputFile], checks: Sequence[SourceCheck], processes: int, start: StartReport
    ) -> list[list[int]]:
        """What each file's ``write`` has returned. Those that are finished are left as they are; ``checks`` run all.

        Raises OpdError or OSError; Interrupted where the same command may go on.
        """
        missing = [file for file in files if file.name not in self.finished]
        for folder in {(self.folder / file.name).parent for file in missing}:
            folder.mkdir(exist_ok=True)
        report = start(sum(file.source_bytes for file in missing) + sum(check.expected.nbytes for check in checks))
        # Each file of the source is checked shortly before what is probably made of it, and then found in the system's cache.
        begin = [*_begins([check.expected.nbytes for check in checks]), *_begins([file.source_bytes for file in missing])]
        work: list[SourceCheck | OutputFile] = [*checks, *missing]
        ordered = [work[number] for number in sorted(range(len(work)), key=begin.__getitem__)]
        tasks: list[Task[Written | None]] = [each if isinstance(each, SourceCheck) else self._task(each) for each in ordered]
        with closing(share(tasks, processes, report)) as done:  # no process writes any more when this has failed
            for number, written in done:
                if written is not None:
                    self._record(ordered[number].name, written)
        return [self.finished[file.name].notes for file in files]

    def _task(self, file: OutputFile) -> Task[Written | None]:
        def write(report: Report) -> Written:
            with (self.folder / file.name).open("wb", buffering=_BUFFER) as raw:
                stream = Digesting(raw)
                notes = file.write(stream, report)  # type: ignore[arg-type]  # of a stream, all that writing needs
                raw.flush()
                os.fsync(raw.fileno())
                return Written(stream.digest(), notes)

        return write

    def _record(self, name: str, written: Written) -> None:
        self.finished[name] = written
        _append(self._journal, {"name": name, **asdict(written)})

    def write_manifest(self) -> None:
        """Of all files; of those that :meth:`write` has not written, which are small, after reading them."""
        rest = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        small = list_files([path for path in rest if self._name(path) not in self.finished], self.folder, to_disk=True)
        listed = {name: Digest(*entry) for name, entry in small.items()}
        listed |= {name: written.digest for name, written in self.finished.items()}
        with (self.folder / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(manifest_text(listed))
            file.flush()
            os.fsync(file.fileno())
        for folder in (self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())):
            _sync_folder(folder)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))


def _begins(sizes: Sequence[int]) -> list[float]:
    """Where each of consecutive pieces begins, as a share of them all."""
    ends = list(accumulate(sizes, initial=0))
    return [end / (ends[-1] or 1) for end in ends[:-1]]


@contextmanager
def new_folder(target: Path, needed: int, identity: dict[str, Any], say: Callable[[str], None]) -> Iterator[Partial]:
    """Give a folder to fill, and show it as ``target`` when the block ends well.

    Where the block raises OpdError or OSError nothing is left, nor parents that this call has made. After a kill, an interrupt
    or Interrupted, finished files are kept for the next call with the same ``identity``. It compares their sizes; their content
    was digested on its way to the disk, and ``verify`` reads it again.

    Args:
        needed: bytes that will be written.
        identity: what the result follows from, as JSON has it.
        say: takes a line where something is resumed or thrown away.

    Raises OpdError where ``target`` holds something, the disk is too small, another process is at it, or writing fails.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OpdError(f"{target}: exists and is not empty; give another target, or delete it")
    if target.is_mount():
        raise OpdError(f"{target}: is a mount point, in whose place no folder can be put; give a folder in it")
    path = target.resolve()
    partial = path.with_name(f".{path.name}.partial")
    parents = [parent for parent in path.parents if not parent.exists()]  # the innermost first
    with ExitStack() as stack:
        try:
            result = _resumed(partial, target, identity, say, stack)
            _check_disk(
                target, needed - sum(written.digest.nbytes for written in result.finished.values()) if result else needed
            )
            result = result or _begun(partial, target, identity, stack)
        except OSError as error:
            _remove_empty(parents)
            raise OpdError(f"{target}: cannot be written ({root_cause(error)}); give another target") from error
        try:
            yield result
            result.write_manifest()
            result.folder.rename(path)
            _sync_folder(path.parent)
        except Interrupted as error:
            raise Interrupted(f"{target}: {error}; the same command goes on from here") from error
        except OSError as error:
            if isinstance(portable(error), Interrupted):
                raise
            _remove(partial, parents)
            raise OpdError(f"{target}: cannot be written ({root_cause(error)}); nothing is left of it") from error
        except OpdError:
            _remove(partial, parents)
            raise
        shutil.rmtree(partial, ignore_errors=True)


def _remove(partial: Path, parents: Sequence[Path]) -> None:
    with suppress(OSError):
        _discard(partial)
    _remove_empty(parents)


def _discard(partial: Path) -> None:
    """The journal last: a kill in the midst leaves what is still known to be a conversion's."""
    shutil.rmtree(partial / _FILES, ignore_errors=True)
    shutil.rmtree(partial)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not there, or of use to somebody by now
            folder.rmdir()


def _resumed(
    partial: Path, target: Path, identity: dict[str, Any], say: Callable[[str], None], stack: ExitStack
) -> Partial | None:
    """What a killed conversion with the same ``identity`` has left; of another, or damaged, it is thrown away."""
    if not partial.exists():
        return None
    file = partial / _JOURNAL
    if not file.is_file() and any(partial.iterdir()):
        raise OpdError(f"{partial}: is there and of no conversion; delete it, or give another target")
    if file.is_file():
        journal = stack.enter_context(file.open("r+b"))
        _lock(journal, target)
        recorded = _read_journal(journal)
        files = partial / _FILES
        if recorded and recorded[0] == identity and files.is_dir():
            finished = {entry["name"]: Written(Digest(**entry["digest"]), entry["notes"]) for entry in recorded[1:]}
            finished = {name: written for name, written in finished.items() if _has_size(files / name, written.digest.nbytes)}
            for path in files.rglob("*"):
                if path.is_file() and str(path.relative_to(files)) not in finished:
                    path.unlink()
            say(f"{partial}: resumed; {len(finished)} files are finished")
            return Partial(files, journal, finished)
    say(f"{partial}: not of this source with these options and versions; thrown away")
    _discard(partial)
    return None


def _begun(partial: Path, target: Path, identity: dict[str, Any], stack: ExitStack) -> Partial:
    partial.mkdir(parents=True)
    journal = stack.enter_context((partial / _JOURNAL).open("x+b"))
    _lock(journal, target)
    _append(journal, identity)
    (partial / _FILES).mkdir()
    return Partial(partial / _FILES, journal, {})


def _lock(journal: BinaryIO, target: Path) -> None:
    """Until this process and its workers have ended. Raises OpdError where another has it."""
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OpdError(f"{target}: another conversion is writing it; wait for its end, or give another target") from error


def _read_journal(journal: BinaryIO) -> list[dict[str, Any]]:
    """Its whole lines, and no more is left in it: the last may have been cut off by the kill."""
    entries, valid = [], 0
    for line in journal:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
        valid += len(line)
    journal.seek(valid)
    journal.truncate()
    return entries


def _append(journal: BinaryIO, entry: dict[str, Any]) -> None:
    journal.write(json.dumps(entry).encode() + b"\n")
    journal.flush()
    os.fsync(journal.fileno())


def _has_size(file: Path, nbytes: int) -> bool:
    return file.is_file() and file.stat().st_size == nbytes


def _check_disk(target: Path, needed: int) -> None:
    parent = target.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OpdError(f"{target}: needs {needed / 1e9:.2f} GB, but {parent} has {free / 1e9:.2f} GB free; make room")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def identity_of(folder: Path) -> dict[str, list[int]]:
    """Size and time of the last change (ns) of each file: whether they are still those that were read."""
    files = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in files.items()}


def check_links(folder: Path) -> None:
    """Raises OpdError for a link to nothing, as half a download leaves it: :func:`copy_all_but_weights` would leave it out."""
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.exists():
            raise OpdError(f"{file}: a link to {os.readlink(file)}, which is not there; download it again, or delete the link")


def copy_all_but_weights(source: Path, target: Path) -> None:
    """config.json, generation config, tokenizer and whatever else lies there, byte for byte; of folders, chat templates.

    Raises OpdError where one cannot be read.
    """
    target.mkdir(exist_ok=True)
    for file in (*source.iterdir(), *(source / CHAT_TEMPLATE_DIR).rglob("*")):
        if file.is_file() and not is_of_weights(file.name):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            try:
                shutil.copyfile(file, copy)
            except PermissionError as error:
                raise OpdError(f"{file}: cannot be read ({error.strerror}); let this user read it") from error


def is_of_weights(name: str) -> bool:
    """Weights, their index or a manifest, which each folder has of its own."""
    return Path(name.removesuffix(".index.json")).suffix in _WEIGHTS or name == MANIFEST
