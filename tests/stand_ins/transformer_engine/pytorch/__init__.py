"""Modules with the parameters of Transformer Engine's, as its documentation gives their names and shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from transformer_engine.pytorch import distributed, ops

__all__ = ["DotProductAttention", "GroupedLinear", "LayerNorm", "LayerNormLinear", "Linear", "RMSNorm", "distributed", "ops"]


class _WithState(Module):
    """Has the FP8 state that is part of a state dict; without FP8 it is empty."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None: ...

    def forward(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("a stand-in computes nothing")


def _local(out_features: int, in_features: int, parallel_mode: str | None, tp_size: int) -> tuple[int, int]:
    """Rows and columns of this rank's weight."""
    if parallel_mode == "column":
        return out_features // tp_size, in_features
    return out_features, in_features // tp_size if parallel_mode == "row" else in_features


class Linear(_WithState):
    """``weight`` [out, in], ``bias`` [out]: a rank's rows (column parallel) or columns (row parallel)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        params_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        rows, columns = _local(out_features, in_features, parallel_mode, tp_size)
        self.in_features, self.out_features, self.use_bias, self.parallel_mode = columns, rows, bias, parallel_mode
        self.save_original_input = False  # Megatron sets it under FP8
        self.weight = Parameter(torch.zeros(rows, columns, dtype=params_dtype))
        if bias:
            self.bias = Parameter(torch.zeros(rows, dtype=params_dtype))


class LayerNormLinear(Linear):
    """And ``layer_norm_weight`` [in], with LayerNorm ``layer_norm_bias`` [in] too."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        normalization: str = "LayerNorm",
        params_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, params_dtype=params_dtype, **kwargs)
        self.layer_norm_weight = Parameter(torch.ones(in_features, dtype=params_dtype))
        if normalization == "LayerNorm":
            self.layer_norm_bias = Parameter(torch.zeros(in_features, dtype=params_dtype))


class GroupedLinear(_WithState):
    """``weight0`` to ``weight{n - 1}`` [out, in] and ``bias0`` ... [out]: one of each expert."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        params_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        rows, columns = _local(out_features, in_features, parallel_mode, tp_size)
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        for number in range(num_gemms):
            self.register_parameter(f"weight{number}", Parameter(torch.zeros(rows, columns, dtype=params_dtype)))
            if bias:
                self.register_parameter(f"bias{number}", Parameter(torch.zeros(rows, dtype=params_dtype)))

    def init_fp8_metadata(self, num_gemms: int = 1) -> None: ...


class RMSNorm(Module):
    """``weight`` [hidden]."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        *,
        hidden_size: int | None = None,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        size = normalized_shape if normalized_shape is not None else hidden_size
        assert size is not None
        self.weight = Parameter(torch.ones(size, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(RMSNorm):
    """And ``bias`` [hidden]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias = Parameter(torch.zeros_like(self.weight))


class DotProductAttention(_WithState):
    """Without parameters, unless each head learns a term of the softmax's sum: ``softmax_offset`` [heads / tp].

    State that is missing in a checkpoint is not missed.
    """

    def __init__(self, num_attention_heads: int, *_: Any, softmax_type: str = "vanilla", tp_size: int = 1, **__: Any) -> None:
        super().__init__()
        if softmax_type == "learnable":
            self.softmax_offset = Parameter(torch.zeros(num_attention_heads // tp_size))
        self.register_load_state_dict_post_hook(_forget_missing_state)


def _forget_missing_state(_: Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith("core_attention._extra_state")]
