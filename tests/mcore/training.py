"""One training step inside pool workers, and the batches that it takes: made so that errors of normalisation cannot hide."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_opd.config import OptimizerConfig, ParallelConfig
from megatron_opd.data import Multiples, context_slice, pack
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.checkpoint import load_checkpoint, start_checkpoint
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.monitoring.repetition import repeated_tokens
from megatron_opd.scoring.megatron import MegatronScorer
from megatron_opd.scoring.routed import RoutedScorer
from megatron_opd.types import (
    Aggregation,
    FrozenScores,
    LossTerms,
    Objective,
    PackedBatch,
    Prompt,
    Rollout,
    RunStopped,
    Scorer,
    Source,
    StepStats,
    TrainState,
)
from megatron_opd.validation import slices
from tests.mcore.worlds import build_student, open_layout

STABLE_OPD = Objective(
    opd="sampled",
    clip=0.2,
    beta=0.5,
    temperature=0.8,
    student_weight=1.0,
    teacher_weight=0.7,
    gold_weight=0.3,
    reference_kl=0.5,
)


@dataclass(frozen=True)
class Case:
    """One way to compute the same step."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    teacher: ParallelConfig | None = None  # None: the student's
    max_tokens: int = 256
    shuffle: int | None = None  # seed of another order of the rollouts
    objective: Objective = STABLE_OPD
    aggregation: Aggregation = "token"
    distributed: bool = True
    overlap: bool = False  # of gradient reduction and parameter gather with the passes
    offload: bool = False
    native: tuple[tuple[str, Any], ...] = ()  # TransformerConfig fields

    @property
    def frozen(self) -> ParallelConfig:
        return self.teacher or self.parallel.model_copy(update={"vpp": 1})

    @property
    def world_size(self) -> int:
        return self.parallel.model_parallel_size * (self.parallel.dp or 1)


def make_rollouts(seed: int, vocab_size: int) -> list[Rollout]:
    """Student rollouts of very unequal lengths, two teacher-written ones, and a single gold one: on one rank only."""
    rng = random.Random(seed)

    def rollout(source: Source, prompt: int, response: int) -> Rollout:
        def ids(count: int) -> tuple[int, ...]:
            return tuple(rng.randrange(1, vocab_size) for _ in range(count))  # transformers gives no gradient to pad, id 0

        log_probs = tuple(-4.0 + rng.random() for _ in range(response)) if source is Source.STUDENT else ()
        return Rollout(Prompt(str(rng.random()), ids(prompt), ""), source, ids(response), log_probs, "stop", 0, "")

    lengths = (1, 2, 40, 7, 25, 3, 11)
    student = [rollout(Source.STUDENT, rng.randrange(3, 9), length) for length in lengths]
    return [*student, rollout(Source.TEACHER, 5, 9), rollout(Source.TEACHER, 8, 2), rollout(Source.GOLD, 4, 13)]


def build_trainer(student: str, case: Case, layout: ParallelLayout, platform: Platform) -> Trainer:
    chunks, spec = build_student(student, case.parallel, layout, platform, native=dict(case.native))
    # Adam starts with the gradient's sign: at eps 1e-8 the rounding noise of a gradient near 0 moves a weight by a whole lr.
    optimizer = OptimizerConfig(
        lr=1e-2,
        warmup_steps=0,
        clip_grad=1.0,
        eps=1e-4,
        distributed=case.distributed,
        overlap_grad_reduce=case.overlap,
        overlap_param_gather=case.overlap and case.distributed,
        bucket_size=5000 if case.overlap else None,
    )
    vocab = spec.dims.vocab_size
    return Trainer(
        chunks,
        spec,
        layout,
        platform,
        case.objective,
        optimizer,
        total_steps=10,
        loss_vocab_size=vocab,
        stop_ids=(2,),
        chunk_tokens=7,
        offload=case.offload,
        overlap_k=3,
        overlap_every=2,
    )


def build_scorer(folder: str, case: Case, layout: ParallelLayout, platform: Platform, padded_vocab: int) -> MegatronScorer:
    frozen = FrozenModel(
        HFFolder(folder), "teacher", case.frozen, layout, platform, torch.float32, padded_vocab, offload=case.offload
    )
    return MegatronScorer(frozen)


def hf_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.export().whole()}


