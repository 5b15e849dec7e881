"""The vocabulary rows that one rank of a tensor-parallel group holds, and the reductions over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work


class Pending(NamedTuple):
    """A collective under way; between its start and ``wait`` there is time for another chunk's products."""

    values: Tensor
    work: Work | None  # None: done

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.values


@dataclass(frozen=True)
class VocabShard:
    """Rows ``start .. start + size - 1`` of the true vocabulary; ``size`` may be 0 where a rank holds nothing but padding.

    ``group`` holds the other rows; None: there are none. Every reduction is collective over it: all ranks call it in step.
    None of them is differentiable.
    """

    start: int
    size: int
    vocab_size: int
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
        return cls(start, min(max(true_rows - start, 0), rows), true_rows, group if ranks > 1 else None)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def max(self, packed: Tensor) -> Pending:
        """[k, c]: the maxima over the ranks, in place."""
        return self._reduce(packed, dist.ReduceOp.MAX)

    def sum(self, packed: Tensor) -> Pending:
        """[k, c]: the sums over the ranks, in place."""
        return self._reduce(packed, dist.ReduceOp.SUM)

    def gather(self, local: Tensor) -> Pending:
        """[c, k] → [ranks, c, k]."""
        if self.group is None:
            return Pending(local[None], None)
        gathered = local.new_empty(self.group.size(), *local.shape)
        return Pending(gathered, dist.all_gather(list(gathered), local.contiguous(), self.group, async_op=True))

    def _reduce(self, packed: Tensor, operation: dist.ReduceOp.RedOpType) -> Pending:
        work = None if self.group is None else dist.all_reduce(packed, operation, self.group, async_op=True)
        return Pending(packed, work)

    def row_max(self, logits: Tensor) -> Tensor:
        """[c]: the maxima of this rank's [c, size]; -inf where it has no rows."""
        return logits.amax(-1) if self.size else logits.new_full((len(logits),), -torch.inf)

    def pick(self, values: Tensor, labels: Tensor, elsewhere: float = 0.0) -> Tensor:
        """[c]: ``values[i, labels[i]]``, or ``elsewhere`` where another rank owns the label. [c, size], [c] int64."""
        if not self.size:
            return values.new_full((len(values),), elsewhere)
        columns, owned = self.locate(labels)
        return values.gather(1, columns[:, None]).squeeze(1).where(owned, elsewhere)

    def add_at_(self, values: Tensor, labels: Tensor, amounts: Tensor) -> None:
        """In place, ``values[i, labels[i]] += amounts[i]`` on the rank that owns the label. [c, size], [c] int64, [c]."""
        if self.size:
            columns, owned = self.locate(labels)
            values.scatter_add_(1, columns[:, None], amounts.where(owned, 0.0)[:, None])

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Local columns, clamped into the shard, and whether they are this rank's; each in the shape of ``labels``."""
        local = labels - self.start
        return local.clamp(0, self.size - 1), (local >= 0) & (local < self.size)
