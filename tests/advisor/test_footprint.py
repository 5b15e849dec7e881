"""The advisor's figures against bytes that real runs on gloo allocate, rank by rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.config import Config
from megatron_opd.config_file import validate_config
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.footprint import (
    Kernels,
    PassesBytes,
    Rank,
    Workload,
    chunk_passes,
    frozen_bytes,
    head_bytes,
    loss_chunk_bytes,
    scheduled,
    state_bytes,
)
from megatron_opd.mcore.model import ModelSpec, model_spec
from tests.advisor.real import RealBytes, step_of
from tests.conftest import Table
from tests.tiny_models import Arch, make_model
from tests.worker_pool import WorkerPool

LENGTHS, MICROBATCHES = (64, 48, 16), 8
SP = {"sequence_parallel": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}


@dataclass(frozen=True)
class Case:
    parallel: dict[str, Any]
    model: str = "tied"
    dtype: str = "float32"
    teacher: dict[str, Any] | None = None  # its layout; None: the student's
    native: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    def tree(self, models: dict[str, str]) -> dict[str, Any]:
        return {
            "run": {"name": "counted"},
            "student": {
                "model": models[self.model],
                "dtype": self.dtype,
                "parallel": self.parallel,
                "megatron": self.native,
            },
            "teacher": {"model": models["teacher"], "parallel": self.teacher},
            "data": {"prompts": "none.jsonl"},
            "mixture": {"student": 1, "gold": 0},
            "loss": {"opd": "reverse_kl", "reference_kl": 0.5},
            "optimizer": self.optimizer,
        }


CASES = {
    "tp2 fp32": Case({"tp": 2}),
    "tp2 sp bf16": Case({"tp": 2, **SP}, dtype="bfloat16"),
    "pp2 fp32": Case({"pp": 2}, teacher={"tp": 2}),
    "pp2 vpp2 bf16": Case({"pp": 2, "vpp": 2}, dtype="bfloat16"),
    "dp2 bf16": Case({"dp": 2}, model="untied", dtype="bfloat16", teacher={"pp": 2}),
    "dp2 fp32": Case({"dp": 2}, model="untied"),
    "cp2 bf16": Case({"cp": 2}, model="untied", dtype="bfloat16"),
    "tp2 x dp2 bf16": Case({"tp": 2, "dp": 2}, model="untied", dtype="bfloat16"),
    "tp2 full recompute": Case({"tp": 2}, model="untied", native=FULL),
    "dp2 selective recompute": Case({"dp": 2}, model="untied", dtype="bfloat16", native=SELECTIVE),
    "dp2 without distributed optimizer": Case({"dp": 2}, dtype="bfloat16", optimizer={"distributed": False}),
    "dp2 in buckets": Case(
        {"dp": 2}, model="untied", dtype="bfloat16", optimizer={"overlap_grad_reduce": True, "bucket_size": 5000}
    ),
    "ep2 bf16": Case({"ep": 2, "dp": 2}, model="experts", dtype="bfloat16", teacher={}),
    "tp2 sp gemma3 bf16": Case({"tp": 2, **SP}, model="gemma3", dtype="bfloat16"),
    "tp2 sp x ep2 fp32": Case({"tp": 2, "ep": 2, "dp": 2, **SP}, model="experts", teacher={}),
    "latent attention, ep2 fp32": Case({"ep": 2, "dp": 2}, model="latent", teacher={}),
}
SLOW = (
    "dp2 bf16",
    "cp2 bf16",
    "dp2 selective recompute",
    "tp2 x dp2 bf16",
    "dp2 fp32",
    "dp2 without distributed optimizer",
    "tp2 sp x ep2 fp32",
    "tp2 sp gemma3 bf16",
    "dp2 in buckets",
    "latent attention, ep2 fp32",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    kinds: dict[str, tuple[Arch, dict[str, Any]]] = {
        "tied": ("qwen3", {"tied": True, "layers": 4, "hidden": 64}),
        "untied": ("qwen2", {"layers": 6, "hidden": 64}),
        "experts": ("qwen3_moe", {"layers": 4, "hidden": 64}),
        "gemma3": ("gemma3", {"tied": True, "layers": 4, "hidden": 64, "sliding_window": 24, "sliding_window_pattern": 2}),
        "latent": ("deepseek_v3", {"layers": 4, "hidden": 64}),
        "teacher": ("llama", {"layers": 4}),
    }
    for name, (arch, sizes) in kinds.items():
        make_model(folder / name, arch, **sizes)
    return {name: str(folder / name) for name in kinds}


def passes_bytes(
    config: Config, spec: ModelSpec, rank: Rank, workload: Workload, kernels: Kernels, *, whole: bool = False
) -> PassesBytes:
    passes = chunk_passes(config, spec, rank, workload.lengths, kernels, whole=whole)
    return scheduled(config, rank, passes, workload.microbatches)


def specs(config: Config) -> tuple[ModelSpec, ModelSpec]:
    assert config.teacher is not None
    return (
        model_spec(HFFolder(config.student.model), config.student.parallel, "student"),
        model_spec(HFFolder(config.teacher.model), config.layouts["teacher"], "teacher"),
    )


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_figures_are_those_of_a_real_run(name: str, models: dict[str, str], pool: WorkerPool, table: Table) -> None:
    """Parameters, gradients, optimizer and frozen weights to the byte; activations and the step's whole peak within 10 %."""
    tree = CASES[name].tree(models)
    config = validate_config(tree)
    parallel = config.student.parallel
    world_size = parallel.model_parallel_size * (parallel.dp or 1)
    reals: list[RealBytes] = pool.run(world_size, step_of, tree, LENGTHS, MICROBATCHES)
    student, teacher = specs(config)
    workload = Workload(LENGTHS, MICROBATCHES)
    ratios = []
    for number, real in enumerate(reals):
        rank = Rank(number, world_size)
        state = state_bytes(config, student, rank)
        frozen = frozen_bytes(config, teacher, "teacher", rank, LENGTHS, "local")
        assert (state.parameters, state.gradients, state.optimizer) == (real.parameters, real.gradients, real.optimizer)
        assert (frozen.weights, head_bytes(config, student, teacher, rank)) == (real.frozen, real.head)
        passes = passes_bytes(config, student, rank, workload, "local")
        assert passes.activations == pytest.approx(real.saved, rel=0.1)
        loss = 0
        if number * parallel.pp // world_size == parallel.pp - 1:
            loss = loss_chunk_bytes(config, student, rank, workload, (32, 32), 101, torch.device("cpu"))
        step = passes.held + max(passes.recomputed + passes.working, loss)
        assert step == pytest.approx(real.live, rel=0.1)
        ratios += [passes.activations / real.saved, step / real.live]
    table.add("Advisor against real runs: activations and peak of a step", name, f"{min(ratios):.3f} to {max(ratios):.3f}")


