"""Which engines of one model are of use; lives on the first rank, shared by those who ask engines and those who fill them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from megatron_opd.sglang.client import Endpoint


class Roster:
    """Engines of the same model. One that fails is lost; it serves again once it has the current weights."""

    def __init__(self, model: str, endpoints: Sequence[Endpoint]) -> None:
        """``model``: whose weights they have, as messages name it."""
        self.model = model
        self._serving = list(endpoints)

    def serving(self) -> list[Endpoint]:
        """Those that take requests now."""
        return list(self._serving)

    def candidates(self) -> list[Endpoint]:
        """Those that the next weights are for: the serving ones, and those that have come back without weights."""
        return list(self._serving)

    def lose(self, endpoint: Endpoint, reason: str) -> None:
        """It takes no more requests and no more weights until it is back."""
        if endpoint in self._serving:
            self._serving.remove(endpoint)
            print(f"megatron-opd: SGLang server {endpoint.url} ({self.model}) is lost: {reason}", file=sys.stderr)

    def admit(self, endpoints: Iterable[Endpoint]) -> None:
        """They have the current weights and serve from now on."""
        self._serving += [endpoint for endpoint in endpoints if endpoint not in self._serving]
