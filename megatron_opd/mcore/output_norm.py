"""Norms of what attention and MLP put out, before it is added to the residual: Megatron's layers have no place for them."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def norm_outputs(layer: ModuleSpec, norm: type) -> None:
    """Change a layer of either spec: the last linear layers of attention and of a dense MLP are followed by ``norm``."""
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp
    attention.linear_proj = _followed_by(norm, attention.linear_proj)
    dense = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules  # megatron-core 0.19; 0.16
    dense.linear_fc2 = _followed_by(norm, dense.linear_fc2)


def _followed_by(norm: type, linear: Any) -> type:
    """A row-parallel linear layer whose output is normed, with the norm's weight as ``post_layernorm.weight``.

    The norm sees whole rows: the linear layer has summed them over the tensor-parallel ranks, and under sequence parallelism
    scattered them, for which Megatron sums the gradients of norms over those ranks.
    """

    class NormedLinear(linear):
        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_layernorm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)
            # Not by a forward of its own: ModelOpt knows the linear layers that it quantises by theirs.
            self.register_forward_hook(_norm_output)

    return NormedLinear


def _norm_output(module: Any, _: Any, result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """[T, 1, out], or [T/tp, 1, out] under sequence parallelism, and no bias: the same, normed."""
    output, bias = result
    return module.post_layernorm(output), bias
