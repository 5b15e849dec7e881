"""The training step against a dense oracle on transformers, and the same step in every layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder, checkpoint_tensors
from megatron_opd.types import Source
from tests.conftest import Table
from tests.mcore.training import (
    STABLE_OPD,
    Case,
    gradients,
    make_rollouts,
    memory_of_frozen_models,
    opd_of_routed_teachers,
    step_with_a_lost_frozen_model,
    step_with_a_teacher_that_became_uniform,
    train_steps,
    weights_after_a_skipped_step,
)
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

P, SP = ParallelConfig, {"sequence_parallel": True}
RECOMPUTE_ALL = (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1))
RECOMPUTE_CORE = (("recompute_granularity", "selective"), ("recompute_modules", ["core_attn"]))
RECOMPUTE_MOE = (("recompute_granularity", "selective"), ("recompute_modules", ["moe"]))
# Name: the student's layout; the frozen models have another.
LAYOUTS = {
    "tp2": Case(P(tp=2), P(pp=2)),
    "tp2 sp": Case(P(tp=2, **SP), P(dp=2)),
    "pp2": Case(P(pp=2), P(tp=2, **SP)),
    "dp2": Case(P(dp=2), P(cp=2)),
    "cp2": Case(P(cp=2), P(dp=2)),
    "tp2 sp x cp2": Case(P(tp=2, cp=2, **SP), P(pp=2, dp=2)),
    "cp2 x pp2": Case(P(cp=2, pp=2), P(tp=2, dp=2)),
    "cp2 x dp2": Case(P(cp=2, dp=2), P(tp=2, pp=2)),
    "cp4": Case(P(cp=4), P(pp=4)),
    "pp4": Case(P(pp=4), P(tp=2, cp=2, **SP)),
    "tp2 x pp2": Case(P(tp=2, pp=2), P(dp=4)),
    "tp2 x dp2": Case(P(tp=2, dp=2), P(cp=2, pp=2)),
    "pp2 x dp2": Case(P(pp=2, dp=2), P(cp=4)),
    "pp2 vpp2": Case(P(pp=2, vpp=2), P(tp=2)),
    "pp2 vpp2 x dp2": Case(P(pp=2, vpp=2, dp=2), P(tp=2, cp=2, **SP)),
    "pp2 vpp2 x tp2 sp": Case(P(pp=2, vpp=2, tp=2, **SP), P(dp=4)),
    "pp2 vpp2 x cp2": Case(P(pp=2, vpp=2, cp=2), P(pp=4)),
    "dp2, overlapped": Case(P(dp=2), overlap=True),
    "pp2 x dp2, overlapped": Case(P(pp=2, dp=2), overlap=True),
    "pp2 vpp2 x dp2, overlapped": Case(P(pp=2, vpp=2, dp=2), overlap=True),
    "cp2 x dp2, overlapped": Case(P(cp=2, dp=2), overlap=True),
    "tp2, full recompute": Case(P(tp=2), native=RECOMPUTE_ALL),
    "pp2 vpp2, full recompute": Case(P(pp=2, vpp=2), native=RECOMPUTE_ALL),
    "tp2 sp, selective recompute": Case(P(tp=2, **SP), native=RECOMPUTE_CORE),
}
EXPERT_LAYOUTS = {
    "dp2": Case(P(dp=2), P(ep=2)),
    "pp2": Case(P(pp=2), P(tp=2, **SP)),
    "cp2": Case(P(cp=2), P(ep=2)),
    "ep2": Case(P(ep=2, dp=2), P(pp=2)),
    "ep2 x dp2": Case(P(ep=2, dp=4), P(ep=4)),
    "ep4": Case(P(ep=4, dp=4), P(pp=2)),
    "ep2 x pp2": Case(P(ep=2, pp=2, dp=2), P(ep=4)),
    "ep2 x cp2": Case(P(ep=2, cp=2), P(pp=2)),
    "ep2 x cp2 x dp2": Case(P(ep=2, cp=2, dp=2), P(ep=2, pp=2)),
    "ep4 x cp2 x dp2": Case(P(ep=4, cp=2, dp=2), P(ep=2, cp=4)),
    "cp2 x pp2": Case(P(cp=2, pp=2), P(tp=2, ep=2, **SP)),
    "ep2 x cp2 x pp2": Case(P(ep=2, cp=2, pp=2), P()),
    "tp2 sp x ep2": Case(P(tp=2, ep=2, **SP), P()),
    "tp2 sp x ep4": Case(P(tp=2, ep=4, **SP, dp=2), P(ep=2, pp=2)),
    "tp2 sp x ep2 x dp2": Case(P(tp=2, ep=2, **SP, dp=2), P(cp=2, ep=4)),
    "tp2 sp x ep2 x pp2": Case(P(tp=2, ep=2, pp=2, **SP), P(ep=4)),
    "ep2, overlapped": Case(P(ep=2, dp=4), overlap=True),
    "ep2, selective recompute": Case(P(ep=2, dp=2), native=RECOMPUTE_MOE),
}
FAST = (
    *("tp2 sp", "pp2", "dp2", "cp2", "tp2 sp x cp2", "tp2 x dp2", "pp2 vpp2"),
    *("pp2 x dp2, overlapped", "tp2, full recompute", "tp2 sp, selective recompute"),
)
FAST_EXPERTS = ("ep2", "tp2 sp x ep2")


def slow_unless(fast: Sequence[str], names: Iterable[str]) -> list[ParameterSet]:
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]


OTHER_SPLITS = {
    "tp1, micro-batches of 64 tokens": Case(max_tokens=64),
    "tp1, other packing order": Case(max_tokens=64, shuffle=3),
    "tp1, no distributed optimizer": Case(distributed=False),
}


# Terms that only the monitors read.
MONITORED = (
    *("log_prob", "teacher_log_prob", "engine_log_prob", "repeated_weight", "repeated_advantage"),
    *("overlap", "overlap_positions"),
    *("student_weight", "teacher_weight", "gold_weight"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A student and a teacher of another width and depth; 101 ids, padded to 128."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "student", "qwen3", tied=True, layers=4, seed=1)
    make_model(folder / "teacher", "llama", layers=4, hidden=64, seed=2)
    return str(folder / "student"), str(folder / "teacher")


def oracle(student: str, teacher: str, case: Case) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss terms and gradients in fp64 by autograd over full logits, one sequence at a time; nothing of the losses package."""
    # The grouped product of experts has no fp64.
    policy = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64, experts_implementation="eager")
    frozen = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64, experts_implementation="eager")
    rollouts = make_rollouts(0, policy.config.vocab_size)
    objective, counts = case.objective, dict.fromkeys(Source, 0)
    coefficients = {
        Source.STUDENT: objective.student_weight,
        Source.TEACHER: objective.teacher_weight,
        Source.GOLD: objective.gold_weight,
    }
    for rollout in rollouts:
        counts[rollout.source] += len(rollout.response_ids) if case.aggregation == "token" else 1
    named = ("opd", "reference_kl", "teacher_written", "gold", *MONITORED)
    sums = dict.fromkeys(named, torch.zeros((), dtype=torch.float64))
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt.token_ids + rollout.response_ids])
        start, response = len(rollout.prompt.token_ids) - 1, torch.tensor(rollout.response_ids)
        log_p = F.log_softmax(policy(ids).logits[0, start:-1] / objective.temperature, dim=-1)  # [R, V]
        chosen = log_p.gather(1, response[:, None]).squeeze(1)
        weight = 1.0 / counts[rollout.source] / (1 if case.aggregation == "token" else len(response))
        if rollout.source is Source.STUDENT:
            with torch.no_grad():
                log_q = F.log_softmax(frozen(ids).logits[0, start:-1] / objective.temperature, dim=-1)
            old = torch.tensor(rollout.log_probs, dtype=torch.float64)
            if objective.opd == "sampled":
                advantage = log_q.gather(1, response[:, None]).squeeze(1) - old
                ratio = (chosen - old).exp()
                assert objective.clip is not None
                clipped = ratio.clamp(1 - objective.clip, 1 + objective.clip)
                opd = -torch.minimum(ratio * advantage, clipped * advantage)
            else:
                opd = (log_q.exp() * (log_q - log_p)).sum(-1)  # forward KL
            terms = {"opd": opd, "reference_kl": (log_p.exp() * (log_p - log_q)).sum(-1)}
            of_teacher = log_q.gather(1, response[:, None]).squeeze(1)
            repeated = torch.tensor([token in rollout.response_ids[:i] for i, token in enumerate(rollout.response_ids)])
            terms |= {"log_prob": chosen.detach(), "teacher_log_prob": of_teacher, "engine_log_prob": old}
            terms |= {"repeated_weight": repeated.double(), "repeated_advantage": repeated * (of_teacher - old)}
            sampled = torch.arange(start, start + len(response)) % 2 == 0
            likeliest = [each.detach().topk(3, -1).indices for each in (log_p, log_q)]
            overlap = (likeliest[0][:, :, None] == likeliest[1][:, None, :]).any(-1).double().mean(-1)
            sums["overlap"] = sums["overlap"] + overlap[sampled].sum()
            sums["overlap_positions"] = sums["overlap_positions"] + sampled.sum()
        else:
            terms = {"gold" if rollout.source is Source.GOLD else "teacher_written": -chosen}
        terms[f"{rollout.source}_weight"] = torch.full((len(response),), coefficients[rollout.source])
        for name, values in terms.items():
            sums[name] = sums[name] + weight * values.sum()
    loss = (
        objective.student_weight * sums["opd"]
        + objective.reference_kl * sums["reference_kl"]
        + objective.teacher_weight * sums["teacher_written"]
        + objective.gold_weight * sums["gold"]
    )
    loss.backward()
    return {name: value.item() for name, value in {**sums, "loss": loss}.items()}, _gradients(policy)


