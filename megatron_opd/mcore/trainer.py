"""The student on Megatron: DDP, distributed optimizer, learning-rate schedule, and one optimizer step of the objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor
from torch.nn import Parameter

from megatron_opd.config import OptimizerConfig
from megatron_opd.losses import distillation_loss, student_support, top_k_overlap
from megatron_opd.mcore.fp8_weights import memory
from megatron_opd.mcore.hf_export import Export
from megatron_opd.mcore.model import HiddenStateModel, ModelSpec
from megatron_opd.mcore.offload import Waiting, offloaded
from megatron_opd.mcore.optimizer import build_optimizer, build_schedule
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.response_values import gather_response_values
from megatron_opd.mcore.schedule import forward_backward, forward_only
from megatron_opd.types import (
    FrozenScores,
    LossOutput,
    LossTerms,
    Objective,
    PackedBatch,
    Rollout,
    RunStopped,
    StepStats,
)

_UNIFORM = 1e-4  # ours: so near to ln V, relative, no model comes that has learned anything; bf16 errs by less than it


class Trainer:
    """Owns the student's parameters, gradients and optimizer state."""

    def __init__(
        self,
        chunks: Sequence[HiddenStateModel],
        spec: ModelSpec,
        layout: ParallelLayout,
        platform: Platform,
        objective: Objective,
        optimizer: OptimizerConfig,
        *,
        total_steps: int,
        loss_vocab_size: int,
        stop_ids: tuple[int, ...],
        chunk_tokens: int | None,
        offload: bool = False,
        overlap_k: int = 0,
        overlap_every: int = 1,
    ) -> None:
        """``loss_vocab_size``: ids that student, teacher and reference share; rows beyond it take no part in the loss.

        Args:
            stop_ids: the end tokens of student and teacher.
            offload: :meth:`off_device` does what it says.
            overlap_k: likeliest tokens that are compared with the teacher's; 0: none are.
            overlap_every: positions from one such comparison to the next in a sequence.
        """
        self.chunks, self.spec, self.layout, self.objective = tuple(chunks), spec, layout, objective
        self.platform, self.offload = platform, offload
        self._waiting: Waiting | None = None  # the weights, within off_device
        self.loss_vocab_size, self.stop_ids, self.chunk_tokens = loss_vocab_size, stop_ids, chunk_tokens
        self.overlap_k, self.overlap_every = overlap_k, overlap_every
        self.ddp = [
            DistributedDataParallel(
                chunk.config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=optimizer.distributed,
                    overlap_grad_reduce=optimizer.overlap_grad_reduce,
                    overlap_param_gather=optimizer.overlap_param_gather,
                    bucket_size=optimizer.bucket_size,
                    fp8_param_gather=chunk.config.fp8_param,
                ),
                chunk,
                disable_bucketing=number > 0,  # as in Megatron-LM: only the first chunk's reduction is on the critical path
                pg_collection=layout.groups,
            )
            for number, chunk in enumerate(self.chunks)
        ]
        config = self.chunks[0].config  # the chunks share it
        if not config.fp8_param:  # whose tensors no collective fills in place; every rank has read the same weights
            for ddp in self.ddp:
                ddp.broadcast_params()
        self.optimizer = build_optimizer(self.ddp, optimizer)
        self.schedule = build_schedule(self.optimizer, optimizer, total_steps)
        config.finalize_model_grads_func = sum_gradients
        config.grad_scale_func = self.optimizer.scale_loss
        self.gathers_late = optimizer.overlap_param_gather
        if optimizer.overlap_grad_reduce:  # only after the last micro-batch
            no_sync = [ddp.no_sync for ddp in self.ddp]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    @property
    def device(self) -> torch.device:
        return self.platform.device

    def parameters(self) -> list[Parameter]:
        """Of this rank's chunks."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def step(
        self,
        batches: Sequence[PackedBatch],
        teacher: Sequence[FrozenScores],
        reference: Sequence[FrozenScores],
        *,
        objective: Objective | None = None,
        rollouts: Sequence[Rollout] = (),
        keep: Collection[int] = (),
    ) -> StepStats:
        """One optimizer step on the global batch whose share of this data-parallel rank is ``batches``, with their scores.

        ``objective``: with the coefficients of this step; None: the run's. ``rollouts`` are what the batches were packed from,
        of which those at the places ``keep`` are reported token by token.

        A non-finite loss or gradient norm leaves weights, optimizer and learning rate as they were (``skipped``). Raises
        RunStopped, on all ranks, where a frozen model's logits are not finite: no later step could be better.
        """
        outputs = self.accumulate_gradients(batches, teacher, reference, objective)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())  # over the model-parallel groups
        *sums, tokens, engine_gap_max = self._reduce(batches, outputs).tolist()
        terms = LossTerms(*sums)
        _check_frozen_models(terms, self.loss_vocab_size)
        finite = math.isfinite(grad_norm) and all(math.isfinite(each) for each in (*terms, engine_gap_max))
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if finite:
            self.optimizer.step()
            self.schedule.step(1)
        return StepStats(
            terms=terms,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            skipped=not finite,
            engine_gap_max=engine_gap_max,
            tokens=round(tokens),
            responses=gather_response_values(rollouts, keep, batches, outputs, self.layout) if keep else {},
        )

    def accumulate_gradients(
        self,
        batches: Sequence[PackedBatch],
        teacher: Sequence[FrozenScores],
        reference: Sequence[FrozenScores],
        objective: Objective | None = None,
    ) -> list[LossOutput]:
        """The global batch's gradients in the DDP buffers, summed over the data-parallel ranks; losses on the last stage."""
        for ddp in self.ddp:
            ddp.train()
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        objective = objective or self.objective
        losses = [self._loss(objective, *each) for each in zip(batches, teacher, reference, strict=True)]
        return forward_backward(self.ddp, _forward, batches, losses, self.layout)

    def complete_parameters(self) -> None:
        """Every rank gets what the other data-parallel ranks updated, where that would wait for the next forward.

        Collective over the data-parallel group; before weights are exported or saved.
        """
        if self.gathers_late:
            for ddp in self.ddp:
                ddp.start_param_sync(force_sync=True)

    def label_log_probs(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """[T/cp] nats for each micro-batch, at temperature 1, of its labels with a gold weight; last stage only.

        Over the whole vocabulary of the model. Collective over the model-parallel groups.

        ``batches``: the same on every data-parallel rank, sliced for context parallelism.
        """
        labels_alone = replace(
            self.objective,
            student_weight=0.0,
            teacher_weight=0.0,
            gold_weight=1.0,
            reference_kl=0.0,
            temperature=1.0,
            off_policy="cross_entropy",
        )
        hidden = forward_only(self.chunks, HiddenStateModel.forward_packed, batches, self.layout)
        with torch.no_grad():
            return [
                distillation_loss(
                    each,
                    self._lm_head(),
                    batch,
                    labels_alone,
                    teacher_hidden=None,
                    teacher_head=None,
                    reference_hidden=None,
                    reference_head=None,
                    vocab_size=self.spec.dims.vocab_size,
                    group=self.layout.tp,
                ).log_probs
                for each, batch in zip(hidden, batches, strict=bool(hidden))
            ]

    def measure(
        self,
        batches: Sequence[PackedBatch],
        teacher: Sequence[FrozenScores],
        reference: Sequence[FrozenScores],
        objective: Objective,
    ) -> tuple[LossTerms[float], float]:
        """``objective``'s terms, and the largest engine gap in nats, of a global batch that is not trained on; on all ranks.

        Arguments as for :meth:`step`. One forward pass; within :meth:`off_device` the weights alone are brought for it.
        """
        for ddp in self.ddp:
            ddp.eval()
        losses = [self._loss(objective, *each) for each in zip(batches, teacher, reference, strict=True)]
        with self.weights_on_device():
            outputs = forward_backward(self.ddp, _forward, batches, losses, self.layout, backward=False)
        *sums, _, engine_gap_max = self._reduce(batches, outputs).tolist()
        return LossTerms(*sums), engine_gap_max

    def student_support(self, batches: Sequence[PackedBatch], positions: Sequence[Tensor]) -> list[Tensor]:
        """[P, k] int64 in host memory for each micro-batch: the ids of "topk_reverse_kl" at its ``positions`` [P].

        See :func:`~megatron_opd.losses.student_support`. One forward pass; within :meth:`off_device` the weights alone are
        brought for it. Last stage only, an empty list elsewhere. Collective over the world.

        ``batches``: this data-parallel rank's, sliced for context parallelism.
        """
        with self.weights_on_device():
            hidden = forward_only(
                self.chunks, HiddenStateModel.forward_packed, batches, self.layout, keep=self.platform.to_host
            )
            return [
                student_support(
                    each.to(self.device, non_blocking=True),
                    self._lm_head(),
                    wanted.to(self.device),
                    self.objective,
                    vocab_size=self.loss_vocab_size,
                    group=self.layout.tp,
                    stop_ids=self.stop_ids,
                    chunk_tokens=self.chunk_tokens,
                ).cpu()
                for each, wanted in zip(hidden, positions, strict=bool(hidden))
            ]

    def export(self) -> Export:
        """The current weights as Hugging Face tensors. Collective over the data-parallel group."""
        self.complete_parameters()
        return Export(self.chunks, self.spec.architecture, self.spec.dims, self.layout)

    @contextmanager
    def off_device(self) -> Iterator[None]:
        """Between two steps: weights, master weights and moments wait in host memory, the gradient buffers are given up.

        Engines and frozen models have the device memory to themselves. Does nothing unless made with ``offload``, and inside
        itself.
        """
        if not self.offload or self._waiting is not None:
            yield
            return
        self.complete_parameters()
        with offloaded(memory(self.parameters()), (), self.platform) as self._waiting:
            try:
                with offloaded(self.optimizer_tensors(), self.gradient_buffers(), self.platform):
                    yield
            finally:
                self._waiting = None

    @contextmanager
    def weights_on_device(self) -> Iterator[None]:
        """Within :meth:`off_device`: the weights are there, to be read alone. Elsewhere they are in any case."""
        with nullcontext() if self._waiting is None else self._waiting.on_device():
            yield

    def parameter_buffers(self) -> list[Tensor]:
        """[elements, padded] of each of Megatron's buffers that parameters are views of: with the distributed optimizer."""
        buffers = [buffer for ddp in self.ddp for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
        return [buffer.param_data for buffer in buffers if buffer.param_data is not None]

    def gradient_buffers(self) -> list[Tensor]:
        """[elements, padded] of each of Megatron's buffers; ``main_grad`` of every parameter is a view of one."""
        return [buffer.grad_data for ddp in self.ddp for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]

    def optimizer_tensors(self) -> list[Tensor]:
        """Adam's moments and the master weights; with the distributed optimizer this rank's shards."""
        inner = [each.optimizer for each in self.optimizer.chained_optimizers]
        masters = [parameter for each in inner for group in each.param_groups for parameter in group["params"]]
        states = [value for each in inner for state in each.state.values() for value in state.values()]
        return [*masters, *(state for state in states if torch.is_tensor(state))]

    def _loss(
        self, objective: Objective, batch: PackedBatch, teacher: FrozenScores, reference: FrozenScores
    ) -> Callable[[Tensor], LossOutput]:
        def loss(hidden: Tensor) -> LossOutput:
            teacher_hidden = _like(teacher.hidden, hidden)
            output = distillation_loss(
                hidden,
                self._lm_head(),
                batch,
                objective,
                teacher_hidden=teacher_hidden,
                teacher_head=teacher.lm_head,
                teacher_scores=teacher.tokens,
                reference_hidden=_like(reference.hidden, hidden),
                reference_head=reference.lm_head,
                vocab_size=self.loss_vocab_size,
                group=self.layout.tp,
                stop_ids=self.stop_ids,
                chunk_tokens=self.chunk_tokens,
            )
            if self.overlap_k and teacher_hidden is not None and teacher.lm_head is not None:
                output = self._with_overlap(output, batch, hidden, teacher_hidden, teacher.lm_head)
            return output

        return loss

    def _with_overlap(
        self, output: LossOutput, batch: PackedBatch, hidden: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
    ) -> LossOutput:
        """The agreement of the likeliest tokens, on some of the rollout positions: which ones does not depend on the layout."""
        chosen = (batch.rollout_weights > 0) & (batch.position_ids % self.overlap_every == 0)
        overlap = top_k_overlap(
            hidden,
            self._lm_head(),
            teacher_hidden,
            teacher_head,
            chosen.nonzero().squeeze(1).to(hidden.device),
            k=self.overlap_k,
            vocab_size=self.loss_vocab_size,
            group=self.layout.tp,
            chunk_tokens=self.chunk_tokens,
        )
        count = overlap.new_tensor(float(len(overlap)))
        return replace(output, terms=output.terms._replace(overlap=overlap.sum(), overlap_positions=count))

    def _lm_head(self) -> Tensor:
        """[V/tp, H]; the parameter where gradients are wanted. Last stage only."""
        head = self.chunks[-1].lm_head
        if self.gathers_late:  # DDP waits for a parameter before its module's forward, which here is the loss
            self.ddp[-1].param_to_bucket_group[head].finish_param_sync()
        return head if torch.is_grad_enabled() else head.detach()  # else the loss would form its gradient, for nobody

    def _reduce(self, batches: Sequence[PackedBatch], outputs: Sequence[LossOutput]) -> Tensor:
        """[terms + 2] fp64 on CPU: sums over the data-parallel group of the terms and of the input tokens, and the largest
        engine gap, made on the last stage, equal on all."""
        device = self.device
        sums = torch.zeros(len(LossTerms._fields) + 1, dtype=torch.float64, device=device)
        largest = torch.zeros(1, dtype=torch.float64, device=device)
        for batch, output in zip(batches, outputs, strict=bool(outputs)):
            tokens = torch.tensor(float(batch.num_tokens), device=device)
            sums += torch.stack([each.double() for each in (*output.terms, tokens)])
            largest = torch.maximum(largest, output.engine_gap_max.double())
        dist.all_reduce(sums, group=self.layout.dp_cp)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.layout.dp_cp)
        total = torch.cat([sums, largest])
        if self.layout.pp_size > 1:
            dist.broadcast(total, self.layout.last_stage, group=self.layout.pp)
        return total.cpu()


def _forward(ddp: DistributedDataParallel, batch: PackedBatch) -> Tensor:
    chunk: HiddenStateModel = ddp.module
    return chunk.forward_packed(batch)  # DDP's hooks are on the modules within


def _like(waiting: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Hidden states that wait in host memory, on the device; [T, H]."""
    return None if waiting is None else waiting.to(hidden.device, non_blocking=True)


def _check_frozen_models(terms: LossTerms[float], vocab_size: int) -> None:
    uniform = math.log(vocab_size)
    if vocab_size > 1 and abs(terms.teacher_entropy - uniform) < _UNIFORM * uniform:
        raise RunStopped(
            f"teacher.model: uniform over the vocabulary, every token at {-uniform:.2f} nats: it has no weights, or zeros; "
            "check its files"
        )
    for model, count in (("teacher", terms.bad_teacher), ("reference", terms.bad_reference)):
        if count:
            raise RunStopped(f"{model}.model: NaN or infinite logits on {count:.0f} tokens of the step; check its weights")


def sum_gradients(models: list[Any], num_tokens: Tensor | None, *args: Any, **kwargs: Any) -> None:
    """Megatron's reduction without its division: the batch's weights already divide each source by its own global count.

    Megatron knows one count for the whole batch; one count shared by rollout and gold tokens would let the gold term fade when
    rollouts get longer.
    """
    finalize_model_grads(models, None, *args, **kwargs)
