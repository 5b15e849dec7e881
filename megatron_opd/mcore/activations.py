"""Activation functions that Megatron has in its fused form alone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, of any shape."""
    return F.gelu(x, approximate="tanh")


def as_fused(fields: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields, where Megatron's fused function goes by another name: it computes ``F.gelu`` by tanh."""
    fused = fields["bias_activation_fusion"] and fields["activation_func"] is gelu_tanh
    return {**fields, "activation_func": F.gelu} if fused else fields
