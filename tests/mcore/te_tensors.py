"""Transformer Engine's own FP8 tensors without a GPU: its Python classes, over stand-ins in torch for its compiled kernels.

For a process of its own, whose path has the modules of tests/stand_ins. The classes are those of the wheel in
``.transformer-engine``; so are the recipes, and what quantises the optimizer's master weights.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

OWN = Path(__file__).parents[2] / ".transformer-engine"  # make test-fp8-recipes
_recipe: str | None = None  # of the weights that are made now
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_BLOCK = 128
_REAL = (
    "common.recipe",
    "pytorch.constants",
    "pytorch.quantized_tensor",
    "pytorch.tensor",
    "pytorch.torch_version",
    "pytorch.utils",
)
_REAL_ALONE = ("pytorch.optimizers.multi_tensor_apply",)


class _DType(enum.IntEnum):
    """As in ``transformer_engine.h``."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class _Numbers(SimpleNamespace):
    """An enumeration, none of whose members is used here."""

    def __getattr__(self, name: str) -> int:
        return 0


class _Finder:
    """Finds the wheel's modules before the stand-ins of the same names; it has no ``__init__`` that loads CUDA libraries."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        short = name.removeprefix("transformer_engine.")
        if short not in _REAL_ALONE and not any(short == each or short.startswith(f"{each}.") for each in _REAL):
            return None
        path = OWN / "transformer_engine" / Path(*short.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return importlib.util.spec_from_file_location(name, file)


def install() -> None:
    """Before anything imports Transformer Engine or Megatron."""
    own: Any = _Finder()
    sys.meta_path.insert(0, own)
    _module("transformer_engine_torch", **_kernels())
    _module("transformer_engine.debug")
    _module("transformer_engine.debug.pytorch")
    _module("transformer_engine.debug.pytorch.debug_quantization", DebugQuantizedTensor=type("DebugQuantizedTensor", (), {}))
    _module("transformer_engine.pytorch.dynamo", register_value_opaque_quantizer=lambda each: None)
    _module("transformer_engine.pytorch.optimizers")  # its optimizer is CUDA's; Megatron takes torch's
    import transformer_engine.common

    transformer_engine.common.decode_cudnn_version = None
    from transformer_engine.pytorch import utils

    utils.is_non_tn_fp8_gemm_supported = lambda: False  # as on a Hopper, whose products take transposed copies
    pytorch: Any = transformer_engine.pytorch
    for layer in (pytorch.Linear, pytorch.GroupedLinear):
        layer.__init__ = _holding(layer.__init__)
    pytorch.fp8_model_init = _fp8_model_init


def _module(name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(content)
    sys.modules[name] = module


def quantizer(recipe: str) -> Any:
    """Of weights, as Transformer Engine makes it of the recipe's defaults."""
    from transformer_engine.pytorch.tensor import Float8BlockQuantizer, Float8CurrentScalingQuantizer

    if recipe == "current":
        return Float8CurrentScalingQuantizer(_DType.kFloat8E4M3, torch.device("cpu"))
    return Float8BlockQuantizer(_DType.kFloat8E4M3, rowwise=True, columnwise=True)


@contextmanager
def _fp8_model_init(enabled: bool, recipe: Any, preserve_high_precision_init_val: bool) -> Iterator[None]:
    """As the real one's signature; layers that are made inside hold their weights in FP8."""
    assert enabled and preserve_high_precision_init_val
    global _recipe
    _recipe = {"Float8CurrentScaling": "current", "Float8BlockScaling": "blockwise"}[type(recipe).__name__]
    try:
        yield
    finally:
        _recipe = None