@torch.no_grad()
def _gradients(policy: PreTrainedModel) -> dict[str, torch.Tensor]:
    """By a checkpoint's names, which are found for the gradients in the parameters' places."""
    for parameter in policy.parameters():
        assert parameter.grad is not None
        parameter.copy_(parameter.grad)
    others = {name for name, _ in policy.named_buffers()} | ({"lm_head.weight"} if policy.config.tie_word_embeddings else set())
    return {name: tensor for name, tensor in checkpoint_tensors(policy).items() if name not in others}


@pytest.mark.parametrize(
    "case",
    [
        Case(max_tokens=64),
        Case(parallel=ParallelConfig(tp=2), max_tokens=64),
        Case(parallel=ParallelConfig(pp=2), max_tokens=64, aggregation="response"),
        Case(parallel=ParallelConfig(tp=2), objective=replace(STABLE_OPD, opd="forward_kl")),
    ],
    ids=["tp1", "tp2", "pp2, response aggregation", "tp2, forward KL"],
)
def test_step_matches_the_dense_oracle(pool: WorkerPool, models: tuple[str, str], case: Case) -> None:
    """Here the reference is the teacher, so that its KL is far from 0."""
    _assert_step_matches_the_oracle(pool, models, case)


@pytest.mark.parametrize(
    "case",
    [
        Case(max_tokens=64),
        pytest.param(Case(parallel=P(pp=2), max_tokens=64), marks=pytest.mark.slow),
        pytest.param(Case(parallel=P(ep=2, dp=2), max_tokens=64), marks=pytest.mark.slow),
        Case(parallel=P(tp=2, ep=2, **SP), teacher=P(tp=2), max_tokens=64),
        pytest.param(Case(parallel=P(cp=2, ep=2), max_tokens=64), marks=pytest.mark.slow),
        pytest.param(Case(parallel=P(ep=2, pp=2, dp=2), max_tokens=64), marks=pytest.mark.slow),
    ],
    ids=["tp1", "pp2", "ep2", "tp2 sp x ep2", "cp2 x ep2", "ep2 x pp2"],
)
def test_step_of_gpt_oss_matches_the_dense_oracle(
    pool: WorkerPool, models: tuple[str, str], tmp_path: Path, case: Case
) -> None:
    """Sinks, windows, biases of experts and of the router among the gradients."""
    make_model(tmp_path, "gpt_oss", seed=4)
    frozen = replace(case, teacher=case.teacher or case.parallel.model_copy(update={"ep": 1}))
    _assert_step_matches_the_oracle(pool, (str(tmp_path), models[1]), frozen)


