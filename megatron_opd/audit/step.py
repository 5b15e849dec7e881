"""One training step of the run's models, reduced in depth and width, in its own layout against transformers in fp64."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.audit.dense_step import DenseModel, DenseModels, DenseStep, dense_step, with_old_log_probs
from megatron_opd.audit.reduced_run import STOP_IDS, ReducedRun, build_reduced_run, write_reduced_models
from megatron_opd.audit.report import Check, disagreement, ratio
from megatron_opd.audit.rollouts import LONGEST_SEQUENCE, fewer_than_ranks, make_rollouts
from megatron_opd.config import Config, ParallelConfig
from megatron_opd.data.packing import Multiples, pack
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.platform import Platform
from megatron_opd.preflight import Inputs
from megatron_opd.types import PackedBatch, Rollout

_TOLERANCE = 2e-5  # of fp32 through whole models
_SMALL = 1e-3  # of the whole gradient's norm: parameters whose own is below are measured by this
_LARGEST_K = 32
_WHOLE = 4096  # tokens: all of a rank's sequences in one micro-batch

Pack = Callable[..., list[list[PackedBatch]]]  # with pack's signature


@dataclass(frozen=True)
class _Step:
    """The same global batch in our step and in the dense one."""

    config: Config
    run: ReducedRun
    dense: DenseModels
    vocab_size: int
    pack: Pack

    def rollouts(self) -> list[Rollout]:
        objective = self.config.objective
        rollouts = make_rollouts(objective, self.vocab_size, STOP_IDS, tuple(self.dense.teachers) or ("",), seed=0)
        return with_old_log_probs(rollouts, self.dense.student, objective, self.vocab_size)

    def truth(self, rollouts: Sequence[Rollout]) -> DenseStep:
        objective, aggregation = self.config.objective, self.config.loss.aggregation
        return dense_step(self.dense, rollouts, objective, aggregation, self.vocab_size, STOP_IDS)

    def error(self, truth: DenseStep, rollouts: Sequence[Rollout], max_tokens: int) -> float:
        """Of the loss and of every parameter's gradient, the largest. Collective over the world."""
        shares = self.pack(
            rollouts,
            dp_size=self.run.trainer.layout.dp_size,
            max_tokens=max_tokens,
            aggregation=self.config.loss.aggregation,
            multiples=Multiples.of(self.config.layouts.values(), self.config.row_multiple),
        )
        loss, gradients = self.run.gradients(shares)
        least = _SMALL * _norm(list(truth.gradients.values()))
        errors = [ratio(abs(loss - truth.loss), truth.scale)]
        for name, expected in truth.gradients.items():
            errors.append(ratio(_norm([gradients[name] - expected]), max(_norm([expected]), least)))
        return max(errors)


def audit_step(config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout, pack: Pack = pack) -> list[Check]:
    """Value and gradients of a step, in fp32 and however the global batch is cut. No weight moves.

    Collective over the world; the errors are this rank's. Everywhere by the local layer spec: Transformer Engine multiplies
    fp32 matrices in TF32.
    """
    inputs = _with_teachers_here(config, inputs)
    config = _with_smaller_k(_without_servers(config))
    with tempfile.TemporaryDirectory(prefix="megatron-opd-audit-") as folder:
        models = write_reduced_models(config, inputs, Path(folder))
        run = build_reduced_run(config, models, replace(platform, transformer_engine=False), layout)
        dense = DenseModels(
            student=DenseModel(models.student),
            teachers={name: DenseModel(each) for name, each in models.teachers.items()},
            reference=DenseModel(models.reference) if models.reference else None,
        )
    step = _Step(config, run, dense, models.vocab_size, pack)
    rollouts = step.rollouts()
    truth = step.truth(rollouts)
    compared = f"loss and {len(truth.gradients)} gradients, fp32, with transformers"

    def check(name: str, how: str, error: float) -> Check:
        return Check(name, f"{compared}; {how}", error, _TOLERANCE)

    checks = [
        check(
            f"training step, {_axes(config, dist.get_world_size())}",
            "one micro-batch a rank",
            step.error(truth, rollouts, _WHOLE),
        )
    ]
    if layout.tp_size > 1:
        error = max((disagreement(each, layout.tp) for each in run.trainer.replicated_gradients()), default=0.0)
        checks.append(Check("replicated gradients", "those of the norms on all TP ranks", error, 0.0))
    multiple = Multiples.of(config.layouts.values(), config.row_multiple).tokens
    few = -(-LONGEST_SEQUENCE // multiple) * multiple
    shuffled = random.Random(1).sample(rollouts, len(rollouts))
    checks.append(check("micro-batch split", f"micro-batches of {few} tokens", step.error(truth, rollouts, few)))
    checks.append(check("packing order", "other order of the rollouts", step.error(truth, shuffled, few)))
    if layout.dp_size > 1:
        uneven = fewer_than_ranks(rollouts, layout.dp_size)
        checks.append(check("unequal ranks", "a rank with nothing but filler", step.error(step.truth(uneven), uneven, _WHOLE)))
    return checks


def _with_teachers_here(config: Config, inputs: Inputs) -> Inputs:
    """A teacher behind servers may have any architecture; one like the student takes its place."""
    served = config.served_teachers
    teachers = {name: inputs.student if name in served else folder for name, folder in inputs.teachers.items()}
    return replace(inputs, teachers=teachers)


def _without_servers(config: Config) -> Config:
    """Hidden states in place of a server's scores, which :func:`audit_loss` has."""
    here: dict[str, Any] = {"backend": "megatron", "parallel": None, "urls": [], "api_key_file": None}
    own = {name: each.model_copy(update=here if each.backend == "sglang" else {}) for name, each in config.all_teachers.items()}
    return config.model_copy(update={"teacher": own[""]} if "" in own else {"teachers": own})


def _with_smaller_k(config: Config) -> Config:
    """What top-k keeps must be fewer than the reduced vocabulary has."""
    return config.model_copy(update={"loss": config.loss.model_copy(update={"k": min(config.loss.k, _LARGEST_K)})})


def _axes(config: Config, world_size: int) -> str:
    """Of the student, and of the frozen models where they have another layout."""
    student = config.layouts["student"]
    shared = student.model_copy(update={"vpp": 1})
    others = {section: layout for section, layout in config.layouts.items() if layout not in (student, shared)}
    own = [f"{section} {_sizes(layout, world_size)}" for section, layout in others.items()]
    return "; ".join([_sizes(student, world_size), *own])


def _sizes(parallel: ParallelConfig, world_size: int) -> str:
    sizes = {"TP": parallel.tp, "CP": parallel.cp, "PP": parallel.pp, "VPP": parallel.vpp, "EP": parallel.ep}
    sizes["DP"] = world_size // parallel.model_parallel_size
    names = [
        f"{axis} {size}{' + SP' if axis == 'TP' and parallel.sequence_parallel else ''}"
        for axis, size in sizes.items()
        if size > 1
    ]
    return " x ".join(names) or "one rank"


def _norm(tensors: Sequence[Tensor]) -> float:
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt().item()
