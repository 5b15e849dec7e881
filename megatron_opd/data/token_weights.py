"""Which tokens of the student's responses count less: beyond StableOPD, off by default."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_opd.types import Rollout, Source


def token_shares(
    rollouts: Sequence[Rollout], repeated: Sequence[NDArray[np.bool_]], truncated: float, repeated_tail: float
) -> list[NDArray[np.float64]]:
    """For each rollout [R] in 0 .. 1, what its tokens count of a full one; gold and the teacher's count in full.

    Args:
        repeated: [R] for each rollout, whether the token ends a repeated n-gram.
        truncated: of every token of a response that ran out of its budget.
        repeated_tail: of the tokens of a response's repeated tail, the longest end of it in which every token is repeated; the
            end token that follows a loop is not part of it. Both factors apply to the tail of a truncated response.
    """
    shares = []
    for rollout, flags in zip(rollouts, repeated, strict=True):
        share = np.ones(len(rollout.response_ids))
        if rollout.source is Source.STUDENT:
            if rollout.finish_reason == "length":
                share *= truncated
            share[len(share) - tail_length(flags) :] *= repeated_tail
        shares.append(share)
    return shares


def tail_length(repeated: NDArray[np.bool_]) -> int:
    """How many tokens at the end of a response are all repeated; ``repeated`` is [R]."""
    regular = np.flatnonzero(~repeated)
    return len(repeated) - (int(regular[-1]) + 1 if len(regular) else 0)
