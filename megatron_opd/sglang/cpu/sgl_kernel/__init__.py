"""SGLang's kernels are published for CUDA alone: what its CPU path calls of them, in torch.

Any other name is there to be imported, and raises when it is called.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

__version__ = "0.4.10"  # whose interface this is


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,  # [B] row of each request
    req_to_token: torch.Tensor,  # [R, L] cache slots of each row, written here
    start_offset: torch.Tensor,  # [B]
    end_offset: torch.Tensor,  # [B]
    out_cache_loc: torch.Tensor,  # [sum(end - start)] the slots, request after request
    pool_len: int,
) -> None:
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Cache slots ``src_loc`` to ``tgt_loc`` in every layer's buffer; strides in bytes. All sources are read first."""
    for base, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(base + source * stride, stride) for source in src_loc.tolist()]
        for target, row in zip(tgt_loc.tolist(), rows, strict=True):
            ctypes.memmove(base + target * stride, row, stride)


class _Absent:
    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{self.__name__} has no CPU version")


def __getattr__(name: str) -> _Absent:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Absent(name)
