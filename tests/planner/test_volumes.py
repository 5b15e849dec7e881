"""The planner's communication volumes against the bytes that real steps on gloo give to collectives, group by group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from megatron_opd.advisor.planner import Planner
from megatron_opd.config import Config
from megatron_opd.config_file import validate_config
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.collectives import Amount, Flow, Kind, Traffic, times, total
from megatron_opd.mcore.footprint import Rank
from megatron_opd.mcore.model import model_spec
from megatron_opd.mcore.work import loss_work, scoring_work, training_work, update_work
from megatron_opd.planner.mean_step import Lengths
from megatron_opd.planner.rank_steps import StepPlanner
from tests.conftest import Table
from tests.planner.real import RealWork, work_of
from tests.tiny_models import Arch, make_model
from tests.worker_pool import WorkerPool

LENGTHS, MICROBATCHES = (64, 48, 16), 4
SP = {"sequence_parallel": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tp2": ("tied", {"tp": 2}, {}),
    "tp2 sp, full recompute": ("untied", {"tp": 2, **SP}, {"native": FULL}),
    "pp2": ("tied", {"pp": 2}, {}),
    "pp2 vpp2": ("untied", {"pp": 2, "vpp": 2}, {}),
    "cp2": ("untied", {"cp": 2}, {}),
    "dp2": ("untied", {"dp": 2}, {}),
    "dp2 bf16, overlapped in buckets": (
        "untied",
        {"dp": 2},
        {"dtype": "bfloat16", "optimizer": {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 5000}},
    ),
    "dp2 without distributed optimizer": ("tied", {"dp": 2}, {"optimizer": {"distributed": False}}),
    "ep2 x dp2": ("experts", {"ep": 2, "dp": 2}, {}),
    "tp2 sp x cp2": ("untied", {"tp": 2, "cp": 2, **SP}, {}),
    "tp2 sp x pp2": ("tied", {"tp": 2, "pp": 2, **SP}, {}),
    "tp2 x dp2": ("tied", {"tp": 2, "dp": 2}, {}),
    "pp2 x dp2": ("untied", {"pp": 2, "dp": 2}, {}),
}
SLOW = {"tp2", "pp2 vpp2", "dp2", "dp2 without distributed optimizer", "tp2 x dp2", "pp2 x dp2", "tp2 sp x cp2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    kinds: dict[str, tuple[Arch, dict[str, Any]]] = {
        "tied": ("qwen3", {"tied": True, "layers": 4, "hidden": 64}),
        "untied": ("qwen2", {"layers": 8, "hidden": 64}),
        "experts": ("qwen3_moe", {"layers": 4, "hidden": 64}),
        "teacher": ("llama", {"layers": 4}),
    }
    for name, (arch, sizes) in kinds.items():
        make_model(folder / name, arch, **sizes)
    return {name: str(folder / name) for name in kinds}


def tree_of(name: str, models: dict[str, str]) -> dict[str, Any]:
    model, parallel, more = CASES[name]
    return {
        "run": {"name": "counted"},
        "student": {
            "model": models[model],
            "dtype": more.get("dtype", "float32"),
            "parallel": parallel,
            "megatron": more.get("native", {}),
        },
        "teacher": {"model": models["teacher"], "parallel": {**parallel, "ep": 1, "vpp": 1}},
        "data": {"prompts": "none.jsonl"},
        "mixture": {"student": 1, "gold": 0},
        "loss": {"opd": "reverse_kl", "reference_kl": 0.5},
        "optimizer": more.get("optimizer", {}),
        "monitors": {"overlap_k": 0},
    }


def planned(config: Config, rank: Rank, opd_tokens: int) -> tuple[Traffic, Traffic, Traffic]:
    """Scoring, passes, and update with export."""
    assert config.teacher is not None
    parallel = config.student.parallel
    spec = model_spec(HFFolder(config.student.model), parallel, "student")
    teacher = model_spec(HFFolder(config.teacher.model), config.layouts["teacher"], "teacher")
    scoring = scoring_work(config, teacher, "teacher", rank, LENGTHS, "local").traffic
    passes = training_work(config, spec, rank, LENGTHS, "local").both.traffic
    loss: Traffic = {}
    if rank.stage(parallel) == parallel.pp - 1:
        loss = loss_work(config, spec, rank, teacher=32, reference=32, vocab_size=101).of(opd_tokens, 0).traffic
    update = update_work(config, spec, rank, whole=True)
    return (
        times(scoring, MICROBATCHES),
        total([times(passes, MICROBATCHES), loss, update.reduction]),
        total([update.parameters, update.export]),
    )


_ROUTED = Flow("ep", Kind.ALL_TO_ALL)  # the router of a real run is not balanced, so only the sum over the ranks is as planned


def payloads(traffic: Traffic) -> Mapping[Flow, float]:
    """Two stages send one way in their own group and the other way in the world, where sends overlap.

    Without balance the ranks also tell each other how many tokens go where, which the plan leaves out.
    """
    found: dict[Flow, float] = {}
    for flow, amount in traffic.items():
        if flow.group == "tp_ep":
            continue
        of = Flow("pp", Kind.SEND) if flow == Flow("world", Kind.SEND) else flow
        found[of] = found.get(of, 0) + amount.payload
    return {flow: round(payload) for flow, payload in found.items()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_every_group_has_the_bytes_of_a_real_step(name: str, models: dict[str, str], pool: WorkerPool, table: Table) -> None:
    tree = tree_of(name, models)
    config = validate_config(tree)
    parallel = config.student.parallel
    world_size = parallel.model_parallel_size * (parallel.dp or 1)
    reals: list[RealWork] = pool.run(world_size, work_of, tree, LENGTHS, MICROBATCHES)
    plans = [planned(config, Rank(number, world_size), real.opd_tokens) for number, real in enumerate(reals)]
    routed = [
        (plan[1].pop(_ROUTED, Amount(0, 0)), real.passes.pop(_ROUTED, Amount(0, 0)))
        for plan, real in zip(plans, reals, strict=True)
    ]
    assert sum(plan.payload for plan, _ in routed) == sum(real.payload for _, real in routed)
    seen: dict[str, float] = {}
    for plan, real in zip(plans, reals, strict=True):
        for of_plan, of_run in zip(plan, (real.scoring, real.passes, real.update), strict=True):
            assert payloads(of_plan) == payloads(of_run)
        for flow, amount in total([real.scoring, real.passes, real.update]).items():
            seen[flow.group] = seen.get(flow.group, 0.0) + amount.payload
    assert seen
    table.add(
        "Planner's volumes equal real steps'", name, ", ".join(f"{group} {size / 1e6:.2f} MB" for group, size in seen.items())
    )


@pytest.mark.parametrize("name", ["pp2", "tp2 sp x pp2"])
def test_the_pipeline_has_the_bytes_of_a_real_export_of_the_whole_model(
    name: str, models: dict[str, str], pool: WorkerPool
) -> None:
    tree = tree_of(name, models)
    config = validate_config(tree)
    world_size = config.student.parallel.model_parallel_size
    spec = model_spec(HFFolder(config.student.model), config.student.parallel, "student")
    padding = (spec.dims.padded_vocab_size - spec.dims.vocab_size) * int(spec.hf.hidden_size) * 4  # bytes; a tied embedding
    flow = Flow("pp", Kind.BROADCAST)
    plan = StepPlanner(Planner(torch.device("cpu"), "local"), Lengths(), "local").plan(config, world_size)
    for real in pool.run(world_size, work_of, tree, LENGTHS, MICROBATCHES):
        assert real.whole[flow] == Amount(plan.spread[flow].calls, plan.spread[flow].payload + padding)
