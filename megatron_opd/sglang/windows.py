"""Log-probabilities of other ids at each position, from servers that take one list of ids for a whole request.

The scored tokens are cut into windows, and each window is a request of its own, up to its last token, for all ids that one of
its tokens asks for. They are asked one after the other: what precedes a window is then in the server's cache, so that it
computes each token once, however many windows there are. Servers that share a sequence's windows compute it once each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_opd.sglang.client import Endpoint
from megatron_opd.sglang.dispatch import Ask
from megatron_opd.sglang.scores import Scored, scoring

# Log-probabilities of one request. The longer a window, the fewer requests, but also the more ids of other tokens at each: here
# a request's entries take the server and us about as long as the request itself.
_ENTRIES = 2048


@dataclass(frozen=True)
class Window:
    """Scored tokens ``start`` to ``end``, not included, and the ids that any of them asks for, ascending."""

    start: int
    end: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """The answers so far, in the order of the windows."""

    parts: tuple[Scored, ...]

    @cached_property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    def whole(self) -> Scored:
        """As one answer."""
        parts = self.parts
        return Scored(
            parts[-1].server,
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.given for part in parts]),
            torch.cat([part.top_ids for part in parts]),
            torch.cat([part.top_log_probs for part in parts]),
        )


def cut(support: Tensor, fixed: int) -> list[Window]:
    """The windows of [R, k] int64 ids, -1 for none; each is as long as the entries of one request allow, at least one token.

    ``fixed``: ids that are asked for with every token besides.
    """
    windows: list[Window] = []
    start, ids = 0, set[int]()
    for place, row in enumerate(support.tolist()):
        own = {index for index in row if index >= 0}
        if place > start and (place + 1 - start) * (len(ids | own) + fixed) > _ENTRIES:
            windows.append(Window(start, place, tuple(sorted(ids))))
            start, ids = place, set()
        ids |= own
    if len(support):
        windows.append(Window(start, len(support), tuple(sorted(ids))))
    return windows


def scoring_by_position(
    token_ids: Sequence[int], first: int, ids: Sequence[int], support: Tensor, windows: Sequence[Window]
) -> Ask[Parts]:
    """Ask for the log-probabilities of ``token_ids[first:]``, of ``ids`` at each, and of each one's own ids, as ``top_ids``.

    ``support`` [R, k] int64, -1 for none, with its :func:`cut`; R is at least 1.
    """

    def ask(number: int, before: tuple[Scored, ...]) -> Ask[Parts]:
        window = windows[number]
        request = scoring(token_ids[: first + window.end], first + window.start, [*ids, *window.ids], 0)

        def parse(body: dict[str, Any], endpoint: Endpoint) -> Parts:
            answer = request.parse(body, endpoint)
            return Parts((*before, _gather(answer, len(ids), support[window.start : window.end], window)))

        def rest(answer: Parts) -> Ask[Parts] | None:
            return ask(number + 1, answer.parts) if number + 1 < len(windows) else None

        return Ask(request.body, len(token_ids), parse, rest)

    return ask(0, ())


def _gather(answer: Scored, fixed: int, support: Tensor, window: Window) -> Scored:
    """Of a window's answer what each token asked for; ``support`` [W, k] is the window's."""
    given, union = answer.given[:, :fixed], answer.given[:, fixed:]
    asked = support >= 0
    if window.ids:
        columns = torch.searchsorted(torch.tensor(window.ids), support.clamp(min=window.ids[0]))
        log_probs = union.gather(1, columns).where(asked, -torch.inf)
    else:
        log_probs = torch.full(support.shape, -torch.inf, dtype=union.dtype)
    return Scored(answer.server, answer.log_probs, given, support.clamp(min=0), log_probs)
