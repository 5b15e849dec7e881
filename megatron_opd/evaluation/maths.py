"""Equality of two mathematical expressions, judged by math-verify where neither a hang nor a crash of it can do harm."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from megatron_opd.processes import end_with_parent

# ok: compared. unparsable: one side is no answer, or none that can be read. timeout, crash: of the process that compared.
Outcome = Literal["ok", "unparsable", "timeout", "crash"]

_WORKER = Path(__file__).with_name("maths_worker.py")
_START_SECONDS = 120.0  # in which it imports sympy, on a busy machine too
_MOST_KNOWN = 100_000


class MathsProcess:
    """A long-lived process that compares; killed where it exceeds a limit, and started again when it is needed.

    Args:
        seconds: for one pair.
        memory: bytes that it may have.
    """

    def __init__(self, seconds: float = 5.0, memory: int = 2 << 30) -> None:
        self._seconds, self._memory = seconds, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[tuple[str, str, float | None], tuple[bool, Outcome]] = {}

    def compare(self, expected: str, given: str, tolerance: float | None = None) -> tuple[bool, Outcome]:
        """Whether both are equal, or numbers at most ``tolerance`` apart. Anything but "ok" counts as different.

        A pair is looked at once: a thousand samples with the same hanging answer cost one time limit.
        """
        key = (expected, given, tolerance)
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._ask(json.dumps(key).encode() + b"\n")
        return self._known[key]

    def close(self) -> None:
        """The next comparison starts it again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
            self._process = None

    def _ask(self, request: bytes) -> tuple[bool, Outcome]:
        if self._process is not None and self._process.poll() is not None:  # it ended between two requests
            self.close()
        if self._process is None:
            self._process = self._start()
            _, outcome = self._reply(self._process, _START_SECONDS)
            if outcome != "ok":
                return False, outcome
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), request)  # shorter than a pipe's buffer: never waits
        except OSError:
            self.close()
            return False, "crash"
        return self._reply(self._process, self._seconds)

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(self._memory)],  # -P: its folder is no place to import from
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )

    def _reply(self, process: subprocess.Popen[bytes], seconds: float) -> tuple[bool, Outcome]:
        assert process.stdout is not None
        pipe, line, deadline = process.stdout.fileno(), b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(pipe, 4096) if ready else b""
            if not part:
                self.close()
                return False, "crash" if ready else "timeout"
            line += part
        equal, outcome = json.loads(line)
        return bool(equal), outcome
