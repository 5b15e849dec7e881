"""Requests for whole responses: one that a server broke off is continued from its tokens."""

from __future__ import annotations

from typing import Any

from megatron_opd.sglang.client import Endpoint, Generated, continuation, parse_part
from megatron_opd.sglang.dispatch import Ask


def whole_response(body: dict[str, Any], expected: float) -> Ask[Generated]:
    """``body``: of ``/generate``; ``expected``: tokens."""
    return _ask(body, expected, None)


def _ask(body: dict[str, Any], expected: float, written: Generated | None) -> Ask[Generated]:
    """``body`` asks for the whole response, of which ``written`` is there."""

    def parse(content: dict[str, Any], endpoint: Endpoint) -> Generated:
        part = parse_part(content, endpoint)
        return part if written is None else written.then(part)

    def rest(answer: Generated) -> Ask[Generated] | None:
        missing = body["sampling_params"]["max_new_tokens"] - answer.tokens
        return _ask(body, expected, answer) if answer.finish == "abort" and missing > 0 else None

    return Ask(body if written is None else continuation(body, written), expected, parse, rest)
