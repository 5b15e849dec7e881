"""The early warning: truncation and repetition that rise together, against the noise of the run's own beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_opd.monitoring.repetition import Flags
from megatron_opd.types import Rollout


class EarlyWarning:
    """To be written."""

    def update(self, rollouts: Sequence[Rollout], repeated: Sequence[Flags]) -> float | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
