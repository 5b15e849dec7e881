"""The loss at the run's own vocabulary against the dense oracle, on every rank of a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_opd.audit import oracle
from megatron_opd.audit.dense import DenseLoss, dense_loss
from megatron_opd.audit.problem import CHUNK_TOKENS, Problem, log_probs, make_problem, token_scores
from megatron_opd.audit.report import Check, disagreement, largest, ratio, relative_error
from megatron_opd.losses import distillation_loss
from megatron_opd.types import LossOutput, Objective

_TOLERANCE = 1e-5  # of fp32
_BF16_FACTOR = 2.0  # on the error of the dense computation with bf16 inputs and fp32 statistics

LossFunction = Callable[..., LossOutput]  # with distillation_loss's signature


@dataclass(frozen=True)
class LossSetting:
    """How the run calls its loss."""

    objective: Objective
    vocab_size: int  # ids that student, teacher and reference share
    padded_vocab_size: int  # rows of the student's LM head, over all ranks of ``group``
    stop_ids: tuple[int, ...]
    chunk_tokens: int | None
    group: ProcessGroup  # tensor parallel
    device: torch.device
    served: bool = False  # the teacher is known by the log-probabilities that a server gives

    @property
    def tp_size(self) -> int:
        return self.group.size()

    def problem(self, seed: int) -> Problem:
        return make_problem(self.objective, self.vocab_size, self.padded_vocab_size, self.stop_ids, seed)

    def rows(self, whole: Tensor) -> Tensor:
        """[padded V, ...] → this rank's [V/tp, ...]."""
        return whole.chunk(self.tp_size)[self.group.rank()]

    def describe(self) -> str:
        shards = f" in {self.tp_size} shards" if self.tp_size > 1 else ""
        return f"{self.vocab_size:,} ids of {self.padded_vocab_size:,} rows{shards}"


class Result(NamedTuple):
    """One evaluation of the loss under audit, on this rank."""

    loss: Tensor  # scalar
    log_probs: Tensor  # [T]
    hidden_grad: Tensor  # [T, H]
    head_grad: Tensor  # [V/tp, H]


def audit_loss(setting: LossSetting, dtype: torch.dtype, loss: LossFunction = distillation_loss) -> list[Check]:
    """The properties of ``loss`` that the setting has, in fp32; value and gradients also in ``dtype``, where that is bf16.

    Collective over the setting's group; the errors are this rank's.
    """
    objective = setting.objective
    problem = setting.problem(seed=0)
    truth = dense_loss(problem, objective, torch.float64)
    ours = _evaluate(loss, setting, problem, torch.float32)
    checks = _value_and_gradients(setting, ours, truth, "fp32", [_TOLERANCE] * 3)
    if dtype is torch.bfloat16:
        tolerances = _bf16_tolerances(dense_loss(problem, objective, dtype), truth)
        checks += _value_and_gradients(setting, _evaluate(loss, setting, problem, dtype), truth, "bf16", tolerances)
    checks += _padded_vocabulary(setting, loss, ours)
    if objective.needs_teacher and objective.merge_stop_class:
        checks += _stop_class(setting, loss)
    if objective.needs_teacher or objective.needs_reference:
        checks.append(_equal_models(setting, loss, problem, truth))
    if setting.tp_size > 1:
        error = max(disagreement(each, setting.group) for each in (ours.loss, ours.log_probs, ours.hidden_grad))
        checks.append(Check("replicated values", "loss, log-probabilities, hidden gradient on all TP ranks", error, 0.0))
    return checks


def _evaluate(loss: LossFunction, setting: LossSetting, problem: Problem, dtype: torch.dtype) -> Result:
    """As the trainer calls it: a model that the objective does not need is not there."""

    def local(model: oracle.Model) -> oracle.Model:
        hidden, head = model
        return hidden.to(setting.device, dtype), setting.rows(head).to(setting.device, dtype)

    objective = setting.objective
    hidden, head = (each.requires_grad_() for each in local(problem.student))
    teacher = local(problem.teacher) if objective.needs_teacher and not setting.served else (None, None)
    reference = local(problem.reference) if objective.needs_reference else (None, None)
    output = loss(
        hidden,
        head,
        problem.batch,
        objective,
        teacher_hidden=teacher[0],
        teacher_head=teacher[1],
        **({"teacher_scores": token_scores(problem, objective)} if setting.served else {}),
        reference_hidden=reference[0],
        reference_head=reference[1],
        vocab_size=problem.vocab_size,
        group=setting.group,
        stop_ids=problem.stop_ids,
        chunk_tokens=setting.chunk_tokens,
    )
    output.loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return Result(output.loss.detach(), output.log_probs.detach(), hidden.grad, head.grad)


def _errors(
    setting: LossSetting, ours: Result, truth: DenseLoss, *, target: DenseLoss | None = None
) -> tuple[float, float, float]:
    """Of the value, the hidden gradient, and the LM head's over its true rows: distances to ``target``, relative to ``truth``.

    ``target`` None: ``truth``. The value is relative to its tokens' parts, which may cancel in it.
    """
    target = target or truth
    rows = len(ours.head_grad)
    true_rows = slice(setting.group.rank() * rows, (setting.group.rank() + 1) * rows)
    expected, scale = target.head_grad[true_rows], truth.head_grad[true_rows]
    return (
        ratio(abs(float(ours.loss) - float(target.loss)), float(truth.tokens.abs().sum())),
        relative_error(ours.hidden_grad, target.hidden_grad, scale=truth.hidden_grad),
        relative_error(ours.head_grad[: len(expected)], expected, scale=scale, group=setting.group),
    )


