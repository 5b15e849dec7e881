"""How the responses of one rollout come in: a line now and then, and figures in the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence


class Progress:
    """Called with each response that is complete."""

    def __init__(self, expected: Sequence[float | None], seconds: float = 10.0) -> None:
        """``expected``: tokens of each response, None where nothing is known of it; ``seconds`` between lines."""
        self._open = dict(enumerate(expected))
        self._total, self._seconds = len(expected), seconds
        self._start = self._last = time.monotonic()
        self._completed: list[float] = []  # seconds after the start
        self._tokens = self._longest = 0

    def __call__(self, place: int, tokens: int) -> None:
        """Response number ``place`` is there, with so many tokens."""
        now = time.monotonic()
        del self._open[place]
        self._completed.append(now - self._start)
        self._tokens += tokens
        self._longest = max(self._longest, tokens)
        if now - self._last >= self._seconds and self._open:
            self._last = now
            print(self._line(), file=sys.stderr)

    def _line(self) -> str:
        done, elapsed = len(self._completed), self._completed[-1]
        mean, rate = self._tokens / done, self._tokens / elapsed
        # Nothing is known of a new prompt but how long the others' responses are.
        left = sum(mean if expected is None else expected for expected in self._open.values()) / rate if rate else math.inf
        return (
            f"rollout: {done} of {self._total} responses, {rate:.0f} tokens/s, length {mean:.0f} on average and "
            f"{self._longest} at most so far, about {left:.0f} s left"
        )

    def figures(self) -> dict[str, float | None]:
        """Of the whole rollout: tokens a second, and the seconds in which only the last tenth of the responses was missing."""
        if not self._completed:
            return {"rollout/tokens_per_second": None, "rollout/tail_seconds": None}
        seconds = self._completed[-1]
        most = self._completed[math.ceil(0.9 * len(self._completed)) - 1]
        return {"rollout/tokens_per_second": self._tokens / seconds, "rollout/tail_seconds": seconds - most}
