"""A teacher's server in this process: it answers requests as SGLang does, by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_opd.sglang.client import Endpoint
from megatron_opd.sglang.dispatch import Ask

ENDPOINT = Endpoint("http://127.0.0.1:1")


class DenseServer:
    """In place of ``dispatch``; ``bodies`` are the requests so far."""

    def __init__(self, model: Any) -> None:
        self.model, self.bodies = model, list[dict[str, Any]]()

    def __call__(self, asks: Sequence[Ask[Any]], *_: Any, **__: Any) -> tuple[list[Any], dict[str, str]]:
        return [self._whole(ask) for ask in asks], {}

    def _whole(self, ask: Ask[Any]) -> Any:
        following: Ask[Any] | None = ask
        while following is not None:
            answer = following.parse({"meta_info": self._meta(following.body)}, ENDPOINT)
            following = following.rest(answer)
        return answer

    def _meta(self, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        tokens, start = body["input_ids"], body["logprob_start_len"]
        with torch.no_grad():
            log_q = self.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)

        def row(place: int, ids: Sequence[int]) -> list[list[Any]]:
            return [[float(log_q[place - 1, index]), index, None] for index in ids]

        scored = range(start + 1, len(tokens))
        return {
            "finish_reason": {"type": "length", "length": 0},
            "input_token_logprobs": [[None, tokens[start], None], *(row(i, tokens[i : i + 1])[0] for i in scored)],
            "input_token_ids_logprobs": [None, *(row(i, body["token_ids_logprob"]) for i in scored)],
        }