def _assert_step_matches_the_oracle(pool: WorkerPool, models: tuple[str, str], case: Case) -> None:
    expected, expected_gradients = oracle(*models, case)
    for stats, actual in pool.run(case.world_size, gradients, *models, case):
        assert set(actual) == set(expected_gradients)
        for name, value in expected.items():
            assert math.isclose(stats.terms._asdict()[name], value, rel_tol=1e-5), name
        for name, gradient in actual.items():
            assert (gradient - expected_gradients[name]).norm() <= 2e-5 * expected_gradients[name].norm(), name
        norm = torch.stack([g.norm() for g in expected_gradients.values()]).norm().item()
        assert math.isclose(stats.grad_norm, norm, rel_tol=1e-5)


# With the layouts in which each family's own parts matter: fused tensors and biases that are split, windows that ranks share.
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {"arch": "phi3", "partial_rotary_factor": 0.75, "sliding_window": 6},
    "llama, biases": {"arch": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"arch": "mistral", "sliding_window": 5},
    "qwen2, window": {"arch": "qwen2", "hidden": 64, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3, window": {"arch": "qwen3", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
}
FAMILY_LAYOUTS = {"tp1": P(), "tp2": P(tp=2), "tp2 sp": P(tp=2, **SP), "cp2": P(cp=2), "tp2 sp x cp2": P(tp=2, cp=2, **SP)}
FAST_FAMILIES = {("phi3", "tp2 sp"), ("phi3", "cp2"), ("llama, biases", "tp2 sp"), ("qwen3, window", "cp2")}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(family, layout, marks=[] if (family, layout) in FAST_FAMILIES else pytest.mark.slow)
        for family in FAMILIES
        for layout in FAMILY_LAYOUTS
    ],
)
def test_gradients_of_each_family_match_the_dense_oracle(
    pool: WorkerPool, tmp_path: Path, table: Table, family: str, layout: str
) -> None:
    make_model(tmp_path / "student", **FAMILIES[family])
    make_model(tmp_path / "teacher", "llama", hidden=64, seed=2)
    folders = str(tmp_path / "student"), str(tmp_path / "teacher")
    case = Case(FAMILY_LAYOUTS[layout], objective=replace(STABLE_OPD, opd="forward_kl"), max_tokens=64)
    expected, expected_gradients = oracle(*folders, case)
    for stats, actual in pool.run(case.world_size, gradients, *folders, case):
        assert math.isclose(stats.terms.loss, expected["loss"], rel_tol=1e-5)
        errors = {name: _norm({name: actual[name] - g}) / _norm({name: g}) for name, g in expected_gradients.items()}
        assert set(actual) == set(errors)
        assert max(errors.values()) <= 2e-5, max(errors, key=errors.__getitem__)
    table.add(
        "gradients of families, relative L2 to the dense oracle's", f"{family:16} {layout:12}", f"{max(errors.values()):.1e}"
    )


