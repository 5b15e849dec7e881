"""Keys of servers stay where they belong: in no command line, no message, no file that others may read, at no proxy."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from megatron_opd.rollout.responses import whole_response
from megatron_opd.sglang.client import Client, Endpoint, generation, is_healthy
from megatron_opd.sglang.dispatch import dispatch
from megatron_opd.sglang.server import Server, ServerSpec
from megatron_opd.types import SamplingParams
from tests.rollout.faulty_server import FaultyServer


def test_endpoint_is_printed_without_its_key() -> None:
    assert "secret" not in repr(Endpoint("http://127.0.0.1:1", "secret"))


def test_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody
    with FaultyServer() as server:
        assert is_healthy(server.endpoint)
        assert Client(server.endpoint, 60.0).supports("/health")
        ask = whole_response(generation([1, 2], SamplingParams(1.0, 1.0, 3, ()), 3, seed=1), 3)
        _, lost = dispatch([ask], [server.endpoint], in_flight=1, timeout=60.0)
        assert not lost


def test_key_of_a_launched_server_is_for_its_owner_alone(tmp_path: Path) -> None:
    """A stand-in for the interpreter says what it was given, as SGLang logs its arguments."""
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\necho "$@"\nfor file; do :; done\ncat "$file"\nsleep 60\n')
    interpreter.chmod(0o700)
    log = tmp_path / "log" / "0-student.log"
    log.parent.mkdir()
    log.touch(0o644)
    spec = ServerSpec("student", str(interpreter), tmp_path, 1, "float32", "cpu", "127.0.0.1", 1, {}, log)
    server = Server(spec)
    try:
        key_file = log.with_suffix(".yaml")
        assert stat.S_IMODE(log.stat().st_mode) == stat.S_IMODE(key_file.stat().st_mode) == 0o600
        deadline = time.monotonic() + 30
        while server.api_key not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        command, _, given = log.read_text().partition("\n")
        assert server.api_key not in command and "--config" in command and given.startswith("api-key: ")
        assert server.api_key not in server.last_words() and "(key)" in server.last_words()
    finally:
        server.stop()
    assert not key_file.exists()
