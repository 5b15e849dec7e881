"""A teacher behind real SGLang servers: its scores are transformers', its runs those of a Megatron teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_opd.config import ParallelConfig
from megatron_opd.data.packing import Multiples, context_positions, pack
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.scoring import sglang
from megatron_opd.scoring.sglang import SGLangScorer
from megatron_opd.sglang.client import Endpoint
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.server import Server, free_port
from megatron_opd.types import FrozenScores, Objective, OpdKind, PackedBatch, Prompt, Rollout, RunStopped, Source
from tests import runs
from tests.conftest import Table
from tests.mcore.worlds import open_layout
from tests.sglang.conftest import PYTHON, START_UP_SECONDS, spec
from tests.worker_pool import WorkerPool

pytestmark = pytest.mark.sglang
ROWS, SHARED = 59, 53  # ids of the teacher; those that the student has too
STOP_IDS = (1, 44)
WIDTH = 7 + len(STOP_IDS)
TOLERANCE = 1e-4  # nats, fp32


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Models and config of a run of three steps, in which the student alone writes."""
    folder = tmp_path_factory.mktemp("teacher")
    tree = runs.make_inputs(folder)
    tree["run"]["steps"] = 3
    tree["optimizer"]["lr"] = 1.0e-6  # faster, and rounding would soon decide on a token of the rollouts
    tree["mixture"]["teacher"] = 0
    return folder, {**tree, "eval": None}


@pytest.fixture(scope="module")
def endpoint(inputs: tuple[Path, dict[str, Any]]) -> Iterator[Endpoint]:
    """Prefills 32 tokens at once, so that a longer sequence is scored in parts."""
    folder, _ = inputs
    server = Server(spec(folder / "teacher", folder / "server.log", load_format="auto", chunked_prefill_size=32))
    try:
        server.wait_until_ready(START_UP_SECONDS)
        yield Endpoint(server.url, server.api_key)
    finally:
        server.stop()


def rollouts() -> list[Rollout]:
    """Two responses to one prompt, one longer than a prefill, one token after one; gold and teacher's."""
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, SHARED, (count,), generator=generator).tolist())

    shared = Prompt("shared", ids(40), "")
    prompts = (
        shared,
        shared,
        Prompt("a", ids(3), ""),
        Prompt("b", ids(1), ""),
        Prompt("c", ids(9), ""),
        Prompt("d", ids(2), ""),
    )
    lengths = (5, 13, 90, 1, 11, 4)
    sources = (*[Source.STUDENT] * 4, Source.GOLD, Source.TEACHER)
    return [
        Rollout(prompt, source, (*ids(length - 1), STOP_IDS[0]), (-1.0,) * length, "stop", 0, "")
        for prompt, length, source in zip(prompts, lengths, sources, strict=True)
    ]


def micro_batches(parallel: ParallelConfig) -> list[list[PackedBatch]]:
    dp = parallel.dp or 1
    return pack(rollouts(), dp_size=dp, max_tokens=120, aggregation="token", multiples=Multiples.of([parallel]))


def objective(opd: OpdKind, off_policy: Any) -> Objective:
    return Objective(opd, 0.2, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0, k=7, off_policy=off_policy)


class Chosen:
    """In place of the student: other ids at each position, and at some one less."""

    def ids(self, shares: Sequence[Sequence[PackedBatch]]) -> list[Tensor]:
        """[T, 7] int32 for each micro-batch."""
        generator = torch.Generator().manual_seed(4)
        found = []
        for batch in chain.from_iterable(shares):
            ids = torch.stack([torch.randperm(SHARED, generator=generator)[:7] for _ in range(batch.num_tokens)]).int()
            ids[::3, -1] = -1
            found.append(ids)
        return found


def scorer(layout: ParallelLayout, endpoints: Sequence[Endpoint], wanted: Objective) -> SGLangScorer:
    student: Any = Chosen() if wanted.opd == "topk_reverse_kl" else None
    return SGLangScorer(
        FirstRank(),
        Roster("teacher", endpoints if dist.get_rank() == 0 else []),  # nobody else asks
        layout,
        wanted,
        stop_ids=STOP_IDS,
        vocab_size=SHARED,
        teacher_vocab_size=ROWS,
        in_flight=4,
        timeout=60.0,
        student=student,
    )