def _value_and_gradients(
    setting: LossSetting, ours: Result, truth: DenseLoss, dtype: str, tolerances: list[float]
) -> list[Check]:
    names = ("loss value", "loss gradient, hidden states", "loss gradient, LM head")
    compared = f"{setting.objective.opd} with the dense oracle, {setting.describe()}"
    errors = _errors(setting, ours, truth)
    return [Check(f"{name}, {dtype}", compared, *each) for name, *each in zip(names, errors, tolerances, strict=True)]


def _bf16_tolerances(rounded: DenseLoss, truth: DenseLoss) -> list[float]:
    """From the dense computation's own errors; the value's by tokens, because their sum may come out right by luck."""
    value = ratio(float((rounded.tokens - truth.tokens).abs().sum()), float(truth.tokens.abs().sum()))
    hidden = relative_error(rounded.hidden_grad, truth.hidden_grad)
    head = relative_error(rounded.head_grad, truth.head_grad)
    return [_BF16_FACTOR * each for each in (value, hidden, head)]


def _padded_vocabulary(setting: LossSetting, loss: LossFunction, ours: Result) -> Iterator[Check]:
    """Fewer shared ids than rows; with TP the last rank holds nothing but padding."""
    rows = setting.padded_vocab_size
    before_last = rows - rows // setting.tp_size if setting.tp_size > 1 else rows
    fewer = _in_chunks(setting, vocab_size=max(min(before_last, setting.vocab_size) - 3, 2), stop_ids=())
    problem = fewer.problem(seed=1)
    result = _evaluate(loss, fewer, problem, torch.float32)
    error = max(_errors(fewer, result, dense_loss(problem, fewer.objective, torch.float64)))
    yield Check("padded vocabulary", f"with the dense oracle, {fewer.describe()}", error, _TOLERANCE)
    error = max(largest(_padding(setting, ours)), largest(_padding(fewer, result)))
    yield Check("padding rows", "their gradient with 0, where their weights are NaN", error, 0.0)


def _in_chunks(setting: LossSetting, vocab_size: int, stop_ids: tuple[int, ...]) -> LossSetting:
    """Another vocabulary, and several chunks, which so few tokens are not by themselves."""
    objective = replace(setting.objective, k=min(setting.objective.k, vocab_size))
    return replace(setting, objective=objective, vocab_size=vocab_size, stop_ids=stop_ids, chunk_tokens=CHUNK_TOKENS)


def _padding(setting: LossSetting, ours: Result) -> Tensor:
    """The gradient of this rank's rows beyond the vocabulary."""
    rows = len(ours.head_grad)
    true_rows = min(max(setting.vocab_size - setting.group.rank() * rows, 0), rows)
    return ours.head_grad[true_rows:]


def _stop_class(setting: LossSetting, loss: LossFunction) -> Iterator[Check]:
    """Two end tokens, with TP on the first and the last rank; and one end token, of which a class must change nothing."""
    rows = setting.padded_vocab_size
    ends = (rows // setting.tp_size // 2, rows - 5)
    two = _in_chunks(setting, vocab_size=rows - 3, stop_ids=ends)
    problem = two.problem(seed=2)
    truth = dense_loss(problem, two.objective, torch.float64)
    error = max(_errors(two, _evaluate(loss, two, problem, torch.float32), truth))
    where = " in the first and last shard" if setting.tp_size > 1 else ""
    yield Check("stop class", f"with the dense oracle, end tokens {ends[0]:,} and {ends[1]:,}{where}", error, _TOLERANCE)
    one, none = (_evaluate(loss, two, replace(problem, stop_ids=ids), torch.float32) for ids in (ends[:1], ()))
    error = max(largest(a - b) for a, b in zip(one, none, strict=True))
    yield Check("stop class of one id", "value and gradients with those without a class", error, 0.0)


def _equal_models(setting: LossSetting, loss: LossFunction, problem: Problem, truth: DenseLoss) -> Check:
    """A teacher, a reference and an old policy that are the student leave nothing to learn."""
    objective = setting.objective
    if objective.off_policy == "cross_entropy":
        objective = replace(objective, teacher_weight=0.0, gold_weight=0.0)
    old = oracle.pick(log_probs(problem.student, objective, problem.vocab_size), problem.batch.labels)
    batch = replace(problem.batch, old_log_probs=old.float().where(problem.batch.rollout_weights > 0, 0.0))
    same = replace(problem, teacher=problem.student, reference=problem.student, batch=batch)
    ours = _evaluate(loss, replace(setting, objective=objective), same, torch.float32)
    error = max(_errors(setting, ours, truth, target=truth.zeros()))
    return Check("student = teacher", "value and gradients with 0, relative to those of unlike models", error, _TOLERANCE)
