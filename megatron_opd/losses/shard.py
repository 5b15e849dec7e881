"""The vocabulary rows that one rank of a tensor-parallel group holds, and the reductions over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """Rows ``start .. start + size - 1`` of the true vocabulary; ``size`` may be 0 where a rank holds nothing but padding.

    ``group`` holds the other rows; None: there are none. Every reduction is collective over it: all ranks call it in step.
    """

    start: int
    size: int
    group: ProcessGroup | None

    @classmethod
    def of(cls, rows: int, vocab_size: int | None, group: ProcessGroup | None) -> VocabShard:
        """The shard of this rank: rank r of ``group`` holds rows ``r * rows .. (r + 1) * rows - 1`` of the padded vocabulary.

        Raises ValueError where ``vocab_size`` (None: no padding) is not among 1 .. rows * ranks.
        """
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        true_rows = rows * ranks if vocab_size is None else vocab_size
        if not 1 <= true_rows <= rows * ranks:
            raise ValueError(
                f"vocab_size: {vocab_size}, but {ranks} ranks hold {rows} rows each; give the true size, 1 to {rows * ranks}"
            )
        start = rank * rows
        return cls(start, min(max(true_rows - start, 0), rows), group if ranks > 1 else None)

    def subtract_row_max_(self, *logits: Tensor) -> None:
        """In place, each [c, size]: subtract each row's maximum over the whole vocabulary. One MAX over [len(logits), c]."""
        if self.size:
            maxima = torch.stack([each.amax(-1) for each in logits])  # [k, c]
        else:
            maxima = logits[0].new_full((len(logits), logits[0].shape[0]), -torch.inf)
        if self.group is not None:
            dist.all_reduce(maxima, dist.ReduceOp.MAX, self.group)
        for each, maximum in zip(logits, maxima, strict=True):
            each.sub_(maximum[:, None])

    def sum(self, *shares: Tensor) -> list[Tensor]:
        """Each [c]: the sum of the ranks' shares. One SUM over [len(shares), c]; not differentiable."""
        if self.group is None:
            return list(shares)
        packed = torch.stack(shares)  # [k, c]
        dist.all_reduce(packed, group=self.group)
        return list(packed)

    def pick(self, values: Tensor, labels: Tensor) -> Tensor:
        """[c]: this rank's share of ``values[i, labels[i]]``, 0 where another rank owns the label. [c, size], [c] int64."""
        if not self.size:
            return values.new_zeros(values.shape[0])
        columns, owned = self._locate(labels)
        return values.gather(1, columns).squeeze(1).where(owned, 0.0)

    def add_at_(self, values: Tensor, labels: Tensor, amounts: Tensor) -> None:
        """In place, ``values[i, labels[i]] += amounts[i]`` on the rank that owns the label. [c, size], [c] int64, [c]."""
        if self.size:
            columns, owned = self._locate(labels)
            values.scatter_add_(1, columns, amounts.where(owned, 0.0)[:, None])

    def _locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Local columns [c, 1], clamped into the shard, and whether they are this rank's [c]."""
        local = labels - self.start
        return local.clamp(0, self.size - 1)[:, None], (local >= 0) & (local < self.size)