def test_masters_and_moments_split_the_optimizer(models: dict[str, str]) -> None:
    """bf16 on one rank: three fp32 numbers for each parameter, of which the first step makes two."""
    config = validate_config(Case({}, model="untied", dtype="bfloat16").tree(models))
    student, _ = specs(config)
    state = state_bytes(config, student, Rank(0, 1))
    elements = sum(math.prod(shape) for shape in HFFolder(models["untied"]).shapes.values())
    padding = 2 * (128 - 101) * 64  # rows of the embedding and of the head
    assert state.masters == 4 * (elements + padding)
    assert state.moments == 2 * state.masters


@pytest.mark.parametrize("native", [{}, FULL, {**FULL, "recompute_num_layers": 2}, SELECTIVE], ids=str)
@pytest.mark.parametrize("kernels", ["local", "fused"])
def test_a_few_layers_stand_for_all(kernels: Kernels, native: dict[str, Any], models: dict[str, str], tmp_path: Path) -> None:
    make_model(tmp_path / "deep", "llama", layers=16)
    config = validate_config(Case({"tp": 2, "pp": 2, **SP}, native=native).tree({**models, "tied": str(tmp_path / "deep")}))
    student, _ = specs(config)
    for number in (0, 2):  # of either stage
        quick, whole = (
            passes_bytes(config, student, Rank(number, 4), Workload(LENGTHS, 4), kernels, whole=whole)
            for whole in (False, True)
        )
        assert quick == whole


def test_fused_kernels_keep_less_and_context_parallelism_halves_it(models: dict[str, str]) -> None:
    workload = Workload((64, 64), 1)

    def held(parallel: dict[str, Any], kernels: Kernels) -> int:
        config = validate_config(Case(parallel, model="untied", dtype="bfloat16").tree(models))
        student, _ = specs(config)
        return passes_bytes(config, student, Rank(0, 2), workload, kernels).held

    assert held({"dp": 2}, "fused") < 0.75 * held({"dp": 2}, "local")
    assert held({"cp": 2}, "fused") == pytest.approx(0.5 * held({"dp": 2}, "fused"), rel=0.05)


def test_interleaving_holds_what_megatron_warms_up(models: dict[str, str]) -> None:
    """In units of one chunk's micro-batch, layers alone: 1F1B holds pp - rank, the interleaved schedule its warm-up and one."""

    def held(parallel: dict[str, Any], rank: int, microbatches: int) -> int:
        config = validate_config(Case(parallel, model="tied").tree(models))
        student, _ = specs(config)
        return passes_bytes(config, student, Rank(rank, 2), Workload(LENGTHS, microbatches), "local").held

    assert held({"pp": 2}, 0, 8) == 2 * held({"pp": 2}, 0, 1)
    assert held({"pp": 2}, 1, 8) == held({"pp": 2}, 1, 1)
    # Stage 0 warms up with (2 - 0 - 1) * 2 + (2 - 1) * 2 = 4 of its chunks' passes, so five are in flight.
    assert held({"pp": 2, "vpp": 2}, 0, 8) / held({"pp": 2, "vpp": 2}, 0, 2) == pytest.approx(5 / 4, rel=0.02)
