"""Divergences over the k likeliest tokens, with everything else in one tail bucket or left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_opd.losses.rows import RowTerm
from megatron_opd.losses.shard import Pending, VocabShard
from megatron_opd.losses.softmax import LARGEST_LOG_RATIO, TorchSoftmax
from megatron_opd.losses.stop_class import StopClass
from megatron_opd.types import OpdKind, TokenScores

TOP_K_KINDS = ("topk_reverse_kl", "topk_forward_kl", "local_support")


class Support(NamedTuple):
    """The k likeliest tokens, as far as this rank owns them."""

    columns: Tensor  # [c, k'] int64 local columns, of any value where not owned; k' > k only with a merged stop class
    owned: Tensor  # [c, k'] bool

    def at(self, values: Tensor) -> Tensor:
        """[c, k]: ``values`` [c, size] on the support, 0 where another rank owns it."""
        if not values.shape[1]:
            return values.new_zeros(self.columns.shape)
        return values.gather(1, self.columns).where(self.owned, 0.0)

    def put_(self, values: Tensor, entries: Tensor | float) -> None:
        """In place: ``entries`` [c, k], or a number, into ``values`` [c, size]."""
        inside = self.owned.nonzero(as_tuple=True)
        values[inside[0], self.columns[inside]] = entries[inside] if isinstance(entries, Tensor) else entries


class GivenSupport(NamedTuple):
    """The teacher's or the student's likeliest tokens with a server's log-probabilities; equal on all ranks of the group."""

    ids: Tensor  # [c, K] int64
    log_probs: Tensor  # [c, K] nats, log q; -inf where an entry does not count

    def support(self, shard: VocabShard) -> Support:
        """No collective: each rank sees which ids are its own."""
        if not shard.size:
            return Support(torch.zeros_like(self.ids), torch.zeros_like(self.ids, dtype=torch.bool))
        columns, owned = shard.locate(self.ids)
        return Support(columns, owned & self.log_probs.isfinite())

    def tail(self) -> Tensor:
        """[c]: the mass off the support. All that is known of it is 1 - sum, hence its absolute error of about 1e-7 in fp32.

        Never less than that error: the reverse KL takes its logarithm.
        """
        left = (1 - self.log_probs.double().exp().sum(-1)).to(self.log_probs.dtype)
        return left.clamp(min=torch.finfo(left.dtype).eps)


class SupportValues(NamedTuple):
    """Of the owned entries of the support, each [c, k]; 0 elsewhere."""

    student_exp: Tensor
    teacher_exp: Tensor
    difference: Tensor  # s - t


