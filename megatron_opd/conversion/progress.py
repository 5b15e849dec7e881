"""Bytes done, rate and time left, on one line."""

from __future__ import annotations

import time
from typing import TextIO


class Progress:
    """Writes to ``stream`` at most once in ``every`` seconds, and at the end."""

    def __init__(self, what: str, total: int, stream: TextIO, every: float = 2.0) -> None:
        self._what, self._total, self._stream, self._every = what, total, stream, every
        self._done = 0
        self._start = self._shown = time.monotonic()

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._shown >= self._every or self._done >= self._total:
            self._shown = now
            rate = self._done / max(now - self._start, 1e-6)
            left = (self._total - self._done) / rate
            end = "\n" if self._done >= self._total or not self._stream.isatty() else "\r"
            print(
                f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left",
                end=end,
                file=self._stream,
                flush=True,
            )
