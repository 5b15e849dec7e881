"""The end tokens of student and teacher as one class (METHOD: pi(stop) = sum of pi(e) over the end tokens e)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opd.losses.shard import VocabShard


@dataclass(frozen=True)
class StopClass:
    """Distinct end tokens. ``merged``: the OPD term sees them as one token; of a single id that would change nothing.

    Student and teacher may have been taught different end tokens. Compared id by id, the teacher then pushes the student's end
    token down until nothing ends. Merged, q gives each member the class's probability in the student's proportions, q'(e) =
    q(class) p(e) / p(class): the members' sum of p phi(q' / p) is then the class's term, and its gradient with q' held
    constant is the class's gradient, on every rank without a collective of its own.
    """

    ids: tuple[int, ...]
    merged: bool

    @classmethod
    def of(cls, ids: tuple[int, ...], merge: bool, vocab_size: int) -> StopClass:
        """Raises ValueError for ids outside the vocabulary or given twice."""
        if len(set(ids)) < len(ids) or not all(0 <= index < vocab_size for index in ids):
            raise ValueError(f"stop_ids: {list(ids)}; give distinct ids from 0 to {vocab_size - 1}")
        return cls(ids, merge and len(ids) > 1)

    def pick(self, logits: Tensor, shard: VocabShard) -> list[Tensor]:
        """This rank's shares of the members' logits, each [c], to be completed by a MAX. [c, size]."""
        whole = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        return [shard.pick(logits, whole.fill_(index), -torch.inf) for index in self.ids]

    def holds(self, labels: Tensor) -> Tensor:
        """[c] bool: where the class is merged and holds the label [c]."""
        return torch.isin(labels, labels.new_tensor(self.ids if self.merged else ()))

    def share_teacher_(self, teacher: Tensor, student_members: Tensor, teacher_members: Tensor, shard: VocabShard) -> None:
        """In place: q' for q among the teacher's logits [c, size]; the members' logits are [E, c]."""
        shared = shared_logits(student_members, teacher_members)
        teacher[:, self.columns(shard)] = shared[self._owned(shard)].T

    def add_slope_(self, gradient: Tensor, members: Tensor, slopes: Tensor, shard: VocabShard) -> None:
        """In place: the gradient [c, size] of ``slopes`` [c] times log p(class), less its part -p; ``members`` [E, c]."""
        gradient[:, self.columns(shard)] += (slopes * members.softmax(0)[self._owned(shard)]).T

    def columns(self, shard: VocabShard) -> list[int]:
        """Of the members that this rank owns, among its own rows."""
        return [self.ids[member] - shard.start for member in self._owned(shard)]

    def _owned(self, shard: VocabShard) -> list[int]:
        return [member for member, index in enumerate(self.ids) if 0 <= index - shard.start < shard.size]


def shared_logits(student_members: Tensor, teacher_members: Tensor) -> Tensor:
    """[E, c]: the logits behind q'."""
    return student_members + (teacher_members.logsumexp(0) - student_members.logsumexp(0))