@pytest.fixture(scope="module")
def one_rank(pool: WorkerPool, models: tuple[str, str]) -> tuple[list, dict[str, torch.Tensor]]:
    return pool.run(1, train_steps, *models, Case(), 3)[0]


@pytest.mark.parametrize("name", [*OTHER_SPLITS, *slow_unless(FAST, LAYOUTS)])
def test_steps_agree_in_every_layout(
    pool: WorkerPool,
    models: tuple[str, str],
    one_rank: tuple[list, dict[str, torch.Tensor]],
    table: Table,
    name: str,
) -> None:
    case = OTHER_SPLITS[name] if name in OTHER_SPLITS else replace(LAYOUTS[name], max_tokens=64)
    _assert_steps_agree(pool, models, case, one_rank, table, name)


def _assert_steps_agree(
    pool: WorkerPool,
    models: tuple[str, str],
    case: Case,
    one_rank: tuple[list, dict[str, torch.Tensor]],
    table: Table,
    name: str,
) -> None:
    expected_stats, expected_weights = one_rank
    of_ranks = pool.run(case.world_size, train_steps, *models, case, 3)
    assert [set(stats[-1].responses) for stats, _ in of_ranks] == [set(range(10)), *[set()] * (case.world_size - 1)]
    for stats, weights in of_ranks:
        for actual, expected in zip(stats, expected_stats, strict=True):
            for field, value in actual.terms._asdict().items():
                assert math.isclose(value, expected.terms._asdict()[field], rel_tol=1e-5, abs_tol=1e-7), field
            assert math.isclose(actual.grad_norm, expected.grad_norm, rel_tol=1e-5)
            for place, values in actual.responses.items():  # on the first rank
                of_one_rank = expected.responses[place]
                for actual_values, expected_values in zip(astuple(values), astuple(of_one_rank), strict=True):
                    assert actual_values == pytest.approx(expected_values, rel=1e-4, abs=1e-5)
        update = sum((weights[key] - expected_weights[key]).norm() ** 2 for key in weights) ** 0.5
        total = sum(expected_weights[key].norm() ** 2 for key in weights) ** 0.5
        assert update <= 1e-4 * total
        last, first = stats[-1], expected_stats[-1]
        row = f"loss {last.terms.loss:.6f} ({first.terms.loss:.6f})  grad norm {last.grad_norm:.5f} ({first.grad_norm:.5f})"
        table.add("third step in other layouts (and on one rank)", f"{name:32}", row)


