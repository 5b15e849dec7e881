"""Checkpoint folders as files: how one comes about, which are whole, which are damaged, which are deleted.

The folders are Megatron-LM's own: ``iter_0000050`` and, beside it, ``latest_checkpointed_iteration.txt``. One appears by a
rename when everything in it is on the disk. ``state.json`` in it, written last, is ours: it lists size and digests of every
other file. The storage is shared by all ranks.
"""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from blake3 import blake3
from torch.distributed.checkpoint.api import CheckpointException

from megatron_opd.processes import end_with_parent
from megatron_opd.types import OpdError

Result = TypeVar("Result")
Files = dict[str, tuple[int, str]]  # bytes and BLAKE3 digest, by the path within the folder
STATE = "state.json"
LATEST = "latest_checkpointed_iteration.txt"
_DIGEST_LENGTH = 64  # hexadecimal digits
_NAME = re.compile(r"iter_(\d{7,})")
_BLOCK = 1 << 20  # bytes
_BALLAST, _BALLAST_BYTES = ".ballast", 1 << 26


class SaveFailed(Exception):
    """A checkpoint could not be written; nothing of it is left, the earlier ones are as they were. Raised on all ranks."""


def checkpoints(folder: Path) -> list[Path]:
    """All that have their state, damaged or not, newest first."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / STATE).is_file())
    return sorted(found, key=number, reverse=True)


def checkpoint_name(step: int) -> str:
    return f"iter_{step:07d}"


def number(path: Path) -> int:
    """The step of a checkpoint folder, from its name."""
    return int(path.name.removeprefix("iter_"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whose files are there in their sizes, or None. Reads no tensor."""
    return next((path for path in checkpoints(folder) if damage(path) is None), None)


def healthy_checkpoint(folder: Path, last_step: int) -> Path | None:
    """The newest of up to ``last_step`` whose step raised no alarm and whose files are there, or None."""
    return next((path for path in checkpoints(folder) if number(path) <= last_step and _is_healthy(path)), None)


def alarms_of_checkpoints(folder: Path) -> list[str]:
    """The thresholds that were reached at their steps, as "truncation.warn", each once; of those whose files are there."""
    whole = [read_state(path)["state"] for path in checkpoints(folder) if damage(path) is None]
    return sorted({alarm for state in whole for alarm in state.get("alarms", [])})


def delete_later(folder: Path, target: Path) -> None:
    """The checkpoints of later steps than ``target``'s. Collective over the world."""
    dist.barrier()  # no rank looks for one any more
    if dist.get_rank() == 0:
        _write_durably(folder / LATEST, str(number(target)))
        for path in checkpoints(folder):
            if number(path) > number(target):
                _delete(path)
    dist.barrier()


def restate(path: Path, state: dict[str, Any]) -> None:
    """Another ``state`` beside the same weights; a crash leaves the old or the new one. Collective over the world.

    Raises SaveFailed.
    """
    _together(lambda: _replace_state(path, {**read_state(path), "state": state}) if dist.get_rank() == 0 else None)