def score(
    parallel: ParallelConfig, endpoints: Sequence[Endpoint], wanted: Objective
) -> tuple[tuple[int, int], list[FrozenScores]]:
    """This rank's scores, and its data- and context-parallel rank."""
    served = scorer(open_layout(parallel)[0], endpoints, wanted)
    served.verify([(5, 17, 49, 20, 31), (8, 47, 50)])
    return (served.layout.dp_rank, served.layout.cp_rank), served.score(micro_batches(parallel))


def distribution(model: Any, batch: PackedBatch, ids: int = SHARED) -> Tensor:
    """[T, ids] nats, by transformers in fp64, sequence by sequence."""
    log_q = torch.zeros(batch.num_tokens, ids, dtype=torch.float64)
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        with torch.no_grad():
            log_q[start:end] = model(batch.tokens[None, start:end]).logits[0, :, :ids].log_softmax(-1)
    return log_q


@pytest.mark.parametrize(
    ("opd", "off_policy"),
    [
        ("sampled", "cross_entropy"),
        ("topk_forward_kl", "divergence"),
        ("local_support", "cross_entropy"),
        ("topk_reverse_kl", "divergence"),
    ],
)
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(dp=1), ParallelConfig(cp=2), ParallelConfig(pp=2), ParallelConfig(dp=2)],
    ids=["one rank", "cp2", "pp2", "dp2"],
)
def test_scores_are_those_of_transformers(
    pool: WorkerPool,
    inputs: tuple[Path, dict[str, Any]],
    endpoint: Endpoint,
    table: Table,
    parallel: ParallelConfig,
    opd: OpdKind,
    off_policy: Any,
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(inputs[0] / "teacher", dtype=torch.float64)
    world = parallel.model_parallel_size * (parallel.dp or 1)
    everywhere = pool.run(world, score, parallel, [endpoint], objective(opd, off_policy))
    shares, worst, tokens = micro_batches(parallel), 0.0, 0
    chosen = iter(Chosen().ids(shares))
    chosen_of = [[next(chosen) for _ in share] for share in shares]
    for rank, ((dp_rank, cp_rank), scores) in enumerate(everywhere):
        if parallel.pp == 2 and rank == 0:
            assert all(each == FrozenScores() for each in scores)
            continue
        for batch, given, ids in zip(shares[dp_rank], scores, chosen_of[dp_rank], strict=True):
            assert given.tokens is not None and given.hidden is None
            places = context_positions(batch.cu_seqlens, cp_rank, parallel.cp)
            weights = batch.rollout_weights
            if off_policy == "divergence":
                weights = weights + batch.gold_weights + batch.teacher_weights
            wanted = weights[places] > 0  # [T/cp]
            log_q = distribution(model, batch)[places][wanted]
            ours = given.tokens.at(wanted.nonzero().flatten())
            worst = max(worst, _gap(ours.log_probs, log_q.gather(1, batch.labels[places][wanted, None]).squeeze(1)))
            worst = max(worst, _gap(ours.stop_log_probs, log_q[:, list(STOP_IDS)].logsumexp(1)))
            if opd == "sampled":
                assert ours.top_ids is None and ours.top_log_probs is None
            elif opd == "topk_reverse_kl":
                assert ours.top_ids is not None and ours.top_log_probs is not None
                own = ids[places][wanted].long()  # [P, 7]
                asked = own >= 0
                assert torch.equal(ours.top_ids[asked], own[asked]) and bool(ours.top_log_probs[~asked].isneginf().all())
                worst = max(worst, _gap(ours.top_log_probs[asked], log_q.gather(1, own.clamp(min=0))[asked]))
            else:
                assert ours.top_ids is not None and ours.top_log_probs is not None
                assert ours.top_ids.shape == (int(wanted.sum()), WIDTH)
                worst = max(worst, _gap(ours.top_log_probs, log_q.topk(WIDTH, 1).values))
                worst = max(worst, _gap(ours.top_log_probs, log_q.gather(1, ours.top_ids)))
            assert not given.tokens.log_probs[~wanted].any()
            tokens += int(wanted.sum())
    assert tokens == sum(
        len(each.response_ids) for each in rollouts() if off_policy == "divergence" or each.source == "student"
    )
    assert worst < TOLERANCE
    table.add("largest error of a served teacher's log-probability, nats", f"{opd}, {world} ranks", f"{worst:.1e}")


def _gap(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).abs().max()) if len(truth) else 0.0


def score_as_if_unshared_rows_had_no_mass(endpoints: Sequence[Endpoint]) -> list[FrozenScores]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sglang, "_NEGLIGIBLE", 1.0)
        return score(ParallelConfig(dp=1), endpoints, objective("local_support", "cross_entropy"))[1]