@pytest.fixture(scope="module")
def expert_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("experts")
    make_model(folder / "student", "qwen3_moe", layers=2, seed=1)
    make_model(folder / "teacher", "mixtral", layers=2, hidden=48, seed=2)
    return str(folder / "student"), str(folder / "teacher")


@pytest.fixture(scope="module")
def experts_on_one_rank(pool: WorkerPool, expert_models: tuple[str, str]) -> tuple[list, dict[str, torch.Tensor]]:
    return pool.run(1, train_steps, *expert_models, Case(), 3)[0]


@pytest.mark.parametrize("name", slow_unless(FAST_EXPERTS, EXPERT_LAYOUTS))
def test_steps_of_experts_agree_in_every_layout(
    pool: WorkerPool,
    expert_models: tuple[str, str],
    experts_on_one_rank: tuple[list, dict[str, torch.Tensor]],
    table: Table,
    name: str,
) -> None:
    case = replace(EXPERT_LAYOUTS[name], max_tokens=64)
    _assert_steps_agree(pool, expert_models, case, experts_on_one_rank, table, f"experts, {name}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [*(("dense", name) for name in LAYOUTS), *(("experts", name) for name in EXPERT_LAYOUTS)]
)
def test_every_gradient_and_the_update_agree_in_every_layout(
    pool: WorkerPool, models: tuple[str, str], expert_models: tuple[str, str], table: Table, kind: str, name: str
) -> None:
    folders, layouts = (models, LAYOUTS) if kind == "dense" else (expert_models, EXPERT_LAYOUTS)
    case = replace(layouts[name], max_tokens=64)
    [(expected, expected_gradients)] = pool.run(1, gradients, *folders, Case())
    [(_, expected_weights)] = pool.run(1, train_steps, *folders, Case(), 1)
    start = {key: HFFolder(folders[0]).tensor(key) for key in expected_weights}
    move = _norm({key: expected_weights[key] - start[key] for key in start})
    for stats, actual in pool.run(case.world_size, gradients, *folders, case):
        assert math.isclose(stats.terms.loss, expected.terms.loss, rel_tol=1e-5)
        assert math.isclose(stats.grad_norm, expected.grad_norm, rel_tol=1e-5)
        errors = {key: _norm({key: actual[key] - g}) / _norm({key: g}) for key, g in expected_gradients.items()}
        whole = _norm({key: actual[key] - g for key, g in expected_gradients.items()}) / _norm(expected_gradients)
        assert max(errors.values()) <= 1e-5, max(errors, key=errors.__getitem__)
    for _, weights in pool.run(case.world_size, train_steps, *folders, case, 1):
        update = _norm({key: weights[key] - expected_weights[key] for key in weights}) / move
        assert update <= 1e-3
    figures = f"gradients {whole:.1e}, worst {max(errors.values()):.1e}, update {update:.1e}"
    table.add("first step in other layouts, relative L2 to one rank's", f"{kind}, {name:28}", figures)


