"""Parameters that Transformer Engine keeps in FP8: all that sets one apart from a plain tensor.

It shows the dtype and the shape that it stands for and has no storage: FP8 numbers, a transposed copy and scales are tensors
within it. What is copied to it is quantised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor


def dequantized(weight: Tensor) -> Tensor:
    """Detached, in the dtype that it stands for; the tensor itself where it is a plain one."""
    plain: Tensor = dequantize_fp8_tensor(weight.detach()) if is_float8tensor(weight) else weight.detach()
    return plain


def fill(weight: Tensor, values: Tensor) -> None:
    """``values``, rounded to the dtype that the weight stands for, are what it holds; see :func:`keep_unquantized`."""
    keep_unquantized([("", weight)], {"": values})
    weight.copy_(values.to(weight.dtype))


def keep_unquantized(weights: Iterable[tuple[str, Tensor]], values: Mapping[str, Tensor]) -> None:
    """For the optimizer that is yet to be built: its masters are ``values``, not what is left of them in FP8.

    ``weights``: with their names. Transformer Engine keeps for the masters, in host memory up to the first step, what a weight
    had when it was made: random numbers.
    """
    for name, weight in weights:
        if is_float8tensor(weight):
            weight.get_high_precision_init_val().copy_(values[name])  # type: ignore[attr-defined]


def memory(weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that have storages: what is within a weight in FP8, any other itself."""
    for weight in weights:
        if is_float8tensor(weight):
            parts: dict[str, Any] = weight.get_metadata()  # type: ignore[attr-defined]
            yield from (each for each in parts.values() if isinstance(each, Tensor))
        else:
            yield weight


def without_fp8(state: dict[str, Any]) -> dict[str, Any]:
    """``state``, a model's sharded state, with the values of FP8 weights in host memory, to be saved or read into.

    Whether Megatron does so itself depends on its version and on Transformer Engine's.
    """
    for each in nested_values(state):
        if isinstance(each, ShardedTensor | ShardedTensorFactory) and is_float8tensor(each.data):
            each.data = dequantized(each.data).cpu()
    return state
