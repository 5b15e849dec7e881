"""Inert stand-ins for Transformer Engine, which needs CUDA: parameters by its documented names and shapes, no kernels.

Only what megatron-core imports and subclasses, so that its real Transformer Engine layer spec builds on CPU.
"""

from transformer_engine import common, pytorch

__version__ = "2.9.0"

__all__ = ["common", "pytorch"]
