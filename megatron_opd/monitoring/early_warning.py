"""The early warning: repetition and truncation that rise together, against the noise of the run itself. Ours.

The failure (StableOPD, arXiv 2604.08527) feeds itself: responses that loop run out of their budget, and loops that are visited
more weigh more. So two figures of the student's responses are followed: how many of a response's tokens are repeated, and
whether it ran out of its budget. Each step gives both a z-score against a baseline, with the spread of single responses as the
noise; a CUSUM sums what exceeds an allowance (Page, 1954). The statistic is the smaller of the two sums over the threshold:
longer responses that do not loop, and loops that end by themselves, leave one of them near 0.

The baseline is the run's first steps. It follows the run down, never up: what became shorter first has further to go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_opd.monitoring.repetition import Flags
from megatron_opd.types import Rollout

# Chosen on some runs, measured on others: docs/reproduction.md.
_BASELINE_STEPS = 5
_ALLOWANCE = 1.0  # standard errors a step that count as noise
_THRESHOLD = 10.0  # of the sums, standard errors
_LARGEST_STEP = 5.0  # standard errors: one odd step alone does not reach the threshold
_MEMORY = 20  # steps, of the mean that the baseline follows down


@dataclass
class _Cusum:
    """One figure of single responses: what it was, and by how much it has risen since."""

    responses: int = 0  # in the baseline
    mean: float = 0.0  # of the baseline
    squares: float = 0.0  # sum of squared deviations in the baseline
    recent: float = 0.0
    sum: float = 0.0

    def learn(self, values: NDArray[np.float64]) -> None:
        """Add a step to the baseline; [responses]."""
        both = self.responses + len(values)
        shift = float(values.mean()) - self.mean
        self.squares += float(((values - values.mean()) ** 2).sum()) + shift**2 * self.responses * len(values) / both
        self.mean = self.recent = self.mean + shift * len(values) / both
        self.responses = both

    def update(self, values: NDArray[np.float64], floor: float) -> None:
        """A step after the baseline; ``floor``: the least spread of single responses to reckon with."""
        mean = float(values.mean())
        spread = max(floor, math.sqrt(self.squares / self.responses))
        error = spread * math.sqrt(1 / len(values) + 1 / self.responses)
        self.sum = max(0.0, self.sum + min(_LARGEST_STEP, (mean - self.mean) / error) - _ALLOWANCE)
        self.recent += (mean - self.recent) / _MEMORY
        self.mean = min(self.mean, self.recent)


class EarlyWarning:
    """Call ``update`` once a step with the student's rollouts."""

    def __init__(self) -> None:
        self._steps = 0
        self._repeated, self._truncated = _Cusum(), _Cusum()

    def update(self, rollouts: Sequence[Rollout], repeated: Sequence[Flags]) -> float | None:
        """The statistic, 1 and more is a warning; None within the baseline and in steps without rollouts.

        ``repeated``: for each rollout [R], the tokens that end a repeated n-gram.
        """
        if not rollouts:
            return None
        loops = np.array([float(flags.sum()) for flags in repeated])  # [responses]
        cut = np.array([float(rollout.finish_reason == "length") for rollout in rollouts])  # [responses]
        self._steps += 1
        if self._steps <= _BASELINE_STEPS:
            self._repeated.learn(loops)
            self._truncated.learn(cut)
            return None
        self._repeated.update(loops, floor=1.0)
        # No truncated response among n tells of a share up to about 1 / n.
        self._truncated.update(cut, floor=math.sqrt(1 / self._truncated.responses))
        return min(self._repeated.sum, self._truncated.sum) / _THRESHOLD

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"steps": self._steps, "repeated": asdict(self._repeated), "truncated": asdict(self._truncated)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = int(state["steps"])
        self._repeated, self._truncated = _Cusum(**state["repeated"]), _Cusum(**state["truncated"])
