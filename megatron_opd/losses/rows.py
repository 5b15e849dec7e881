"""Nouns of one chunk of c tokens: what its passes over the vocabulary give by rows, and what the terms make of it.

p and q are softmax(logits / temperature) of student and teacher; s, t, r the scaled logits of student, teacher and reference
minus their row maximum.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from megatron_opd.types import TokenScores


class Cross(IntEnum):
    """A sum over student and teacher that the first pass gives beside the totals."""

    NONE = 0
    REVERSE = 1  # sum e^s (s - t); f = s - t
    FORWARD = 2  # sum e^t (t - s)


class Mixture(IntEnum):
    """A second pass with d = log q - log p and u = log m - log p = log(1 + b (e^d - 1)), where m = b q + (1 - b) p.

    Its two sums, and the field f in which the gradient is linear. u is exact for small d, and d needs both totals first.
    """

    NONE = 0
    JSD = 1  # sum e^s u, sum e^t (d - u); f = u
    SKEW_REVERSE = 2  # sum e^s u, sum e^s e^-u; f = u + (1 - b) e^-u
    SKEW_FORWARD = 3  # sum e^s f, sum e^t (d - u); f = e^(d - u) = q / m


class Tokens(NamedTuple):
    """Tokens of responses, each [c]; a term of weight 0 is left out."""

    labels: Tensor  # int64
    old_log_probs: Tensor  # nats
    opd_weights: Tensor  # of the OPD term
    reference_weights: Tensor  # of KL(student || reference)
    label_weights: Tensor  # of the cross-entropy
    scores: TokenScores | None = None  # each [c, ...], of a teacher without logits here

    def chunk(self, rows: slice) -> Tokens:
        labels, old, opd, reference, label = (each[rows] for each in (self.labels, self.old_log_probs, *self.weights))
        return Tokens(labels, old, opd, reference, label, None if self.scores is None else self.scores.at(rows))

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.opd_weights, self.reference_weights, self.label_weights


class ModelRows(NamedTuple):
    """One model's distribution, each [c]."""

    total: Tensor  # Z, the sum of the shifted exponentials
    log_prob: Tensor  # of the label, nats
    class_log_prob: Tensor  # of the label, or of the merged stop class where it holds the label, nats
    stop_log_prob: Tensor  # of any end token, nats


class ChunkStatistics(NamedTuple):
    """What the first pass gives, over the whole vocabulary, each [c]; None where the model behind it is absent."""

    student: ModelRows
    entropy: Tensor  # of the student, nats
    in_class: Tensor  # bool: the stop class is merged and holds the label
    teacher: ModelRows | None = None
    teacher_entropy: Tensor | None = None  # nats
    top1_agreement: Tensor | None = None  # 1 where one token is both models' likeliest
    cross: Tensor | None = None
    reference: ModelRows | None = None
    reference_cross: Tensor | None = None  # sum e^s (s - r)
    support: Tensor | None = None  # [5, c] of top-k


class RowTerm(NamedTuple):
    """A term by rows and its gradient for s: ``p (constant + field f) - teacher_probs q + slope d log p(label)/ds``.

    Each [c], or a number that is the same for all; None: 0.
    """

    value: Tensor  # nats
    constant: Tensor | float = 0.0
    field: float | None = None
    teacher_probs: Tensor | float | None = None
    slope: Tensor | float = 0.0


class GradientRows(NamedTuple):
    """Factors of the passes' gradient ``e^s (constant + field f + reference (s - r)) - teacher e^t``; each [c], None: 0."""

    constant: Tensor
    field: Tensor | None
    reference: Tensor | None
    teacher: Tensor | None


class TokenValues(NamedTuple):
    """What a chunk reports, each [c]; in nats but for the flags; 0 where the model behind it is absent."""

    opd: Tensor
    reference_kl: Tensor
    log_probs: Tensor  # log p(label)
    teacher_log_probs: Tensor  # log q(label)
    advantage: Tensor  # the policy gradient's A; with another OPD term log q(label) - log pi_old(label)
    entropy: Tensor  # of the student
    teacher_entropy: Tensor
    top1_agreement: Tensor  # 1 where one token is both models' likeliest
    stop_log_probs: Tensor  # log p(any end token)
    teacher_stop_log_probs: Tensor
    bad_student: Tensor  # 1 where the model's logits hold NaN or infinity
    bad_teacher: Tensor
    bad_reference: Tensor