def train_steps(student: str, teacher: str, case: Case, steps: int) -> tuple[list[StepStats], dict[str, torch.Tensor]]:
    """``steps`` optimizer steps; the stats of each, and the weights after them by HF name."""
    trainer, stats = _train(student, teacher, case, range(steps))
    return stats, hf_weights(trainer)


def save_after(student: str, teacher: str, case: Case, steps: int, folder: str) -> str:
    """``steps`` optimizer steps and a checkpoint."""
    trainer, _ = _train(student, teacher, case, range(steps))
    return str(start_checkpoint(Path(folder), trainer, TrainState(step=steps), seed=1, keep=1).finish())


def save_and_lose(student: str, teacher: str, case: Case, steps: int, folder: str) -> tuple[str, bool]:
    """As :func:`save_after`, but the weights and the optimizer's state are lost before the checkpoint is complete."""
    trainer, _ = _train(student, teacher, case, range(steps))
    write = start_checkpoint(Path(folder), trainer, TrainState(step=steps), seed=1, keep=1)
    for parameter in trainer.parameters():
        parameter.data.zero_()
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.data.zero_()
    visible = any(Path(folder).glob("iter_*"))
    while not write.written():
        time.sleep(0.05)
    return str(write.finish()), visible


def resume_for_one_step(student: str, teacher: str, case: Case, checkpoint: str) -> StepStats:
    """The step after the checkpoint."""
    return _train(student, teacher, case, range(1), checkpoint)[1][0]


def _train(
    student: str, teacher: str, case: Case, steps: range, checkpoint: str | None = None
) -> tuple[Trainer, list[StepStats]]:
    layout, platform = open_layout(case.parallel)
    trainer = build_trainer(student, case, layout, platform)
    if checkpoint is not None:
        done = load_checkpoint(Path(checkpoint), trainer).step
        steps = range(done, done + len(steps))
    padded = trainer.spec.dims.padded_vocab_size
    teacher_scorer = build_scorer(teacher, case, layout, platform, padded)
    reference_scorer = build_scorer(student, case, layout, platform, padded)
    stats = []
    for step in steps:
        rollouts = make_rollouts(step, trainer.loss_vocab_size)
        shares = share(rollouts, case, layout)
        with trainer.off_device():
            teacher_scores, reference_scores = (_score(scorer, shares) for scorer in (teacher_scorer, reference_scorer))
        packed = in_order(rollouts, case)
        own = own_part(shares, layout)
        taken = trainer.step(own, teacher_scores, reference_scores, rollouts=packed, keep=range(len(packed)))
        of_rollouts = {rollouts.index(packed[place]): values for place, values in taken.responses.items()}
        stats.append(replace(taken, responses=of_rollouts))
    return trainer, stats


@dataclass(frozen=True)
class Measured:
    """Of two steps, each measured before it was taken."""

    measured: list[tuple[LossTerms[float], float]]  # with the largest engine gap, nats
    stepped: list[StepStats]
    weights: dict[str, torch.Tensor]  # in the end, by HF name
    parts: list[int]  # of each measurement


def measure_before_steps(
    student: str, teacher: str, case: Case, measured: Objective | None, at_once: int | None = None
) -> Measured:
    """``measured``: the objective of the measurements; None: there are none. ``at_once``: responses, about; None: all."""
    layout, platform = open_layout(case.parallel)
    trainer = build_trainer(student, case, layout, platform)
    padded = trainer.spec.dims.padded_vocab_size
    scorers = [build_scorer(teacher, case, layout, platform, padded) for _ in ("teacher", "reference")]
    found = Measured([], [], {}, [])
    multiple = Multiples.of([case.parallel, case.frozen]).microbatches
    for seed in range(2):
        rollouts = make_rollouts(seed, trainer.loss_vocab_size)
        shares = share(rollouts, case, layout)
        own = own_part(shares, layout)
        with trainer.off_device():
            of_teacher, of_reference = (_score(scorer, shares) for scorer in scorers)
            parts = []
            for each in slices(shares, len(rollouts), at_once or len(rollouts), multiple) if measured else ():
                own_teacher, own_reference = (_score(scorer, each) for scorer in scorers)
                assert measured is not None
                parts.append(trainer.measure(own_part(each, layout), own_teacher, own_reference, measured))
            if parts:
                terms = LossTerms(*(sum(values, 0.0) for values in zip(*(terms for terms, _ in parts), strict=True)))
                found.measured.append((terms, max(gap for _, gap in parts)))
                found.parts.append(len(parts))
        found.stepped.append(trainer.step(own, of_teacher, of_reference))
    found.weights.update(hf_weights(trainer))
    return found


