"""Other ids at each position, from requests that hold one list of ids each: nothing is lost, nothing is mixed up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opd.sglang import windows
from megatron_opd.sglang.windows import cut, scoring_by_position
from tests.scoring.dense_server import DenseServer

VOCAB, K = 40, 4
PROMPT, TOKENS = 3, 30  # of the prompt, of the response
FIXED = (1, 7)


def model(ids: Tensor) -> Any:
    """Logits that are another function of each prefix."""
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(VOCAB, VOCAB, generator=generator)
    return SimpleNamespace(logits=table[ids].cumsum(1))


def response(seed: int = 0) -> tuple[list[int], Tensor]:
    """Token ids of prompt and response, and the ids [R, k] that each token of the response asks for."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCAB, (PROMPT + TOKENS,), generator=generator).tolist()
    support = torch.stack([torch.randperm(VOCAB, generator=generator)[:K] for _ in range(TOKENS)])
    support[::5, -1] = -1
    return tokens, support


@pytest.mark.parametrize("entries", [1, 30, 100, 10_000])
def test_windows_are_the_whole_response_and_bounded(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(windows, "_ENTRIES", entries)
    _, support = response()
    found = cut(support, len(FIXED))
    assert [window.start for window in found] == [0, *(window.end for window in found[:-1])]
    assert found[-1].end == TOKENS
    for window in found:
        own = support[window.start : window.end]
        assert window.ids == tuple(own[own >= 0].unique().tolist())
        length = window.end - window.start
        assert length == 1 or length * (len(window.ids) + len(FIXED)) <= entries
    assert len(found) == TOKENS if entries == 1 else len(found) < TOKENS
    assert (len(found) == 1) == (entries == 10_000)


def test_tokens_with_the_same_ids_share_one_window() -> None:
    assert len(cut(torch.arange(4).expand(400, 4), 1)) == 1
    assert cut(torch.zeros(0, 4, dtype=torch.int64), 1) == []


@pytest.mark.parametrize("entries", [1, 60, 10_000])
def test_each_token_gets_the_log_probabilities_of_its_own_ids(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(windows, "_ENTRIES", entries)
    tokens, support = response()
    found = cut(support, len(FIXED))
    server = DenseServer(model)
    (parts,), _ = server([scoring_by_position(tokens, PROMPT, FIXED, support, found)])
    answer = parts.whole()
    log_q = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)[PROMPT - 1 : -1]  # [R, V]
    assert parts.tokens == answer.tokens == TOKENS
    torch.testing.assert_close(answer.log_probs, log_q.gather(1, torch.tensor(tokens[PROMPT:])[:, None]).squeeze(1))
    torch.testing.assert_close(answer.given, log_q[:, list(FIXED)])
    asked = support >= 0
    assert torch.equal(answer.top_ids[asked], support[asked])
    torch.testing.assert_close(answer.top_log_probs[asked], log_q.gather(1, support.clamp(min=0))[asked])
    assert bool(answer.top_log_probs[~asked].isneginf().all())
    # One after the other, each up to its own end, with logits for its own tokens alone: the rest is in the server's cache.
    assert [len(body["input_ids"]) for body in server.bodies] == [PROMPT + window.end for window in found]
    assert [body["logprob_start_len"] for body in server.bodies] == [PROMPT + window.start - 1 for window in found]


def test_window_without_ids_of_its_own() -> None:
    """k = 1, and the merged stop class is the one."""
    tokens, _ = response()
    support = torch.full((TOKENS, 1), -1)
    (parts,), _ = DenseServer(model)([scoring_by_position(tokens, PROMPT, FIXED, support, cut(support, len(FIXED)))])
    answer = parts.whole()
    assert bool(answer.top_log_probs.isneginf().all())
    assert int(answer.top_ids.min()) == 0
