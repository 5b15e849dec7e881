"""Bytes done, rate and time left, on one line."""

from __future__ import annotations

import time
from typing import TextIO


class Progress:
    """One line, written again on a terminal every second, elsewhere anew twice a minute; the last when all is done."""

    def __init__(self, what: str, total: int, stream: TextIO) -> None:
        self._what, self._total, self._stream = what, total, stream
        self._terminal = stream.isatty()
        self._done = 0
        self._start = self._shown = time.monotonic()

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        finished = self._done >= self._total
        if finished or now - self._shown >= (1.0 if self._terminal else 30.0):
            self._shown = now
            rate = self._done / max(now - self._start, 1e-6)
            left = f"{(self._total - self._done) / max(rate, 1.0):.0f} s left"
            line = f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, {left}"
            start, end = ("\r\x1b[K", "") if self._terminal else ("", "\n")
            print(start + line, end="\n" if finished else end, file=self._stream, flush=True)
