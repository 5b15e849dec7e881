"""What models write when they go wrong is handled and counted by every part of a step that reads it, and ends no run."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_opd.config import MonitorsConfig
from megatron_opd.data.packing import context_slice, pack, padding_share
from megatron_opd.evaluation.evaluate import correctness, rollout_figures
from megatron_opd.losses import distillation_loss
from megatron_opd.monitoring.lag import policy_lag
from megatron_opd.monitoring.metrics import JsonlSink
from megatron_opd.monitoring.monitors import Monitors
from megatron_opd.monitoring.samples import write_samples
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.roster import Roster
from megatron_opd.types import Aggregation, Objective, Prompt, Rollout, Source, StepStats
from megatron_opd.types import Tokenizer as TokenizerProtocol
from tests.mcore.training import Case, build_scorer, build_trainer, own_part, share
from tests.mcore.worlds import open_layout
from tests.rollout.faulty_server import FaultyServer
from tests.rollout.requests import requests, sampling
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

EOS = 256
VOCAB = 257
HIDDEN = 8
OBJECTIVE = Objective(
    opd="sampled",
    clip=0.2,
    beta=0.5,
    temperature=1.0,
    student_weight=1.0,
    teacher_weight=0.0,
    gold_weight=0.1,
    reference_kl=0.1,
)
# Pieces of answers that no verifier parses; several of them in a row.
GARBAGE = [
    *("\\boxed{", "}", "\\boxed{}", "{" * 500, "\\frac{1}{0}", "\\frac{", "1/0", "9" * 5000, "1e99999", "-", "1,1,1", ".5.5"),
    *("answer is", "#### ", "\\text{", "\\left", "$", "%", "\x00", "\n", "\u202e", "\U0001f9ee", "x^2", "(((", "\\sqrt[", "≠"),
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are bytes, in an order of their own: most sequences of them are not valid UTF-8."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert tokenizer.eos_token_id == EOS
    return tokenizer


TOKENIZER = byte_tokenizer()


def rollout(ids: list[int], answer: str | None, *, stopped: bool, source: Source = Source.STUDENT) -> Rollout:
    """As the engines make it."""
    response = (*ids, EOS) if stopped else tuple(ids)
    log_probs = (-1.0,) * len(response) if source is Source.STUDENT else ()
    prompt = Prompt(str((ids, answer)), (1, 2, 3), "a prompt", answer)
    return Rollout(prompt, source, response, log_probs, "stop" if stopped else "length", 0, str(TOKENIZER.decode(ids)))


def written(text: str) -> list[int]:
    return TOKENIZER.encode(text)


RESPONSES = st.one_of(
    st.just([]),
    st.builds(lambda token, count: [token] * count, st.integers(0, 255), st.integers(1, 300)),
    st.lists(st.integers(0, 255), max_size=80),  # lone bytes
    st.lists(st.sampled_from(GARBAGE), max_size=6).map(lambda pieces: written(" ".join(pieces))),
)
ROLLOUTS = st.builds(
    lambda ids, answer, stopped, source: rollout(ids, answer, stopped=stopped, source=source),
    RESPONSES,
    st.sampled_from([None, "7", "1/2", "\\frac{1}{0}", "x^2", "\\boxed{"]),
    st.booleans(),
    st.sampled_from([Source.STUDENT, Source.STUDENT, Source.GOLD]),
)


@settings(max_examples=60)
@given(st.lists(ROLLOUTS, min_size=1, max_size=5), st.sampled_from(["token", "response"]))
def test_a_step_reads_whatever_was_written(
    tmp_path_factory: pytest.TempPathFactory, rollouts: list[Rollout], aggregation: Aggregation
) -> None:
    folder = tmp_path_factory.mktemp("step")
    monitors = Monitors(MonitorsConfig(repetition_tail_chars=50), max_new_tokens=300)
    monitors.observe(1, rollouts)
    record = {**monitors.summary(), **policy_lag(rollouts, 0), **rollout_figures(rollouts)}
    shares = pack(rollouts, dp_size=2, max_tokens=60_000, aggregation=aggregation)
    record["packing/padding"] = padding_share(shares, rollouts)

    own = [each for each in rollouts if each.source is Source.STUDENT]
    if own:
        assert record["rollout/truncation_rate"] == sum(each.finish_reason == "length" for each in own) / len(own)
        assert record["rollout/empty"] == sum(not each.text.strip() for each in own) / len(own)
        assert record["rollout/length_max"] == max(len(each.response_ids) for each in own)
    assert all(value is None or math.isfinite(value) for value in record.values())

    sink = JsonlSink(folder / "metrics.jsonl", 0)
    sink.write(1, record)
    sink.close()
    assert json.loads((folder / "metrics.jsonl").read_text())["step"] == 1
    text = write_samples(folder, 1, rollouts, correctness(rollouts), 5).read_text(encoding="utf-8")
    assert all(f"{len(each.response_ids)} tokens, finish reason {each.finish_reason}" in text for each in rollouts)

    batches = [context_slice(batch, 0, 1) for part in shares for batch in part]
    for source, stream in ((Source.STUDENT, "rollout_weights"), (Source.GOLD, "gold_weights")):
        total = sum(float(getattr(batch, stream).double().sum()) for batch in batches)
        present = any(each.response_ids for each in rollouts if each.source is source)
        assert total == pytest.approx(float(present), abs=1e-5)


@pytest.mark.parametrize(
    "ids",
    [[], [65] * 40, [200, 7, 255, 128]],
    ids=["empty", "one token", "lone bytes"],
)
@pytest.mark.parametrize("stopped", [True, False])
def test_the_loss_of_such_responses_is_finite(ids: list[int], stopped: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    for batch in pack([rollout(ids, "7", stopped=stopped)], dp_size=1, max_tokens=100, aggregation="token")[0]:
        hidden = torch.randn(batch.num_tokens, HIDDEN, generator=generator).requires_grad_()
        head = torch.randn(VOCAB, HIDDEN, generator=generator)
        frozen: dict[str, Any] = {
            f"{model}_{part}": value.detach()
            for model in ("teacher", "reference")
            for part, value in (("hidden", hidden + 0.1), ("head", head))
        }
        output = distillation_loss(hidden, head, batch, OBJECTIVE, vocab_size=VOCAB, group=None, stop_ids=(EOS,), **frozen)
        output.loss.backward()
        assert hidden.grad is not None and bool(hidden.grad.isfinite().all()) and math.isfinite(output.loss.item())
        assert all(math.isfinite(float(term)) for term in output.terms)


def test_lone_bytes_become_text_that_counts_as_wrong() -> None:
    broken = rollout([0xA0, 5, 200, 255, 130], "7", stopped=True)
    assert "\N{REPLACEMENT CHARACTER}" in broken.text
    assert correctness([broken, rollout(written("7"), "7", stopped=True), rollout([], "7", stopped=True)]) == [
        False,
        True,
        False,
    ]


def test_answers_that_cost_a_verifier_its_time_are_wrong_within_seconds() -> None:
    text = "\\boxed{9^{9^{9^{9}}}}"
    start = time.monotonic()
    assert correctness([rollout(written(text), "10", stopped=True)]) == [False]
    assert time.monotonic() - start < 30


def steps_on(student: str, teacher: str, steps: list[list[Rollout]]) -> tuple[list[StepStats], bool]:
    """One optimizer step on each list; whether all weights are finite after them."""
    case = Case()
    layout, platform = open_layout(case.parallel)
    trainer = build_trainer(student, case, layout, platform)
    scorers = [
        build_scorer(folder, case, layout, platform, trainer.spec.dims.padded_vocab_size) for folder in (teacher, student)
    ]
    stats = []
    for rollouts in steps:
        shares = share(rollouts, case, layout)
        stats.append(trainer.step(own_part(shares, layout), *(scorer.score(shares) for scorer in scorers)))
    return stats, all(bool(parameter.isfinite().all()) for parameter in trainer.parameters())


def test_steps_on_nothing_and_on_one_repeated_token_leave_the_weights_whole(tmp_path: Path, pool: WorkerPool) -> None:
    for name, seed in (("student", 1), ("teacher", 2)):
        make_model(tmp_path / name, vocab_size=VOCAB, seed=seed)
    nothing = [rollout([], None, stopped=False) for _ in range(3)]
    ends = [rollout([], None, stopped=True) for _ in range(3)]
    repeats = [rollout([65] * 90, None, stopped=False), *nothing]
    [(stats, finite)] = pool.run(1, steps_on, str(tmp_path / "student"), str(tmp_path / "teacher"), [nothing, ends, repeats])
    assert finite and not any(each.skipped for each in stats)
    assert stats[0].terms.loss == 0 and stats[0].grad_norm == 0
    assert stats[1].terms.loss != 0 and stats[2].terms.loss != 0


def served_empty() -> list[Rollout]:
    """From a server that ends each response before its first token."""
    with FaultyServer(lambda body, number: "stop_at_once") as server:
        engine = SGLangEngine(
            FirstRank(),
            Roster("student", [server.endpoint]),
            cast(TokenizerProtocol, byte_tokenizer()),
            context=64,
            vocab_size=VOCAB,
            in_flight=4,
            timeout=60.0,
        )
        engine.generate(requests(4), sampling(stop_ids=(EOS,)))
        return engine.generate(requests(4), sampling(stop_ids=(EOS,)))  # with what it learnt of their lengths


def test_a_server_that_reports_no_token_gives_an_empty_response(pool: WorkerPool) -> None:
    [rollouts] = pool.run(1, served_empty)
    assert [(each.response_ids, each.log_probs, each.finish_reason, each.text) for each in rollouts] == [
        ((), (), "stop", "")
    ] * 4
