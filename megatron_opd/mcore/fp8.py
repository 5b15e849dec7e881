"""FP8 matrix products by Transformer Engine: each recipe in Megatron's words, and what it asks of the GPU and of the sizes.

Gradients, the embedding, the norms, attention and the LM head stay as they are without it, and so do parameters, unless
``student.fp8_param`` has those of the products in FP8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_opd.config import Fp8Recipe, ParallelConfig, fp8_multiple
from megatron_opd.mcore.platform import Platform
from megatron_opd.types import OpdError


@dataclass(frozen=True)
class _Needs:
    fields: dict[str, Any]  # of TransformerConfig
    capability: tuple[int, int]  # of the oldest GPU, as in _compute_*_support of transformer_engine/pytorch/quantization.py
    gpu: str
    transformer_engine: tuple[int, int]  # the oldest version, as in get_fp8_recipe of megatron-core 0.16.1 and 0.19.2
    parameters: tuple[int, int] | None = None  # the oldest with this recipe in cast_master_weights_to_fp8; None: refused


_HYBRID = {"fp8": "hybrid"}  # gradients in E5M2, whose range per-tensor scales need
_E4M3 = {"fp8": "e4m3"}  # everywhere: a scale for each block leaves no need of E5M2's range
# Megatron's own defaults, a history of one pass and its latest value, would scale each pass by the one before alone.
_HISTORY = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
_NEEDS: dict[Fp8Recipe, _Needs] = {
    "delayed": _Needs({**_HYBRID, **_HISTORY, "fp8_recipe": "delayed"}, (8, 9), "Ada or Hopper", (1, 8)),
    "current": _Needs({**_HYBRID, "fp8_recipe": "tensorwise"}, (8, 9), "Ada or Hopper", (2, 2), (2, 2)),
    "blockwise": _Needs({**_E4M3, "fp8_recipe": "blockwise"}, (9, 0), "Hopper", (2, 3), (2, 4)),
    "mxfp8": _Needs({**_E4M3, "fp8_recipe": "mxfp8"}, (10, 0), "Blackwell", (2, 1)),
}
_BLOCK, _ROW_OF_SCALES, _SCALE = 128, 4, 4  # numbers on a side; scales to whose multiple a row is padded; bytes of each
_MXFP8_BELOW = (12, 0)  # Transformer Engine has not all of its products on GPUs from here on
# Of TransformerConfig: `student.fp8` and `student.fp8_param` decide these, or nothing here knows what they do.
_REFUSED = {
    "fp8": "set student.fp8",
    "fp8_recipe": "set student.fp8",
    "fp8_param": "set student.fp8_param",
    "fp8_quantizer_factory": "only the recipes of student.fp8 are supported; remove it",
    "fp4": "FP4 is not supported; remove it",
    "fp4_recipe": "FP4 is not supported; remove it",
    "fp4_param": "FP4 is not supported; remove it",
    "fp4_quantizer_factory": "FP4 is not supported; remove it",
}
_TUNING = ("fp8_", "first_last_layers_bf16", "num_layers_at_", "tp_only_amax_red", "moe_router_padding_for_")


def fp8_fields(recipe: Fp8Recipe | None, param: bool = False) -> dict[str, Any]:
    """TransformerConfig fields, all of which but ``fp8``, ``fp8_recipe`` and ``fp8_param`` are defaults."""
    return {} if recipe is None else {**_NEEDS[recipe].fields, "fp8_param": param}


def check_native(native: dict[str, Any], recipe: Fp8Recipe | None) -> None:
    """Raises OpdError for fields of ``student.megatron`` that FP8 decides, or that say nothing without it."""
    for name, remedy in _REFUSED.items():
        if name in native:
            raise OpdError(f"student.megatron.{name}: {native[name]!r}, but {remedy}")
    if recipe is None and (idle := tuning(native)):
        raise OpdError(
            f"student.megatron.{idle[0]}: {native[idle[0]]!r} says nothing without FP8; set student.fp8 or remove it"
        )
    if recipe == "delayed" and native.get("first_last_layers_bf16"):
        raise OpdError(
            "student.megatron.first_last_layers_bf16: true, but with delayed scaling all layers share one context; "
            "set student.fp8=current or false"
        )


def tuning(native: dict[str, Any]) -> list[str]:
    """The fields among ``native`` that say how FP8 is computed."""
    return [name for name in native if name.startswith(_TUNING)]


def without_tuning(native: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in native.items() if name not in tuning(native)}


def check_fp8_sizes(sizes: dict[str, int], parallel: ParallelConfig, recipe: Fp8Recipe, section: str) -> None:
    """Rows and columns of every product are multiples of 16, or of mxfp8's blocks; ``sizes``: on one rank, by name.

    Raises OpdError, with ``section`` of the config.
    """
    multiple = fp8_multiple(recipe)
    for name, size in sizes.items():
        if size % multiple:
            raise OpdError(
                f"{section}.fp8: {recipe} needs multiples of {multiple}, but {name} is {size} on each rank of "
                f"tp={parallel.tp}; lower {section}.parallel.tp or set {section}.fp8=null"
            )


def check_fp8_platform(platform: Platform, recipe: Fp8Recipe, section: str) -> None:
    """Raises OpdError, with ``section`` of the config, where the machine cannot compute the recipe."""
    needs, key = _NEEDS[recipe], f"{section}.fp8"
    capability, version = platform.capability(), platform.transformer_engine_version()
    if capability is None:
        raise OpdError(f"{key}: {recipe} needs a GPU ({needs.gpu}, or later), but no GPU is visible; set {key}=null")
    if version is None:
        raise OpdError(f"{key}: {recipe} needs Transformer Engine, which is not installed; install it or set {key}=null")
    if version < needs.transformer_engine:
        raise OpdError(
            f"{key}: {recipe} needs Transformer Engine {_dotted(needs.transformer_engine)}, but {_dotted(version)} is "
            f"installed; update it or set {key}=null"
        )
    check_fp8_capability(capability, recipe, section)


def check_fp8_capability(capability: tuple[int, int], recipe: Fp8Recipe, section: str) -> None:
    """Raises OpdError, with ``section`` of the config, where GPUs of this compute capability have not the recipe's products."""
    needs, key = _NEEDS[recipe], f"{section}.fp8"
    if capability < needs.capability or (recipe == "mxfp8" and capability >= _MXFP8_BELOW):
        below = f" below {_dotted(_MXFP8_BELOW)}" if recipe == "mxfp8" else ""
        raise OpdError(
            f"{key}: {recipe} needs {needs.gpu} (compute capability {_dotted(needs.capability)} or more{below}), but this "
            f"one has {_dotted(capability)}; set {key}={_instead(capability)}"
        )