def _score(scorer: Scorer, shares: Sequence[Sequence[PackedBatch]]) -> list[FrozenScores]:
    with scorer.on_device():
        return scorer.score(shares)


def gradients(student: str, teacher: str, case: Case) -> tuple[StepStats, dict[str, torch.Tensor]]:
    """The first step's gradients by HF name, before clipping; one data-parallel rank, no distributed optimizer."""
    layout, platform = open_layout(case.parallel)
    trainer = build_trainer(student, replace(case, distributed=False), layout, platform)
    padded = trainer.spec.dims.padded_vocab_size
    shares = share(make_rollouts(0, trainer.loss_vocab_size), case, layout)
    teacher_scores = build_scorer(teacher, case, layout, platform, padded).score(shares)
    reference_scores = build_scorer(teacher, case, layout, platform, padded).score(shares)
    trainer.optimizer.step = lambda: None  # the gradients, not the update
    stats = trainer.step(own_part(shares, layout), teacher_scores, reference_scores)
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]  # the mapping's own inverse brings them to HF names
    return stats, hf_weights(trainer)


def share(rollouts: Sequence[Rollout], case: Case, layout: ParallelLayout) -> list[list[PackedBatch]]:
    """Every data-parallel rank's micro-batches; a token counts as repeated where its response had it before."""
    rollouts = in_order(rollouts, case)
    return pack(
        rollouts,
        dp_size=layout.dp_size,
        max_tokens=case.max_tokens,
        aggregation=case.aggregation,
        multiples=Multiples.of([case.parallel, case.frozen]),
        repeated=repeated_tokens([rollout.response_ids for rollout in rollouts], n=1),
    )


def in_order(rollouts: Sequence[Rollout], case: Case) -> list[Rollout]:
    rollouts = list(rollouts)
    if case.shuffle is not None:
        random.Random(case.shuffle).shuffle(rollouts)
    return rollouts


def own_part(shares: Sequence[Sequence[PackedBatch]], layout: ParallelLayout) -> list[PackedBatch]:
    return [context_slice(batch, layout.cp_rank, layout.cp_size) for batch in shares[layout.dp_rank]]


def weights_after_a_skipped_step(student: str, teacher: str, parallel: ParallelConfig, skip: bool) -> tuple[list[bool], dict]:
    """A good step, then (``skip``) one with an infinite advantage on a single rank, then a good one."""
    case = Case(parallel)
    layout, platform = open_layout(parallel)
    trainer = build_trainer(student, case, layout, platform)
    scorer = build_scorer(teacher, case, layout, platform, trainer.spec.dims.padded_vocab_size)
    skipped = []
    for seed, bad in ((0, False), *(((1, True),) if skip else ()), (2, False)):
        shares = share(make_rollouts(seed, trainer.loss_vocab_size), case, layout)
        batches, scores = own_part(shares, layout), scorer.score(shares)
        if bad and layout.dp_rank == 0:
            old = batches[0].old_log_probs.where(batches[0].rollout_weights == 0, -torch.inf)
            batches[0] = replace(batches[0], old_log_probs=old)
        skipped.append(trainer.step(batches, scores, scores).skipped)
    return skipped, hf_weights(trainer)


def save_lost_weights(student: str, folder: str) -> str:
    """Save, then lose one weight and try to save again; the refusal."""
    trainer, _ = _train(student, student, Case(parallel=ParallelConfig(tp=2)), range(1))
    start_checkpoint(Path(folder), trainer, TrainState(step=1), seed=1, keep=1).finish()
    if trainer.layout.tp_rank == 1:
        trainer.parameters()[0].data[0, 0] = torch.nan
    try:
        start_checkpoint(Path(folder), trainer, TrainState(step=2), seed=1, keep=1).finish()
    except RunStopped as error:
        return str(error)
    return "saved"


@dataclass(frozen=True)
class Memory:
    """Elements, summed over this rank's tensors."""

    frozen_with_gradient: int
    frozen_gradient_buffers: int
    hidden_requires_grad: bool
    student_parameters: int
    optimizer_tensors: int


