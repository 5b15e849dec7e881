"""What the user sees: a progress bar with the numbers that matter on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text

_PLAIN_LINES = 20  # about how many a run prints where there is no bar
_SPEED_WINDOW = 3600.0  # seconds of steps behind the time left; steps may take minutes

# metric name → (heading, format)
_SHOWN = {
    "loss": ("loss", ".4f"),
    "rollout/accuracy": ("accuracy", ".1%"),
    "rollout/length_mean": ("length", ".0f"),
    "rollout/truncation_rate": ("truncated", ".0%"),
    "mixture/student_share_of_weight": ("rollout weight", ".1%"),
    "mixture/gold_share_of_weight": ("gold weight", ".1%"),
    "loss/reference_kl": ("ref KL", ".4f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}


class TrainingConsole:
    """A context manager around the training loop; rank 0 alone makes one. Call ``update`` after each step."""

    def __init__(self, total_steps: int, start_step: int, stream: TextIO) -> None:
        self._total = total_steps
        self._start = start_step
        self._stream = stream
        self._line_every = max(1, (total_steps - start_step) // _PLAIN_LINES)
        self._started = time.monotonic()
        self._live: Live | None = None
        console = Console(file=stream)
        if stream.isatty() and not console.is_dumb_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, speed_estimate_period=_SPEED_WINDOW)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)
            self._numbers = Text(no_wrap=True, overflow="ellipsis")
            self._live = Live(Group(self._bar, self._numbers), console=console)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, steps_done: int, record: Mapping[str, float | int | None]) -> None:
        """``steps_done`` counts from the run's beginning; ``record`` is the step's, by the names of metrics.jsonl."""
        numbers = format_numbers(record)
        if self._live:
            self._bar.update(self._task, completed=steps_done)
            self._numbers.plain = numbers
        elif steps_done % self._line_every == 0 or steps_done in (self._start + 1, self._total):
            seconds = (time.monotonic() - self._started) / max(1, steps_done - self._start) * (self._total - steps_done)
            left = timedelta(seconds=round(seconds))
            self.message(f"step {steps_done}/{self._total}  {numbers}  time left {left}")

    def message(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


def format_numbers(record: Mapping[str, float | int | None]) -> str:
    """``loss 0.1234  accuracy 50.0%  ...``, without what this step has not measured."""
    parts = []
    for key, (heading, spec) in _SHOWN.items():
        value = record.get(key)
        if value is not None:
            parts.append(f"{heading} {value:{spec}}" if math.isfinite(value) else f"{heading} {value}")
    return "  ".join(parts)


def summary_table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """The rows as aligned lines under a title."""
    width = max((len(key) for key, _ in rows), default=0)
    return "\n".join([title, *(f"  {key:<{width}}  {value}" for key, value in rows)])
