"""The loss of one chunk of tokens and its gradient for the student's logits: every term from the same passes.

Two collectives a chunk carry all models' statistics at once, a MAX and a SUM; JSD and the skew divergences need a second SUM,
because both totals come before the mixture, and top-k a gather. The steps are generators that yield where a collective is under
way, so that the caller can run another chunk's products meanwhile.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from megatron_opd.losses.divergence import Divergence, ReverseKL
from megatron_opd.losses.policy_gradient import PolicyGradient
from megatron_opd.losses.rows import ChunkStatistics, Cross, GradientRows, Mixture, ModelRows, RowTerm, Tokens, TokenValues
from megatron_opd.losses.shard import VocabShard
from megatron_opd.losses.softmax import ChunkSoftmax, TorchSoftmax
from megatron_opd.losses.stop_class import StopClass, shared_logits
from megatron_opd.losses.top_k import Support, SupportValues, TopK

OpdTerm = Divergence | TopK | PolicyGradient
Result = TypeVar("Result")
Steps = Generator[None, None, Result]

_LOG_RATIO = PolicyGradient(clip=None)


class _TopKPart(NamedTuple):
    """What top-k knows of a chunk beyond the statistics."""

    support: Support
    values: SupportValues
    sums: Tensor  # [5, c] over the whole vocabulary


@dataclass(frozen=True)
class ChunkLoss:
    """The terms, the same for all chunks; every distribution is softmax(logits / temperature)."""

    opd: OpdTerm
    stop: StopClass
    temperature: float
    shard: VocabShard

    def spare_matrices(self, device: torch.device) -> int:
        """How many [c, size] :meth:`softmax` wants beside the logits: 0 or 2."""
        looks_twice = isinstance(self.opd, TopK) or (not isinstance(self.opd, PolicyGradient) and self.opd.mixture)
        return 2 if looks_twice and not self.has_kernels(device) else 0

    def softmax(self, student: Tensor, teacher: Tensor | None, reference: Tensor | None, spare: Tensor) -> ChunkSoftmax:
        """The passes over these logits, each [c, size]; ``spare`` [0 or 2, c, size] is memory to work in."""
        if not self.has_kernels(student.device):
            return TorchSoftmax(student, teacher, reference, spare if len(spare) else None)
        from megatron_opd.losses.triton_softmax import TritonSoftmax  # Triton is installed with torch's builds for GPUs alone

        return TritonSoftmax(student, teacher, reference)

    def has_kernels(self, device: torch.device) -> bool:
        """Triton's, which need no matrix beside the logits; torch's passes make some."""
        return device.type == "cuda" and not isinstance(self.opd, TopK)

    def run(self, softmax: ChunkSoftmax, tokens: Tokens) -> Steps[tuple[TokenValues, Tensor]]:
        """The tokens' values, and the gradient [c, size] of their weighted sum for the student's raw logits.

        The logits of ``softmax`` come raw and are overwritten, the gradient lies in their memory. The teacher is there by its
        logits or by ``tokens.scores``; without it there is no OPD term, without a reference no reference term.
        """
        models = [each for each in (softmax.student, softmax.teacher, softmax.reference) if each is not None]
        if self.temperature != 1.0:
            for logits in models:
                logits.div_(self.temperature)
        maxima, members = yield from self._maxima(models)
        if self.stop.merged and softmax.teacher is not None:
            self.stop.share_teacher_(softmax.teacher, members[0], members[1], self.shard)
        rows, top_k = yield from self._statistics(softmax, models, maxima, members, tokens)
        term, inside = yield from self._opd_term(softmax, rows, tokens, top_k)
        gradient = self._gradient(softmax, rows, tokens, members[0], term, top_k, inside)
        return self._values(rows, tokens, term), gradient

    def _maxima(self, models: list[Tensor]) -> Steps[tuple[Tensor, Tensor]]:
        """[models, c] each row's maximum, [models, E, c] the end tokens' logits: each has one owner, so a MAX gathers them."""
        row_maxima = [self.shard.row_max(logits) for logits in models]
        members = [member for logits in models for member in self.stop.pick(logits, self.shard)]
        pending = self.shard.max(torch.stack(row_maxima + members))
        yield
        reduced = pending.wait()
        return reduced[: len(models)], reduced[len(models) :].view(len(models), len(self.stop.ids), reduced.shape[1])

    def _statistics(
        self, softmax: ChunkSoftmax, models: list[Tensor], maxima: Tensor, members: Tensor, tokens: Tokens
    ) -> Steps[tuple[ChunkStatistics, _TopKPart | None]]:
        labels, scores = tokens.labels, tokens.scores
        support = values = served = None
        if isinstance(self.opd, TopK) and isinstance(softmax, TorchSoftmax):
            if softmax.teacher is not None:
                whose = 0 if self.opd.kind == "topk_reverse_kl" else 1
                columns, gathering = self.opd.candidates(models[whose], self.shard, self.stop)
                yield
                support = self.opd.support(columns, gathering.wait(), members[whose], self.shard, self.stop)
            elif scores is not None:
                served = self.opd.given(scores, members[0], self.stop)
                support = served.support(self.shard)

        shares = [self.shard.pick(logits, labels) for logits in models]
        shares += softmax.sums(maxima, Cross.NONE if isinstance(self.opd, TopK) else self.opd.cross)
        if support is not None:
            assert isinstance(self.opd, TopK) and isinstance(softmax, TorchSoftmax)
            top_k_shares, values = self.opd.sums(softmax, support, served)
            shares += top_k_shares
        pending = self.shard.sum(torch.stack(shares))
        yield
        label_logits, sums = pending.wait().split([len(models), len(shares) - len(models)])
        in_class = self.stop.holds(labels)

        def model_rows(model: int, total: Tensor) -> ModelRows:
            log_total = maxima[model] + total.log()
            log_prob = label_logits[model] - log_total
            stop_log_prob = members[model].logsumexp(0) - log_total if self.stop.ids else torch.zeros_like(log_total)
            return ModelRows(total, log_prob, stop_log_prob.where(in_class, log_prob), stop_log_prob)

        student_total, entropy_sum, *rest = sums
        rows = ChunkStatistics(
            student=model_rows(0, student_total), entropy=student_total.log() - entropy_sum / student_total, in_class=in_class
        )
        if softmax.teacher is not None:
            teacher_total, entropy_sum, agreement, cross, *rest = rest
            agreement = agreement.clamp(max=1)  # a tie can agree on several ranks
            if self.stop.merged:
                student_ends, teacher_ends = members[:2].amax(1) == maxima[:2]
                agreement = teacher_ends.to(agreement.dtype).where(student_ends, agreement)
                given, own = shared_logits(members[0], members[1]) - maxima[1], members[1] - maxima[1]
                entropy_sum = entropy_sum + (own.exp() * own - given.exp() * given).sum(0)  # the entropy of q, not of q'
            rows = rows._replace(
                teacher=model_rows(1, teacher_total),
                teacher_entropy=teacher_total.log() - entropy_sum / teacher_total,
                top1_agreement=agreement,
                cross=cross,
            )
        elif scores is not None:
            class_log_prob = scores.stop_log_probs.where(in_class, scores.log_probs)
            total = torch.ones_like(student_total)
            rows = rows._replace(teacher=ModelRows(total, scores.log_probs, class_log_prob, scores.stop_log_probs))
        if softmax.reference is not None:
            reference_total, reference_cross, *rest = rest
            rows = rows._replace(reference=model_rows(-1, reference_total), reference_cross=reference_cross)
        if support is None or values is None:
            return rows, None
        sums = torch.stack(rest)  # [5, c]
        if served is not None:
            sums[3] = served.tail()
        return rows, _TopKPart(support, values, sums)

    def _opd_term(
        self, softmax: ChunkSoftmax, rows: ChunkStatistics, tokens: Tokens, top_k: _TopKPart | None
    ) -> Steps[tuple[RowTerm, Tensor | None]]:
        """The term, and its gradient [c, k] on the support of top-k."""
        if rows.teacher is None:
            return RowTerm(torch.zeros_like(rows.entropy)), None
        if isinstance(self.opd, PolicyGradient):
            return self.opd.row_term(rows, tokens.old_log_probs), None
        totals = rows.student.total, rows.teacher.total
        if isinstance(self.opd, TopK):
            assert top_k is not None
            return self.opd.row_term(top_k.values, *totals, top_k.sums)
        assert rows.cross is not None
        sums = rows.cross[None]
        if self.opd.mixture is not Mixture.NONE:
            offset = totals[0].log() - totals[1].log()
            pending = self.shard.sum(softmax.mixture_sums(self.opd.mixture, self.opd.teacher_share, offset))
            yield
            sums = pending.wait()
        return self.opd.row_term(*totals, sums), None

    def _gradient(
        self,
        softmax: ChunkSoftmax,
        rows: ChunkStatistics,
        tokens: Tokens,
        student_members: Tensor,
        term: RowTerm,
        top_k: _TopKPart | None,
        inside: Tensor | None,
    ) -> Tensor:
        """[c, size]: all terms' weighted gradients, put together by rows so that one pass writes them."""
        opd_weights, reference_weights, label_weights = (each / self.temperature for each in tokens.weights)
        student_total = rows.student.total
        class_slopes = (opd_weights * term.slope).where(rows.in_class, 0.0)
        label_slopes = opd_weights * term.slope - class_slopes - label_weights
        constant, reference = -(label_slopes + class_slopes) / student_total, None
        if rows.reference_cross is not None:
            reference = reference_weights / student_total
            constant = constant - reference * rows.reference_cross / student_total
        if top_k is not None and inside is not None:
            others = constant[:, None]
            if reference is not None and softmax.reference is not None:
                others = others + reference[:, None] * top_k.support.at(softmax.reference)
            inside = opd_weights[:, None] * inside + top_k.values.student_exp * others
        teacher = None
        if rows.teacher is not None and term.teacher_probs is not None:
            teacher = opd_weights * term.teacher_probs / rows.teacher.total
        gradient = softmax.gradient(
            GradientRows(
                constant=constant + opd_weights * term.constant / student_total,
                field=None if term.field is None else opd_weights * term.field / student_total,
                reference=reference,
                teacher=teacher,
            )
        )
        if top_k is not None and inside is not None:
            top_k.support.put_(gradient, inside)
        self.shard.add_at_(gradient, tokens.labels, label_slopes)
        if self.stop.merged:
            self.stop.add_slope_(gradient, student_members, class_slopes, self.shard)
        return gradient

    def _values(self, rows: ChunkStatistics, tokens: Tokens, term: RowTerm) -> TokenValues:
        nothing = torch.zeros_like(rows.entropy)
        bad_student = ~torch.isfinite(rows.entropy)
        values = TokenValues(
            opd=term.value,
            reference_kl=nothing,
            log_probs=rows.student.log_prob,
            teacher_log_probs=nothing,
            advantage=nothing,
            entropy=rows.entropy,
            teacher_entropy=nothing,
            top1_agreement=nothing,
            stop_log_probs=rows.student.stop_log_prob,
            teacher_stop_log_probs=nothing,
            bad_student=bad_student.to(nothing.dtype),
            bad_teacher=nothing,
            bad_reference=nothing,
        )
        if rows.teacher is not None:
            advantage = self.opd if isinstance(self.opd, PolicyGradient) else _LOG_RATIO
            known = rows.teacher.class_log_prob if rows.teacher_entropy is None else rows.teacher_entropy
            values = values._replace(
                teacher_log_probs=rows.teacher.log_prob,
                advantage=advantage.advantage(rows, tokens.old_log_probs),
                teacher_entropy=nothing if rows.teacher_entropy is None else rows.teacher_entropy,
                top1_agreement=nothing if rows.top1_agreement is None else rows.top1_agreement,
                teacher_stop_log_probs=rows.teacher.stop_log_prob,
                # With a merged stop class the student's end tokens are part of what the teacher is compared by.
                bad_teacher=(~torch.isfinite(known) & ~bad_student).to(nothing.dtype),
            )
        if rows.reference is not None and rows.reference_cross is not None:
            reference_kl = ReverseKL().row_term(rows.student.total, rows.reference.total, rows.reference_cross[None]).value
            bad = ~bad_student & ~torch.isfinite(reference_kl)
            values = values._replace(reference_kl=reference_kl, bad_reference=bad.to(nothing.dtype))
        return values