def memory_of_frozen_models(student: str, teacher: str) -> Memory:
    case = Case()
    layout, platform = open_layout(case.parallel)
    trainer = build_trainer(student, case, layout, platform)
    scorer = build_scorer(teacher, case, layout, platform, trainer.spec.dims.padded_vocab_size)
    shares = share(make_rollouts(0, trainer.loss_vocab_size), case, layout)
    scores = scorer.score(shares)
    trainer.step(own_part(shares, layout), scores, scores)
    frozen = scorer.model.parameters()
    return Memory(
        frozen_with_gradient=sum(p.numel() for p in frozen if p.requires_grad or p.grad is not None),
        frozen_gradient_buffers=sum(p.numel() for p in frozen if hasattr(p, "main_grad")),
        hidden_requires_grad=any(score.hidden is None or score.hidden.requires_grad for score in scores),
        student_parameters=sum(p.numel() for p in trainer.parameters()),
        optimizer_tensors=sum(tensor.numel() for tensor in trainer.optimizer_tensors()),
    )


def opd_of_routed_teachers(student: str, teachers: dict[str, str], case: Case) -> tuple[float, list[float]]:
    """The OPD term with each prompt's own teacher; and, teacher by teacher, of its prompts alone, scored by a single scorer."""
    layout, platform = open_layout(case.parallel)
    trainer = build_trainer(student, case, layout, platform)
    trainer.optimizer.step = lambda: None
    padded = trainer.spec.dims.padded_vocab_size
    scorers = {name: build_scorer(folder, case, layout, platform, padded) for name, folder in teachers.items()}
    names = sorted(teachers)
    rollouts = [
        replace(rollout, prompt=replace(rollout.prompt, teacher=names[i % len(names)]))
        for i, rollout in enumerate(make_rollouts(0, trainer.loss_vocab_size))
    ]
    shares = share(rollouts, case, layout)
    batches = own_part(shares, layout)
    reference = build_scorer(student, case, layout, platform, padded).score(shares)
    routed = trainer.step(batches, RoutedScorer(scorers).score(shares), reference).terms.opd
    parts = []
    for name in names:
        own = [replace(batch, rollout_weights=batch.rollout_weights * (batch.teacher == name)) for batch in batches]
        parts.append(trainer.step(own, scorers[name].score(shares), reference).terms.opd)
    return routed, parts


def step_with_a_teacher_that_became_uniform(student: str, teacher: str) -> str:
    """The message of the second step, before which the teacher's head became zeros."""
    case = Case(ParallelConfig(dp=2))
    layout, platform = open_layout(case.parallel)
    trainer = build_trainer(student, case, layout, platform)
    padded = trainer.spec.dims.padded_vocab_size
    of_teacher, of_reference = (build_scorer(folder, case, layout, platform, padded) for folder in (teacher, student))
    shares = share(make_rollouts(0, trainer.loss_vocab_size), case, layout)
    assert not trainer.step(own_part(shares, layout), of_teacher.score(shares), of_reference.score(shares)).skipped
    head = of_teacher.model.lm_head
    assert head is not None
    head.zero_()
    try:
        trainer.step(own_part(shares, layout), of_teacher.score(shares), of_reference.score(shares))
    except RunStopped as error:
        return str(error)
    return "no error"


def step_with_a_lost_frozen_model(student: str, teacher: str, model: str) -> str:
    """The message of a step in which a NaN hides among the weights of a frozen model, on one of two data-parallel ranks."""
    case = Case(ParallelConfig(dp=2))
    layout, platform = open_layout(case.parallel)
    trainer = build_trainer(student, case, layout, platform)
    padded = trainer.spec.dims.padded_vocab_size
    scorers = {name: build_scorer(teacher, case, layout, platform, padded) for name in ("teacher", "reference")}
    head = scorers[model].model.lm_head
    if layout.dp_rank == 1 and head is not None:
        head[5] = torch.nan
    shares = share(make_rollouts(0, trainer.loss_vocab_size), case, layout)
    try:
        trainer.step(own_part(shares, layout), scorers["teacher"].score(shares), scorers["reference"].score(shares))
    except RunStopped as error:
        return str(error)
    return "no error"