def test_rows_without_mass_are_not_asked_for(pool: WorkerPool, inputs: tuple[Path, dict[str, Any]], endpoint: Endpoint) -> None:
    """The log-probabilities are then those over all of the teacher's rows; its own ids among the likeliest do not count."""
    model: Any = AutoModelForCausalLM.from_pretrained(inputs[0] / "teacher", dtype=torch.float64)
    (everywhere,) = pool.run(1, score_as_if_unshared_rows_had_no_mass, [endpoint])
    (share,) = micro_batches(ParallelConfig(dp=1))
    dropped = 0
    for batch, given in zip(share, everywhere, strict=True):
        wanted = (batch.rollout_weights > 0).nonzero().flatten()
        log_q = distribution(model, batch, ids=ROWS)[wanted]
        assert given.tokens is not None
        ours = given.tokens.at(wanted)
        assert ours.top_ids is not None and ours.top_log_probs is not None
        assert _gap(ours.log_probs, log_q.gather(1, batch.labels[wanted, None]).squeeze(1)) < TOLERANCE
        known = ours.top_log_probs.isfinite()
        dropped += int((~known).sum())
        assert int(ours.top_ids.max()) < SHARED
        assert _gap(ours.top_log_probs[known], log_q.gather(1, ours.top_ids)[known]) < TOLERANCE
    assert dropped > 0


def lose_all_but_one(endpoints: Sequence[Endpoint]) -> tuple[list[str], bool, str]:
    """What is left after a step, whether the scores are those of the one alone, and what a step without any says."""
    parallel = ParallelConfig(dp=1)
    layout, _ = open_layout(parallel)
    served = scorer(layout, endpoints, objective("sampled", "cross_entropy"))
    scores = served.score(micro_batches(parallel))
    left = [each.url for each in served.roster.serving()]
    alone = scorer(layout, endpoints[-1:], served.objective).score(micro_batches(parallel))
    same = max(_gap(a.tokens.log_probs, b.tokens.log_probs) for a, b in zip(scores, alone, strict=True)) < TOLERANCE  # type: ignore[union-attr]
    served.roster = Roster("teacher", endpoints[:1])
    try:
        served.verify([(5, 6, 7)])
    except RunStopped as error:
        return left, same, str(error)
    return left, same, ""


def test_sequences_of_a_lost_server_go_to_the_others(pool: WorkerPool, endpoint: Endpoint) -> None:
    dead = Endpoint(f"http://127.0.0.1:{free_port('127.0.0.1')}")
    (outcome,) = pool.run(1, lose_all_but_one, [dead, endpoint])
    left, same, message = outcome
    assert left == [endpoint.url]
    assert same
    assert "no engine is left" in message and dead.url in message


def metrics_of(folder: Path, name: str, tree: dict[str, Any], **sections: dict[str, Any]) -> list[dict[str, Any]]:
    tree = copy.deepcopy(tree)
    for section, values in sections.items():
        tree[section] = {**tree[section], **values}
    tree["run"] |= {"name": name, "dir": str(folder / name)}
    result = runs.run(folder, tree)
    assert result.returncode == 0, result.stderr
    return [record for record in runs.metrics(folder / name) if "loss" in record]