@dataclass(frozen=True)
class TopK:
    """One of

    - "topk_reverse_kl": KL(student || teacher) over the student's top k and one bucket for the rest;
    - "topk_forward_kl": KL(teacher || student) over the teacher's top k and one bucket for the rest;
    - "local_support": KL(student || teacher) over the teacher's top k, both renormalised there (arXiv 2603.25562).

    The bucket makes the first two divergences of coarser distributions: never negative, never above the full KL, and growing
    towards it with k. A truncated sum without it can be negative. Costs one gather of [c, k] more than the full KL.
    """

    kind: OpdKind
    k: int

    def entries(self, stop: StopClass) -> int:
        """Ids that a server must give of each token: of the teacher's own, a merged class's members can be among the first."""
        return self.k + (len(stop.ids) if stop.merged and self.kind != "topk_reverse_kl" else 0)

    def candidates(self, logits: Tensor, shard: VocabShard, stop: StopClass) -> tuple[Tensor, Pending]:
        """This rank's k likeliest columns [c, k], and everybody's logits there [ranks, c, k] under way.

        A merged stop class stands aside: it is ranked as a whole. ``logits`` [c, size] of the model whose support it is.
        """
        ends = stop.columns(shard) if stop.merged else []
        kept = logits[:, ends]
        logits[:, ends] = -torch.inf
        values, columns = logits.topk(min(self.k, shard.size), -1)
        logits[:, ends] = kept
        missing = self.k - values.shape[1]
        return columns, shard.gather(torch.nn.functional.pad(values, (0, missing), value=-torch.inf))

    def support(self, columns: Tensor, gathered: Tensor, members: Tensor, shard: VocabShard, stop: StopClass) -> Support:
        """The k likeliest of all ranks' candidates; every rank makes the same choice, ties included.

        ``members`` [E, c] are the end tokens' logits of the same model: their merged class counts as one of the k, and brings
        them all.
        """
        everybody = gathered.transpose(0, 1).flatten(1)  # [c, ranks * k]
        values, winners = everybody.topk(self.k, -1)
        owned = (winners // self.k == shard.rank) & (values > -torch.inf)  # a rank of few rows offers nothing in their place
        slots = (winners % self.k).clamp(max=max(columns.shape[1] - 1, 0))
        columns = columns.gather(1, slots) if shard.size else torch.zeros_like(winners)
        if not stop.merged:
            return Support(columns, owned)
        class_logits = members.logsumexp(0)
        class_wins = (everybody > class_logits[:, None]).sum(-1) < self.k  # [c]
        owned[:, -1] &= ~class_wins
        ends = columns.new_tensor(stop.columns(shard)).expand(len(columns), -1)
        return Support(torch.cat([columns, ends], 1), torch.cat([owned, class_wins[:, None].expand_as(ends)], 1))

    def given(self, scores: TokenScores, student_members: Tensor, stop: StopClass) -> GivenSupport:
        """The support of a teacher that gives ``scores``, of :meth:`entries` ids.

        A merged stop class counts as one of the k and brings its members, in the student's proportions; ``student_members``
        [E, c] are their logits. Whether it is among the student's k was known when these were chosen: then one is missing.
        """
        assert scores.top_ids is not None and scores.top_log_probs is not None
        ids, log_probs = scores.top_ids, scores.top_log_probs
        if not stop.merged:
            return GivenSupport(ids[:, : self.k], log_probs[:, : self.k])
        ends = ids.new_tensor(stop.ids)
        class_log_probs = scores.stop_log_probs[:, None]
        if self.kind == "topk_reverse_kl":
            class_wins = log_probs[:, -1:].isneginf()  # [c, 1]
        else:
            log_probs, places = log_probs.masked_fill(torch.isin(ids, ends), -torch.inf).topk(self.k, -1)
            ids = ids.gather(1, places)
            class_wins = (log_probs > class_log_probs).sum(-1, keepdim=True) < self.k
            log_probs[:, -1:] = log_probs[:, -1:].masked_fill(class_wins, -torch.inf)
        shared = class_log_probs + student_members.T.log_softmax(-1)  # [c, E]
        return GivenSupport(
            torch.cat([ids, ends.expand(len(ids), -1)], 1),
            torch.cat([log_probs, shared.where(class_wins, -torch.inf)], 1),
        )

    def sums(
        self, softmax: TorchSoftmax, support: Support, given: GivenSupport | None = None
    ) -> tuple[list[Tensor], SupportValues]:
        """This rank's shares, each [c], after ``softmax.sums``: both models' mass on the support, both tails, cross sum.

        The exponentials on the support are set to 0: what is left is the tail, and a difference of two sums would lose a small
        one. A ``given`` teacher has the log-probabilities as logits, a total of 1, and no share of a tail here.
        """
        student, student_exp = support.at(softmax.student), support.at(softmax.student_exp)
        if given is not None:
            teacher = given.log_probs.where(support.owned, 0.0)
            values = SupportValues(student_exp, teacher.exp().where(support.owned, 0.0), student - teacher)
            teacher_tail = torch.zeros_like(student_exp[:, 0])
        else:
            assert softmax.teacher is not None and softmax.teacher_exp is not None
            values = SupportValues(student_exp, support.at(softmax.teacher_exp), student - support.at(softmax.teacher))
            support.put_(softmax.teacher_exp, 0.0)
            teacher_tail = softmax.teacher_exp.sum(-1)
        support.put_(softmax.student_exp, 0.0)
        forward = self.kind == "topk_forward_kl"
        cross = values.teacher_exp * -values.difference if forward else values.student_exp * values.difference
        heads = [values.student_exp.sum(-1), values.teacher_exp.sum(-1)]
        return [*heads, softmax.student_exp.sum(-1), teacher_tail, cross.sum(-1)], values

    def row_term(
        self, values: SupportValues, student_total: Tensor, teacher_total: Tensor, sums: Tensor
    ) -> tuple[RowTerm, Tensor]:
        """The term, whose gradient holds off the support, and the gradient [c, k] on it.

        ``sums`` [5, c]: those of :meth:`sums` over the whole vocabulary. A mass that underflows counts as the smallest float.
        """
        head_s, head_t, tail_s, tail_t = sums[:4].clamp(min=torch.finfo(sums.dtype).tiny)
        cross = sums[4]
        if self.kind == "local_support":
            mean = cross / head_s
            inside = values.student_exp / head_s[:, None] * (values.difference - mean[:, None])
            return RowTerm(mean - head_s.log() + head_t.log()), inside
        student_probs = values.student_exp / student_total[:, None]
        tail_ratio = tail_s.log() - tail_t.log()
        if self.kind == "topk_reverse_kl":
            mean = (cross + tail_s * tail_ratio) / student_total
            term = RowTerm(mean - student_total.log() + teacher_total.log(), constant=tail_ratio - mean)
            return term, student_probs * (values.difference - mean[:, None])
        offset = student_total.log() - teacher_total.log()
        teacher_tail_share = (offset - tail_ratio).clamp(max=LARGEST_LOG_RATIO).exp()  # the teacher's tail over the student's
        term = RowTerm((cross - tail_t * tail_ratio) / teacher_total + offset, constant=1 - teacher_tail_share)
        return term, student_probs - values.teacher_exp / teacher_total[:, None]


def check_k(k: int, vocab_size: int) -> int:
    """Raises ValueError unless 1 <= k <= vocab_size."""
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k: {k}, but the vocabulary has {vocab_size} ids; give 1 to {vocab_size}")
    return k