def newest_verified(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest with the right content, or None; and a line for each newer one. Collective over the world, which shares out
    the reading."""
    skipped: list[str] = []
    for path in checkpoints(folder):
        reason = damage(path) or _wrong_content(path)
        if reason is None:
            return path, skipped
        skipped.append(f"checkpoint {path}: {reason}; left out")
    return None, skipped


def damage(path: Path) -> str | None:
    """What is missing or has another size, if anything."""
    try:
        listed = read_files(path)
    except OpdError as error:
        return str(error)
    for name, (size, _) in listed.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Raises OpdError."""
    try:
        content: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OpdError(f"checkpoint {path}: {STATE} cannot be read; delete this folder to use the checkpoint before") from error
    return content


def rollbacks_before(path: Path) -> int:
    """How often the run of a checkpoint went back before it. Raises OpdError."""
    return int(read_state(path)["state"].get("rollbacks", 0))


def read_files(path: Path) -> Files:
    """All but the state itself. Raises OpdError."""
    listed = read_state(path).get("files", {})
    if any(len(digest) != _DIGEST_LENGTH for _, digest, *_ in listed.values()):
        raise OpdError(
            f"checkpoint {path}: {STATE} has the digests of an earlier version; go on with that version, or delete this folder"
        )
    return {name: (size, digest) for name, (size, digest) in listed.items()}


@dataclass(frozen=True)
class RankWriter:
    """One rank's part of a checkpoint."""

    # In a process of its own, from memory as it was; returns the files that it wrote, and something for `complete`.
    write: Callable[[], tuple[list[Path], object]]
    complete: Callable[[object], None]  # when all ranks have written; may be collective


class CheckpointWrite:
    """A checkpoint on its way to the disk: written by a process on each rank beside the training, then shown by one rename.

    Every method is collective over the world, and raises SaveFailed on all ranks where it failed on one.
    """

    def __init__(self, target: Path, prepare: Callable[[Path], RankWriter], content: dict[str, Any], keep: int) -> None:
        """``prepare`` gets the folder to fill. The state is free to change as soon as this returns.

        Args:
            content: of ``state.json``, which the list of files completes.
            keep: checkpoints that are left when this one is there; the oldest go first. The newest healthy one stays too.
        """
        self.target, self.content, self.keep = target, content, keep
        self.partial = target.with_name(f".{target.name}.partial")
        self._first = dist.get_rank() == 0
        self._process: ForkProcess | None = None
        with self._cleaned_up():
            _together(lambda: _make_room(self.partial) if self._first else None)
            _together(lambda: self._start(prepare))

    def _start(self, prepare: Callable[[Path], RankWriter]) -> None:
        self._writer = prepare(self.partial)
        fork = multiprocessing.get_context("fork")
        self._results, results = fork.Pipe(duplex=False)
        process = fork.Process(target=_write_and_list, args=(self._writer.write, self.partial, self._results, results))
        process.start()
        self._process = process
        results.close()

    def written(self) -> bool:
        """Whether the processes of all ranks have ended; :meth:`finish` does not wait then."""
        ended: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ended, self._results.poll() or not self._alive())
        return all(ended)

    def finish(self) -> Path:
        """Wait for the processes, show the checkpoint, delete old ones; returns its folder."""
        with self._cleaned_up():
            parts = _together(self._collect)
            files = {name: entry for part in parts for name, entry in part.items()}
            _together(lambda: self._check_there(files) if self._first else None)
            _together(self._complete)
            _together(lambda: self._commit(files) if self._first else None)
        if self._first:
            # Those of later steps are of a run before, which resumed from an earlier one: they are damaged, or left behind.
            older = [path for path in checkpoints(self.target.parent) if number(path) < number(self.target)]
            kept = older[: self.keep - 1]
            if not any(_is_healthy(path) for path in (self.target, *kept)):  # something to go back to
                kept += [path for path in older if _is_healthy(path)][:1]
            for path in older:
                if path not in kept:
                    _delete(path)
        dist.barrier()
        return self.target

    def abandon(self) -> None:
        """End this rank's process; not collective. What was written stays in a folder that no run reads."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def _collect(self) -> Files:
        try:
            files, self._result, failure = self._results.recv()
        except EOFError:
            failure = "the writing process was killed"
        if self._process is not None:
            self._process.join()
        if failure:
            raise OSError(failure)
        return cast(Files, files)

    def _check_there(self, files: Files) -> None:
        """Before Megatron's part, in which a folder that is gone would leave the other ranks waiting."""
        for name in files:
            if not (self.partial / name).is_file():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.partial / name))

    def _complete(self) -> None:
        if self._first:
            (self.partial.parent / _BALLAST).unlink(missing_ok=True)
        self._writer.complete(self._result)

    def _commit(self, files: Files) -> None:
        """By the first rank: what the writing processes did not write is small."""
        rest = [path for path in _files(self.partial) if str(path.relative_to(self.partial)) not in files]
        listed = {**files, **list_files(rest, self.partial, to_disk=True)}
        _write_durably(self.partial / STATE, _state_text({**self.content, "files": dict(sorted(listed.items()))}))
        if self.target.exists():  # the same step of an earlier, resumed run
            shutil.rmtree(self.target)
        self.partial.rename(self.target)
        latest = self.target.parent / LATEST
        partial = latest.with_name(f".{LATEST}.partial")
        _write_durably(partial, str(number(self.target)))
        partial.rename(latest)
        _sync_folder(self.target.parent)

    @contextmanager
    def _cleaned_up(self) -> Iterator[None]:
        try:
            yield
        except SaveFailed:
            self.abandon()
            dist.barrier()  # no process writes any more
            if self._first:
                shutil.rmtree(self.partial, ignore_errors=True)
                with suppress(OSError):
                    (self.partial.parent / _BALLAST).unlink()
            dist.barrier()  # no rank goes on before nothing is left
            raise