def _holding(init: Callable[..., None]) -> Callable[..., None]:
    def made(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if _recipe is not None:
            for name in [name for name, _ in self.named_parameters(recurse=False) if name.startswith("weight")]:
                _hold(self, name, _recipe)

    return made


def _hold(module: torch.nn.Module, name: str, recipe: str) -> None:
    """What ``reset_parameters`` of Transformer Engine's modules does to a weight."""
    plain = torch.nn.init.normal_(module.get_parameter(name))
    held = Parameter(quantizer(recipe)(plain.detach()))
    held._high_precision_init_val = plain.detach().clone()  # type: ignore[attr-defined]

    def get(self: Any) -> Any:
        return vars(self).get("_high_precision_init_val")

    def clear(self: Any) -> None:
        vars(self).pop("_high_precision_init_val", None)

    held.get_high_precision_init_val = MethodType(get, held)  # type: ignore[attr-defined]
    held.clear_high_precision_init_val = MethodType(clear, held)  # type: ignore[attr-defined]
    setattr(module, name, held)


def _kernels() -> dict[str, Any]:
    def quantize(source: Tensor, quantizer: Any, out: Any = None, _noop: Any = None) -> Any:
        from transformer_engine.pytorch.tensor import Float8BlockQuantizer, Float8Quantizer

        if isinstance(quantizer, Float8BlockQuantizer):
            return _by_blocks(source, quantizer, out)
        if isinstance(quantizer, Float8Quantizer):  # at a scale that was found before
            out._data.copy_(_bytes(source.float() * quantizer.scale))
            return out
        return _as_one(source, quantizer, out)

    def partial_amax(shard: Tensor, amaxes: Tensor, rows: int, columns: int, start: int, _block: int) -> None:
        whole = torch.zeros(rows * columns)
        whole[start : start + shard.numel()] = shard.flatten().float()
        found = _block_amax(whole.view(rows, columns))
        amaxes[:, : found.shape[1]].copy_(found)

    def partial_cast(
        shard: Tensor, out: Tensor, scales: Tensor, rows: int, columns: int, start: int, _block: int, _dtype: Any
    ) -> None:
        spread = _spread(scales, rows, columns).flatten()[start : start + shard.numel()]
        out.copy_(_bytes(shard.flatten().float() * spread))

    def scale_and_inverse(
        _chunk: int, _noop: Tensor, lists: Sequence[Sequence[Tensor]], largest: float, powers: bool, _epsilon: float
    ) -> None:
        for amax, scale, inverse in zip(*lists, strict=True):
            scale.copy_(_scale(amax, powers, largest).view_as(scale))
            inverse.copy_(1 / scale.view_as(inverse))

    def transpose(data: Tensor, _dtype: Any, out: Tensor | None = None) -> Tensor:
        turned = data.t().contiguous()
        return turned if out is None else out.copy_(turned)

    unused = ("multi_tensor_scale", "multi_tensor_compute_scale_inv_e8m0")
    return {
        "DType": _DType,
        "FP8FwdTensors": _Numbers(),
        "FP8BwdTensors": _Numbers(),
        "quantize": quantize,
        "fp8_transpose": transpose,
        "compute_amax": lambda tensor, amax: amax.copy_(tensor.abs().max().float().view_as(amax)),
        "multi_tensor_compute_scale_and_scale_inv": scale_and_inverse,
        "fp8_block_scaling_compute_partial_amax": partial_amax,
        "fp8_block_scaling_partial_cast": partial_cast,
        **dict.fromkeys(unused),
    }


def _as_one(source: Tensor, quantizer: Any, out: Any) -> Any:
    from transformer_engine.pytorch.tensor import Float8Tensor

    scale = _scale(source.abs().max().float().view(1), quantizer.force_pow_2_scales)
    data = _bytes(source.float() * scale)
    if out is not None:
        out._data.copy_(data)
        out._scale_inv.copy_(1 / scale)
        out._create_transpose()
        return out
    return Float8Tensor(
        shape=source.shape,
        dtype=source.dtype,
        data=data,
        fp8_scale_inv=1 / scale,
        fp8_dtype=quantizer.dtype,
        data_transpose=data.t().contiguous(),
        quantizer=quantizer,
        device=source.device,
    )


def _by_blocks(source: Tensor, quantizer: Any, out: Any) -> Any:
    from transformer_engine.pytorch.tensor import Float8BlockwiseQTensor

    scales = torch.ones(quantizer.get_scale_shape(source.shape, False))
    amaxes = _block_amax(source.float())
    scales[:, : amaxes.shape[1]] = _scale(amaxes, quantizer.force_pow_2_scales)
    data = _bytes(source.float() * _spread(scales, *source.shape))
    if out is None:
        out = Float8BlockwiseQTensor(
            shape=source.shape,
            dtype=source.dtype,
            rowwise_data=data,
            rowwise_scale_inv=1 / scales,
            columnwise_data=None,
            columnwise_scale_inv=None,
            fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
            is_2D_scaled=True,
            device=source.device,
        )
    else:
        out._rowwise_data.copy_(data)
        out._rowwise_scale_inv.copy_(1 / scales)
    out._create_columnwise()
    return out


def _scale(amax: Tensor, powers: bool, largest: float = _LARGEST) -> Tensor:
    """By which the largest number becomes the largest of E4M3, or the power of two below it; 1 where all are zero."""
    scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
    return torch.exp2(torch.floor(torch.log2(scale))) if powers else scale


def _block_amax(matrix: Tensor) -> Tensor:
    """[rows/128, columns/128], rounded up."""
    rows, columns = (-(-size // _BLOCK) for size in matrix.shape)
    padded = torch.zeros(rows * _BLOCK, columns * _BLOCK)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix.abs()
    return padded.view(rows, _BLOCK, columns, _BLOCK).amax((1, 3))


def _spread(scales: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns]: of each number its block's."""
    return scales.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)[:rows, :columns]


def _bytes(scaled: Tensor) -> Tensor:
    return scaled.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