def check_fp8_param_platform(platform: Platform, recipe: Fp8Recipe) -> None:
    """After :func:`check_fp8_platform`. Raises OpdError where Transformer Engine cannot update parameters in FP8."""
    needed, version = _NEEDS[recipe].parameters, platform.transformer_engine_version()
    assert needed is not None and version is not None
    if version < needed:
        raise OpdError(
            f"student.fp8_param: true needs Transformer Engine {_dotted(needed)} with student.fp8={recipe}, but "
            f"{_dotted(version)} is installed; update it or set student.fp8_param=false"
        )


def fp8_weight_bytes(recipe: Fp8Recipe, rows: int, columns: int) -> int:
    """Of a weight [rows, columns] held in FP8 with the transposed copy that products of the backward take on Hopper.

    Scales as in ``get_scale_shape`` of Transformer Engine's quantizers. On Blackwell "current" has no copy.
    """
    if recipe != "blockwise":
        return 2 * rows * columns + _SCALE
    down, across = -(-rows // _BLOCK), -(-columns // _BLOCK)
    padded = down * _ROW_OF_SCALES * -(-across // _ROW_OF_SCALES) + across * _ROW_OF_SCALES * -(-down // _ROW_OF_SCALES)
    return 2 * rows * columns + padded * _SCALE


def _instead(capability: tuple[int, int]) -> str:
    return "current" if capability >= _NEEDS["current"].capability else "null"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
