"""Conversions that are killed, and the same command after that: the bytes are those of a run without a kill."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.conversion.digests import Digesting
from megatron_opd.conversion.target import Partial
from megatron_opd.conversion.weights import HFWeights
from tests.conversion.folders import convert, edit_config, make

COMMANDS = ("to-megatron", "to-hf")
SMALL = ("--shard-gb", 3e-5)  # several files
FINISHED = 2  # files, before the kill


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, and without a kill ``megatron`` made of it, and ``hf`` made of that."""
    folder = tmp_path_factory.mktemp("good")
    make(folder / "model")
    assert convert("to-megatron", folder / "model", folder / "megatron", *SMALL, "--processes", 1) == 0
    assert convert("to-hf", folder / "megatron", folder / "hf", *SMALL, "--processes", 3) == 0
    return folder


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Also where the shell that started this in the background has it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def arguments(good: Path, command: str, out: Path) -> list[object]:
    return [command, good / ("model" if command == "to-megatron" else "megatron"), out, *SMALL, "--processes", 2]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uninterrupted(good: Path, command: str) -> dict[str, bytes]:
    return content(good / ("megatron" if command == "to-megatron" else "hf"))


def after_files(monkeypatch: pytest.MonkeyPatch, count: int, action: Callable[[], object]) -> None:
    """Do it when that many files are finished and in the journal."""
    record, seen = Partial._record, []

    def recorded(self: Partial, name: str, written: Any) -> None:
        record(self, name, written)
        seen.append(name)
        if len(seen) == count:
            action()

    monkeypatch.setattr(Partial, "_record", recorded)


def killed(good: Path, command: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run it in a process that kills itself in the middle, and wait until its workers have ended too."""
    with monkeypatch.context() as patch:
        after_files(patch, FINISHED, lambda: os.kill(os.getpid(), signal.SIGKILL))
        child = os.fork()
        if child == 0:
            os._exit(convert(*arguments(good, command, out)))
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    with (out.with_name(f".{out.name}.partial") / "journal.jsonl").open("rb") as journal:
        for _ in range(100):
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.05)
    raise AssertionError("a process of the killed conversion is still there")


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_just_before_it_is_whole_it_reads_no_weights_again(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with monkeypatch.context() as patch:
        patch.setattr(Partial, "write_manifest", lambda _: signal.raise_signal(signal.SIGINT))
        assert convert(*arguments(good, command, out)) == 130
    kept = finished_files(partial)
    assert convert(*arguments(good, command, out)) == 0
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert content(out) == uninterrupted(good, command)


def finished_files(partial: Path) -> dict[str, int]:
    """Inode by name, as the journal lists them."""
    lines = (partial / "journal.jsonl").read_text().splitlines()[1:]
    return {name: (partial / "files" / name).stat().st_ino for name in (json.loads(line)["name"] for line in lines)}


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_bytes(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    killed(good, command, out, monkeypatch)
    assert not out.exists()
    kept = finished_files(partial)
    assert len(kept) == FINISHED
    capsys.readouterr()
    assert convert(*arguments(good, command, out)) == 0
    assert f"convert: {partial}: resumed; {FINISHED} files are finished" in capsys.readouterr().err
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert content(out) == uninterrupted(good, command)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_worker_that_is_killed_ends_the_conversion_with_one_line(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    out, here = tmp_path / "out", os.getpid()
    write = Digesting.write

    def fatal(self: Any, data: Any) -> int:
        if os.getpid() != here and self.tell() > 20_000:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Digesting, "write", fatal)
        capsys.readouterr()
        assert convert(*arguments(good, command, out)) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("convert: "))
    assert line.startswith(f"convert: {out}: a worker process was killed") and "the same command goes on from here" in line
    assert not out.exists()
    assert convert(*arguments(good, command, out)) == 0
    assert content(out) == uninterrupted(good, command)


def test_interrupt_and_lack_of_memory_keep_what_is_finished(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with monkeypatch.context() as patch:
        after_files(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert convert(*arguments(good, "to-megatron", out)) == 130
    assert len(finished_files(partial)) == 1

    def too_large(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(HFWeights, "read", too_large)
        capsys.readouterr()
        assert convert(*arguments(good, "to-megatron", out)) == 2
    assert "out of memory; take fewer --processes" in capsys.readouterr().err.splitlines()[-1]
    assert len(finished_files(partial)) == 1 and not out.exists()
    assert convert(*arguments(good, "to-megatron", out)) == 0
    assert content(out) == uninterrupted(good, "to-megatron")


def cut_off(partial: Path) -> None:
    with (partial / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"name": "release/__4')


def lengthen(partial: Path) -> None:
    with (partial / "files" / next(iter(finished_files(partial)))).open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(("damage", "kept"), [(cut_off, FINISHED), (lengthen, FINISHED - 1)])
def test_what_the_kill_damaged_is_made_again(
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    kept: int,
) -> None:
    out = tmp_path / "out"
    killed(good, "to-megatron", out, monkeypatch)
    damage(tmp_path / ".out.partial")
    assert convert(*arguments(good, "to-megatron", out)) == 0
    assert f"{kept} files are finished" in capsys.readouterr().err
    assert content(out) == uninterrupted(good, "to-megatron")


@pytest.mark.parametrize("what", ["source", "options"])
def test_remains_of_another_conversion_are_thrown_away(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    shutil.copytree(good / "model", tmp_path / "model")
    out = tmp_path / "out"
    killed(tmp_path, "to-megatron", out, monkeypatch)
    options: list[object] = []
    if what == "source":
        edit_config(tmp_path / "model", a_key_of_nobody=1)
    else:
        options = ["--tp", 2]
    assert convert(*arguments(tmp_path, "to-megatron", out), *options) == 0
    assert "not of this source with these options and versions; thrown away" in capsys.readouterr().err
    assert convert("verify", tmp_path / "model", out) == 0


def test_two_conversions_to_one_target_do_not_meet(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, codes = tmp_path / "out", []
    after_files(monkeypatch, 1, lambda: codes.append(convert(*arguments(good, "to-megatron", out))))
    assert convert(*arguments(good, "to-megatron", out)) == 0
    assert codes == [2]
    assert f"convert: {out}: another conversion is writing it" in capsys.readouterr().err
    assert content(out) == uninterrupted(good, "to-megatron")


def test_source_that_changes_while_it_is_read_is_refused(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(good / "model", tmp_path / "model")
    after_files(monkeypatch, 1, lambda: edit_config(tmp_path / "model", a_key_of_nobody=1))
    assert convert(*arguments(tmp_path, "to-megatron", tmp_path / "out")) == 2
    assert f"convert: {tmp_path / 'model'}: has changed while it was read" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bit_flipped_source_or_result_is_noticed(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("megatron", "hf"):
        shutil.copytree(good / name, tmp_path / name)
    for file in (tmp_path / "megatron" / "release" / "__1_0.distcp", sorted((tmp_path / "hf").glob("*.safetensors"))[1]):
        original = file.read_bytes()
        flipped = bytearray(original)
        flipped[len(flipped) // 2] ^= 1
        file.write_bytes(flipped)
        capsys.readouterr()
        assert convert("verify", tmp_path / "megatron", tmp_path / "hf") == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{file}: has changed since it was written"
        assert any("values differ" in line for line in lines[1:])
        file.write_bytes(original)
    assert convert("verify", tmp_path / "megatron", tmp_path / "hf") == 0