def _is_healthy(path: Path) -> bool:
    return damage(path) is None and bool(read_state(path)["state"].get("healthy", True))


def _delete(path: Path) -> None:
    with suppress(OSError):
        (path / STATE).unlink()  # first: half a checkpoint is then none
        shutil.rmtree(path)


def _replace_state(path: Path, content: dict[str, Any]) -> None:
    partial = path / f".{STATE}.partial"
    _write_durably(partial, _state_text(content))
    partial.rename(path / STATE)
    _sync_folder(path)


def _state_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _write_and_list(
    write: Callable[[], tuple[list[Path], object]], folder: Path, reading: Connection, results: Connection
) -> None:
    """In the writing process: sends the files' sizes and digests, or what went wrong."""
    reading.close()  # the trainer's end: without it there, sending fails instead of waiting
    end_with_parent()
    gc.disable()  # collecting what the trainer owns would reach for its GPU
    try:
        files, result = write()
        results.send((list_files(files, folder, to_disk=True), result, None))
    except Exception as error:
        results.send(({}, None, root_cause(error)))


def _together(action: Callable[[], Result]) -> list[Result]:
    """The results of all ranks. Raises SaveFailed on all of them where it failed on one."""
    result: Result | None = None
    failure = None
    try:
        result = action()
    except (Exception, CheckpointException) as error:  # Megatron and torch raise many kinds where a file cannot be written
        failure = root_cause(error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, failure))
    failures = [failure for _, failure in outcomes if failure is not None]
    if failures:
        raise SaveFailed(next(filter(None, failures), "without a reason"))
    return [result for result, _ in outcomes]


def root_cause(error: BaseException) -> str:
    """One line; empty where the reason is known to another rank only."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, CheckpointException):
        return next((root_cause(each) for each, _ in error.failures.values()), "")
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    if "inline_container" in str(error):  # torch's archive writer, whose words hide the system's reason
        return f"a file could not be written whole: no space left, a quota, or a limit on its size ({_line(error)})"
    return _line(error) or type(error).__name__


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _make_room(folder: Path) -> None:
    """An empty folder, the remains of killed runs beside it gone, and room in it for the small files.

    Megatron writes those on the first rank between collectives, where a full disk would leave the other ranks waiting.
    """
    for remains in folder.parent.glob(".iter_*.partial"):
        shutil.rmtree(remains)
    folder.mkdir(parents=True)
    with (folder.parent / _BALLAST).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, _BALLAST_BYTES)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STATE)


def list_files(files: Iterable[Path], folder: Path, *, to_disk: bool) -> Files:
    """``to_disk``: wait until their content is there."""
    listed, block = {}, memoryview(bytearray(_BLOCK))
    for file in files:
        digest = blake3()
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(block):
                digest.update(block[:count])
            if to_disk:
                os.fsync(stream.fileno())
        listed[str(file.relative_to(folder))] = (file.stat().st_size, digest.hexdigest())
    return listed


def _write_durably(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _wrong_content(path: Path) -> str | None:
    """The first file whose digest is another one. Collective over the world, equal on all ranks."""
    expected = read_files(path)
    share = _files(path)[dist.get_rank() :: dist.get_world_size()]
    try:
        parts = _together(lambda: list_files(share, path, to_disk=False))
    except SaveFailed as error:
        return f"cannot be read ({error})"
    found = {name: entry for part in parts for name, entry in part.items()}
    changed = (name for name, entry in expected.items() if name not in found or found[name] != entry)
    return next((f"the content of {name} has changed" for name in changed), None)