@pytest.mark.parametrize(
    ("name", "loss", "parallel"),
    [
        ("sampled", {}, {"tp": 2}),
        ("topk_forward_kl", {"opd": "topk_forward_kl", "k": 7, "stop_class": "none"}, {"pp": 2}),
        ("local_support", {"opd": "local_support", "k": 7}, {"cp": 2}),
        ("topk_reverse_kl", {"opd": "topk_reverse_kl", "k": 7, "stop_class": "none"}, {"tp": 2}),
        ("topk_reverse_kl-divergence", {"opd": "topk_reverse_kl", "k": 7, "off_policy": "divergence"}, {"cp": 2}),
    ],
    ids=[
        "sampled, tp2",
        "topk_forward_kl, pp2",
        "local_support, cp2",
        "topk_reverse_kl, tp2",
        "topk_reverse_kl on all responses, cp2",
    ],
)
def test_run_is_that_of_a_megatron_teacher(
    inputs: tuple[Path, dict[str, Any]],
    endpoint: Endpoint,
    table: Table,
    name: str,
    loss: dict[str, Any],
    parallel: dict[str, int],
) -> None:
    folder, tree = inputs
    key = folder / "key"
    key.write_text(f"{endpoint.api_key}\n")
    own = {"student": {"parallel": parallel}, "loss": loss}
    here = metrics_of(folder, f"{name}-here", tree, **own, teacher={"parallel": {"tp": 2}})
    served = {"backend": "sglang", "urls": [endpoint.url], "api_key_file": str(key)}
    there = metrics_of(folder, f"{name}-served", tree, **own, teacher=served)
    assert len(here) == len(there) == 3
    for ours, truth in zip(there, here, strict=True):
        for metric in ("loss", "loss/opd", "grad_norm", "policy/advantage", "policy/teacher_stop_log_prob"):
            assert ours[metric] == pytest.approx(truth[metric], rel=1e-4, abs=1e-6), metric
        assert truth["policy/teacher_entropy"] > 0
        assert ours["policy/teacher_entropy"] is None and ours["policy/top1_agreement"] is None
    worst = max(abs(ours["loss/opd"] / truth["loss/opd"] - 1) for ours, truth in zip(there, here, strict=True))
    table.add(
        "loss/opd of a served teacher over a Megatron one's, largest relative difference in 3 steps", name, f"{worst:.1e}"
    )


def test_held_out_responses_are_scored_as_by_a_megatron_teacher(
    inputs: tuple[Path, dict[str, Any]], endpoint: Endpoint
) -> None:
    """At the loss's temperature; of another the server knows nothing."""
    folder, tree = inputs
    key = folder / "key"
    key.write_text(f"{endpoint.api_key}\n")
    served = {"backend": "sglang", "urls": [endpoint.url], "api_key_file": str(key)}
    heldout = {"prompts": str(folder / "heldout.jsonl"), "limit": 8, "temperature": 1.0, "teacher": False}
    here = metrics_of(folder, "heldout-here", {**tree, "eval": {}}, eval=heldout)[-1]
    there = metrics_of(folder, "heldout-served", {**tree, "eval": {}}, eval=heldout, teacher=served)[-1]
    for metric in ("log_prob", "teacher_log_prob", "advantage", "advantage_regular", "teacher_stop_log_prob", "reference_kl"):
        assert there[f"eval/{metric}"] == pytest.approx(here[f"eval/{metric}"], rel=1e-4, abs=1e-6), metric
    assert here["eval/teacher_entropy"] > 0 and there["eval/teacher_entropy"] is None
    cooler = {**heldout, "temperature": 0.6}
    other = metrics_of(folder, "heldout-cooler", {**tree, "eval": {}}, eval=cooler, teacher=served)[-1]
    assert other["eval/advantage"] is other["eval/teacher_log_prob"] is None
    assert other["eval/engine_gap_max"] < 1e-4 and other["eval/reference_kl"] is not None


def test_server_that_the_run_starts_writes_and_scores(inputs: tuple[Path, dict[str, Any]]) -> None:
    """The first step's student responses do not depend on the teacher, so its term is that of a Megatron teacher."""
    folder, tree = inputs
    rollout = {**tree["rollout"], "python": str(PYTHON), "max_batch_size": 8}
    mixture = {"teacher": 1}
    here = metrics_of(folder, "writes-here", tree, mixture=mixture)
    there = metrics_of(folder, "writes-served", tree, mixture=mixture, rollout=rollout, teacher={"backend": "sglang"})
    assert there[0]["loss/opd"] == pytest.approx(here[0]["loss/opd"], rel=1e-4)
    assert all(record["loss/teacher_sft"] > 0 for record in there)
    assert [file.name for file in (folder / "writes-served" / "sglang").iterdir()] == ["0-teacher.log"]


def test_server_without_weights_stops_the_run_before_its_first_step(inputs: tuple[Path, dict[str, Any]]) -> None:
    folder, tree = inputs
    tree = copy.deepcopy(tree)
    tree["run"] |= {"name": "dummy", "dir": str(folder / "dummy")}
    tree["teacher"]["backend"] = "sglang"
    tree["rollout"] |= {"python": str(PYTHON), "sglang": {"load_format": "dummy"}}
    result = runs.run(folder, tree)
    assert result.returncode == 2
    (line,) = {line for line in result.stderr.splitlines() if "has no weights" in line}  # each rank says so
    assert "SGLang server http://127.0.0.1:" in line and "-ln V is -4.078" in line
    assert not runs.metrics(folder / "dummy")
