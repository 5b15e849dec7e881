"""Text written by the embedded engine, against transformers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from megatron_opd.data import load_tokenizer
from megatron_opd.rollout import EmbeddedEngine
from megatron_opd.types import OpdError, Rollout, RolloutRequest, Source
from tests.rollout.requests import prompt, requests, sampling
from tests.tiny_models import Arch, make_model

CPU = torch.device("cpu")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def engine(folder: Path, *, batch: int = 8, dtype: torch.dtype = torch.float32) -> EmbeddedEngine:
    tokenizer = load_tokenizer(folder)
    return EmbeddedEngine(folder, tokenizer, dtype=dtype, device=CPU, max_batch_size=batch, load=True, group=None)


def teacher_forced(model: PreTrainedModel, rollout: Rollout, temperature: float) -> torch.Tensor:
    """[R] nats: one dense forward pass over prompt and response, nothing cached or batched."""
    ids = torch.tensor([rollout.prompt.token_ids + rollout.response_ids])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(input_ids=ids).logits[0].double() / temperature, -1)
    start = len(rollout.prompt.token_ids) - 1
    return log_probs[start:-1].gather(-1, ids[0, start + 1 :, None])[:, 0].float()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, make_model(folder)


@pytest.mark.parametrize(
    ("arch", "tied", "kv_heads", "scaled"),
    [
        ("llama", False, 2, False),
        ("llama", True, 4, True),
        ("qwen2", True, 1, False),
        ("qwen3", False, 2, False),
        ("deepseek_v3", False, 4, False),
    ],
)
def test_log_probs_equal_a_dense_forward_pass(tmp_path: Path, arch: Arch, tied: bool, kv_heads: int, scaled: bool) -> None:
    model = make_model(tmp_path, arch, tied=tied, kv_heads=kv_heads, rope_scaling=LLAMA3_ROPE if scaled else None)
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.8)):
        rollouts = engine(tmp_path, batch=5).generate(
            requests(13), sampling(30, temperature=temperature, top_p=top_p, stop_ids=(7, 20, 33, 60))
        )
        assert len({len(rollout.response_ids) for rollout in rollouts}) > 3  # rows left and were refilled at different times
        for rollout in rollouts:
            expected = teacher_forced(model, rollout, temperature)
            torch.testing.assert_close(torch.tensor(rollout.log_probs), expected, atol=1e-4, rtol=0)


def test_ids_beyond_the_shared_vocabulary_do_not_exist(llama: tuple[Path, PreTrainedModel]) -> None:
    """A model may have more rows than its tokenizer has ids: they are never sampled and take no probability."""
    folder, model = llama
    params = replace(sampling(30, temperature=1.5), vocab_size=40)
    within = [[5 + i % 30 for i in range(1 + n)] for n in range(8)]
    plan = [RolloutRequest(prompt(str(n), ids), Source.STUDENT, 0, n) for n, ids in enumerate(within)]
    rollouts = engine(folder, batch=5).generate(plan, params)
    assert max(token for rollout in rollouts for token in rollout.response_ids) in range(30, 40)
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt.token_ids + rollout.response_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1, :40]  # [R, 40]
        expected = (logits / 1.5).log_softmax(-1).gather(1, torch.tensor(rollout.response_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(rollout.log_probs), expected, atol=1e-4, rtol=0)


def test_rollouts_do_not_depend_on_the_batch(llama: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = llama
    plan, params = requests(11), sampling(20, stop_ids=(7, 20, 33))
    alone = engine(folder, batch=1).generate(plan, params)
    for batch in (2, 3, 64):
        batched = engine(folder, batch=batch).generate(plan, params)
        assert [rollout.response_ids for rollout in batched] == [rollout.response_ids for rollout in alone]
        for one, other in zip(alone, batched, strict=True):
            assert one.prompt is other.prompt
            torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-4, rtol=0)
    backwards = engine(folder, batch=3).generate(plan[::-1], params)
    assert [rollout.response_ids for rollout in backwards[::-1]] == [rollout.response_ids for rollout in alone]


def test_seeds_reproduce_and_differ(llama: tuple[Path, PreTrainedModel]) -> None:
    writer = engine(llama[0])
    first, again = writer.generate(requests(8), sampling()), writer.generate(requests(8), sampling())
    assert first == again
    other = writer.generate(requests(8, first_seed=900), sampling())
    assert all(a.response_ids != b.response_ids for a, b in zip(first, other, strict=True))
    same_prompt = [rollout.response_ids for rollout in first[:2]]
    assert same_prompt[0] != same_prompt[1]


def test_low_temperature_equals_greedy_generate(llama: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = llama
    model: Any = llama[1]
    for rollout in engine(folder, batch=3).generate(requests(7), sampling(24, temperature=1e-4)):
        ids = torch.tensor([rollout.prompt.token_ids])
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert rollout.response_ids == tuple(greedy[0, ids.shape[1] :].tolist())


def test_first_tokens_follow_the_models_distribution(llama: tuple[Path, PreTrainedModel]) -> None:
    folder, model = llama
    ids = (9, 31, 8)
    plan = [RolloutRequest(prompt("p", ids), Source.STUDENT, i, i) for i in range(4000)]
    for temperature, top_p in ((1.0, 1.0), (1.5, 1.0), (1.0, 0.6)):
        rollouts = engine(folder, batch=4000).generate(plan, sampling(1, temperature=temperature, top_p=top_p))
        counts = Counter(rollout.response_ids[0] for rollout in rollouts)
        with torch.no_grad():
            probs = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature, -1)
        ranked, order = probs.sort(descending=True)
        nucleus = int((ranked.cumsum(-1) < top_p).sum()) + 1
        kept = order[:nucleus].tolist() if top_p < 1 else order.tolist()
        assert set(counts) <= set(kept)
        total = float(probs[kept].sum())
        for token in kept[:10]:
            share = float(probs[token]) / total
            assert abs(counts[token] / 4000 - share) < 5 * (share * (1 - share) / 4000) ** 0.5 + 1e-9


def test_a_stop_id_ends_the_response_and_belongs_to_it(llama: tuple[Path, PreTrainedModel]) -> None:
    writer = engine(llama[0], batch=4)
    free = writer.generate(requests(12), sampling(20))
    stops = (free[0].response_ids[4], free[3].response_ids[1])
    stopped = writer.generate(requests(12), sampling(20, stop_ids=stops))
    for long, short in zip(free, stopped, strict=True):
        ends = [place for place, token in enumerate(long.response_ids) if token in stops]
        length = ends[0] + 1 if ends else 20
        assert short.response_ids == long.response_ids[:length]
        assert short.finish_reason == ("stop" if ends else "length")
        visible = short.response_ids[:-1] if ends else short.response_ids
        assert short.text.split() == [
            f"w{token}" if token > 4 else ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")[token] for token in visible
        ]
    assert {rollout.finish_reason for rollout in stopped} == {"stop", "length"}


def test_a_stop_id_at_the_last_allowed_token_counts_as_stop(llama: tuple[Path, PreTrainedModel]) -> None:
    writer = engine(llama[0])
    (free,) = writer.generate(requests(1), sampling(1))
    (stopped,) = writer.generate(requests(1), sampling(1, stop_ids=free.response_ids))
    assert (free.finish_reason, stopped.finish_reason) == ("length", "stop")
    assert stopped.response_ids == free.response_ids and stopped.text == ""


def test_responses_end_at_the_models_context(tmp_path: Path) -> None:
    make_model(tmp_path, max_positions=20)
    lengths = [
        len(r.prompt.token_ids) + len(r.response_ids) for r in engine(tmp_path, batch=2).generate(requests(9), sampling(15))
    ]
    assert [min(20, len(r.prompt.token_ids) + 15) for r in requests(9)] == lengths
    with pytest.raises(OpdError, match=r"prompt long: 20 tokens, but .* takes 1 to 19"):
        engine(tmp_path).generate([RolloutRequest(prompt("long", [5] * 20), Source.STUDENT, 0, 0)], sampling())
    with pytest.raises(OpdError, match="prompt empty: 0 tokens"):
        engine(tmp_path).generate([RolloutRequest(prompt("empty", []), Source.STUDENT, 0, 0)], sampling())


def test_nothing_asked_nothing_written(llama: tuple[Path, PreTrainedModel]) -> None:
    assert engine(llama[0]).generate([], sampling()) == []


def test_bf16_log_probs_are_near_fp32(llama: tuple[Path, PreTrainedModel]) -> None:
    folder, model = llama
    gaps = [
        torch.tensor(rollout.log_probs) - teacher_forced(model, rollout, 1.0)
        for rollout in engine(folder, batch=5, dtype=torch.bfloat16).generate(requests(11), sampling(16))
    ]
    assert 1e-4 < torch.cat(gaps).abs().mean() < 0.1  # not fp32, and not broken


def test_generating_leaves_torchs_random_state_alone(llama: tuple[Path, PreTrainedModel]) -> None:
    before = torch.get_rng_state()
    tokenizer = load_tokenizer(llama[0])
    EmbeddedEngine(llama[0], tokenizer, dtype=torch.float32, device=CPU, max_batch_size=2, load=False, group=None)
    engine(llama[0]).generate(requests(3), sampling())
    assert torch.equal(before, torch.get_rng_state())


def test_non_finite_logits_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(OpdError, match="not finite"):
        engine(tmp_path).generate(requests(3), sampling())
