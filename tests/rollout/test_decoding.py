"""What continuous batching saves, counted in forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megatron_opd.rollout.attention import GROUPED_SDPA
from megatron_opd.rollout.decoding import Job, decode
from tests.rollout.requests import sampling
from tests.tiny_models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = make_model(tmp_path_factory.mktemp("model"))
    model.set_attn_implementation(GROUPED_SDPA)
    return model


def _decode(model: Any, jobs: list[Job], batch: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Lengths written, and (batch, tokens) of each forward pass through the layers."""
    shapes: list[tuple[int, int]] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        batch, tokens, _ = output.shape
        shapes.append((batch, tokens))

    handle = model.model.embed_tokens.register_forward_hook(record)
    try:
        written = decode(model, jobs, sampling(), batch)
    finally:
        handle.remove()
    return [len(response.token_ids) for response in written], shapes


def test_finished_sequences_leave_the_batch(model: Any) -> None:
    jobs = [Job((5 + i, 6), seed=i, max_new_tokens=length) for i, length in enumerate((2, 9, 4, 4))]
    lengths, shapes = _decode(model, jobs, batch=4)
    assert lengths == [2, 9, 4, 4]
    assert shapes == [(4, 1), *[(4, 1)] * 2, *[(3, 1)] * 2, *[(1, 1)] * 5]  # the prefill, then one step a token


def test_free_slots_are_refilled_from_the_queue(model: Any) -> None:
    budgets = [40] + [4] * 27
    jobs = [Job((5 + i, 6, 7), seed=i, max_new_tokens=length) for i, length in enumerate(budgets)]
    lengths, shapes = _decode(model, jobs, batch=4)
    assert lengths == budgets
    steps = [batch for batch, tokens in shapes if tokens == 1]
    assert len(steps) == 40  # 9 rounds of three short responses beside the long one; batches of four would need 40 + 6 * 4
    assert sum(steps) == sum(budgets)  # no step computes a row that has ended


def test_a_prompt_with_several_samples_is_prefilled_once(model: Any) -> None:
    jobs = [Job((5, 6, 7, 8 + i // 4), seed=i, max_new_tokens=3) for i in range(8)]
    _, shapes = _decode(model, jobs, batch=8)
    assert shapes[0] == (2, 3)
    assert len({response.token_ids for response in decode(model, jobs, sampling(), 8)}) == 8


def test_prompts_of_one_token_need_no_prefill(model: Any) -> None:
    _, shapes = _decode(model, [Job((5,), 0, 3), Job((6,), 1, 2)], batch=2)
    assert shapes == [(2, 1), (2, 1), (1, 1)]


def test_cache_grows_past_the_first_prompts(model: Any) -> None:
    jobs = [Job((9,), 0, 3), Job(tuple(range(5, 65)), 1, 40), Job((5, 6), 2, 60)]
    together = decode(model, jobs, sampling(), 2)
    for job, response in zip(jobs, together, strict=True):
        (alone,) = decode(model, [job], sampling(), 1)
        assert alone.token_ids == response.token_ids
        torch.testing.assert_close(torch.tensor(alone.log_probs), torch.tensor(response.log_probs), atol=1e-4, rtol=0)
