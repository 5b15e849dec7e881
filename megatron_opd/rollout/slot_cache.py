"""A key-value cache of slots: each sequence has its own row and length, so no padding is ever moved or attended to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

_GROWTH = 1.5


def most_bytes(layers: int, slots: int, kv_heads: int, key_and_value: int, columns: int, itemsize: int) -> int:
    """Of a :class:`SlotCache` that has grown to sequences of ``columns`` tokens; ``key_and_value``: elements of the two."""
    return layers * slots * kv_heads * int(_GROWTH * columns) * key_and_value * itemsize


class SlotCache(Cache):
    """Keys and values of the live sequences: rows 0 to n-1, each filled from column 0 to its own length.

    A new sequence takes the row after the last; when one ends, a row from the end moves into its place. So the live rows are
    always a dense slice of the buffers: a decoding step copies nothing but the new keys and values.
    """

    def __init__(self, num_layers: int, num_slots: int, kv_heads: int) -> None:
        super().__init__(layers=[])  # this class holds the tensors itself
        self._num_slots = num_slots
        self._kv_heads = kv_heads
        self._capacity = 0  # columns that each buffer is to have; buffers follow when they are next used
        no_columns = torch.empty(num_slots, kv_heads, 0, 0)
        self._buffers = [[no_columns, no_columns] for _ in range(num_layers)]  # keys and values [slots, heads, capacity, d]
        self._target = torch.empty(0, dtype=torch.int64)  # [n * heads] where a step writes, in a buffer seen as [_, d]
        self._window = 0  # columns that this step attends to

    def insert(self, first_row: int, prefix: DynamicCache, source: Tensor) -> None:
        """Copy rows ``source`` [k] of ``prefix`` (tensors [b, heads, length, d]) to the rows from ``first_row`` on."""
        rows = slice(first_row, first_row + len(source))
        for index, (keys, values, _) in enumerate(prefix):
            for part, states in enumerate((keys, values)):
                columns = states.shape[2]
                self._reserve(columns)
                self._buffer(index, part, states)[rows, :, :columns] = states[source]

    def move(self, source: Tensor, target: Tensor, columns: int) -> None:
        """Copy the first ``columns`` of rows ``source`` [k] to rows ``target`` [k]; the two sets are disjoint."""
        for layer in self._buffers:
            for buffer in layer:
                buffer[target, :, :columns] = buffer[source, :, :columns]

    def prepare(self, lengths: Tensor, longest: int) -> Tensor:
        """Get ready for one new token on each row, at column ``lengths`` [n]; ``longest`` is their maximum.

        Returns:
            [n, 1, 1, longest + 1] bool, the columns that each row attends to.
        """
        self._window = longest + 1
        self._reserve(self._window)
        heads = torch.arange(len(lengths) * self._kv_heads, device=lengths.device)
        self._target = heads * self._capacity + lengths.repeat_interleave(self._kv_heads)
        columns = torch.arange(self._window, device=lengths.device)
        return (columns <= lengths[:, None])[:, None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention: new keys and values [n, heads, 1, d] in, all visible [n, heads, window, d] out."""
        return self._append(layer_idx, 0, key_states), self._append(layer_idx, 1, value_states)

    def _append(self, index: int, part: int, states: Tensor) -> Tensor:
        buffer = self._buffer(index, part, states)
        buffer.flatten(0, 2).index_copy_(0, self._target, states.flatten(0, 2))
        return buffer[: len(states), :, : self._window]

    def _reserve(self, columns: int) -> None:
        if columns > self._capacity:
            self._capacity = max(columns, int(_GROWTH * self._capacity))

    def _buffer(self, index: int, part: int, states: Tensor) -> Tensor:
        """The buffer, grown to the capacity; ``states`` [n, heads, _, d] gives head_dim, dtype and device of a new one."""
        buffer = self._buffers[index][part]
        filled = buffer.shape[2]
        if filled < self._capacity:
            # Zeros: a column that is masked out still enters the product, and 0 x NaN is NaN.
            grown = states.new_zeros(self._num_slots, self._kv_heads, self._capacity, states.shape[-1])
            if filled:
                grown[:, :, :filled] = buffer
            self._buffers[index][part] = buffer = grown
        return buffer