def _norm(tensors: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors.values()))


def test_sources_do_not_dilute_each_other(pool: WorkerPool, models: tuple[str, str]) -> None:
    """The gold term of a step is the same whether rollouts are there or not: lambda_gold cannot fade when they get longer."""
    with_rollouts = pool.run(1, train_steps, *models, Case(), 1)[0][0][0]
    alone = replace(STABLE_OPD, student_weight=0.0, reference_kl=0.0, teacher_weight=0.0)
    without = pool.run(1, train_steps, *models, Case(objective=alone), 1)[0][0][0]
    assert math.isclose(with_rollouts.terms.gold, without.terms.gold, rel_tol=1e-6)
    assert math.isclose(without.terms.loss, STABLE_OPD.gold_weight * without.terms.gold, rel_tol=1e-6)


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_non_finite_step_changes_nothing(pool: WorkerPool, models: tuple[str, str], layout: str) -> None:
    parallel = LAYOUTS[layout].parallel
    bad = pool.run(2, weights_after_a_skipped_step, *models, parallel, True)
    good = pool.run(2, weights_after_a_skipped_step, *models, parallel, False)
    for (skipped, weights), (_, expected) in zip(bad, good, strict=True):
        assert skipped == [False, True, False]
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_each_token_is_scored_by_its_own_teacher(
    pool: WorkerPool, models: tuple[str, str], tmp_path: Path, layout: str
) -> None:
    """Three teachers of different widths and depths."""
    student, teacher = models
    make_model(tmp_path / "third", "qwen3", vocab_size=97, layers=2, hidden=64, seed=9)
    teachers = {"code": teacher, "maths": student, "prose": str(tmp_path / "third")}
    results = pool.run(2, opd_of_routed_teachers, student, teachers, replace(LAYOUTS[layout], max_tokens=64))
    for routed, parts in results:
        assert math.isclose(routed, sum(parts), rel_tol=1e-6)
        assert len({round(part, 6) for part in parts}) == 3


@pytest.mark.parametrize("model", ["teacher", "reference"])
def test_frozen_model_with_nan_weights_stops_every_rank_and_is_named(
    pool: WorkerPool, models: tuple[str, str], model: str
) -> None:
    first, second = pool.run(2, step_with_a_lost_frozen_model, *models, model)
    assert first == second
    assert first.startswith(f"{model}.model: NaN or infinite logits on ")


def test_teacher_that_is_uniform_at_a_step_stops_every_rank_and_is_named(pool: WorkerPool, models: tuple[str, str]) -> None:
    first, second = pool.run(2, step_with_a_teacher_that_became_uniform, *models)
    assert first == second
    nats = f"{-math.log(101):.2f}"
    assert first.startswith(
        f"teacher.model: uniform over the vocabulary, every token at {nats} nats: it has no weights, or zeros"
    )


def test_frozen_models_hold_no_gradients_and_no_optimizer_state(pool: WorkerPool, models: tuple[str, str]) -> None:
    memory = pool.run(1, memory_of_frozen_models, *models)[0]
    assert memory.frozen_with_gradient == 0
    assert memory.frozen_gradient_buffers == 0
    assert not memory.hidden_requires_grad
    # The student's weights themselves (fp32: no master copy) and Adam's two moments of them, nothing else.
    assert memory.optimizer_tensors == 3 * memory.student_parameters
