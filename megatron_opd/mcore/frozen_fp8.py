"""A frozen model's linear layers in FP8 by ModelOpt: held as E4M3, made whole again for each product.

One scale for each output row, found over the tensor-parallel ranks, so that the layout changes no weight.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Sequence

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.nn import Module, Parameter

from megatron_opd.config import ParallelConfig
from megatron_opd.mcore.model import HiddenStateModel, ModelSpec
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.types import OpdError

# Weights alone: activations stay in the run's dtype, so there is nothing to calibrate.
_WEIGHTS = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": 0}},
    ],
    "algorithm": "max",
}
_SCALES = 2  # of each row, in the weight's dtype: ModelOpt keeps the range beside the scale
_TRANSIENT = 2  # copies of the weight in the run's dtype during a product: converted, then scaled


def check_fp8(spec: ModelSpec, parallel: ParallelConfig, section: str) -> None:
    """Raises OpdError, with ``section`` of the config, for what ModelOpt cannot do."""
    if spec.dims.experts and parallel.tp > 1 and parallel.ep > 1:
        raise OpdError(
            f"{section}.quantize: fp8, but ModelOpt quantises no experts with tp={parallel.tp} and ep={parallel.ep}; set one "
            f"of the two of {section}.parallel to 1, or {section}.quantize=null"
        )


def quantize_to_fp8(chunks: Sequence[HiddenStateModel], layout: ParallelLayout) -> None:
    """In place, with weights loaded; the embedding and the norms stay. Collective over the tensor-parallel group."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.utils.distributed import ParallelState

    nobody = -1  # ModelOpt's name for no group
    for name, module in (named for chunk in chunks for named in chunk.named_modules()):
        # ModelOpt would take the student's groups, which are Megatron's global ones. Each expert is whole on its rank.
        if isinstance(module, SequentialMLP):
            module.parallel_state = ParallelState(nobody, nobody, nobody)
        elif next(module.parameters(recurse=False), None) is not None:  # local linear layers, or Transformer Engine's
            module._parallel_state = ParallelState(nobody, nobody if ".experts." in name else layout.tp)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for chunk in chunks:
            mtq.quantize(chunk, _WEIGHTS)
            mtq.compress(chunk)


def fp8_bytes(modules: Iterable[Module]) -> tuple[int, int]:
    """Of modules as built, before :func:`quantize_to_fp8`: bytes that it saves, and bytes that a product takes for a while."""
    weights = [each.weight for each in modules if isinstance(each, ColumnParallelLinear | RowParallelLinear)]
    found = [weight for weight in weights if isinstance(weight, Parameter)]
    saved = sum((each.itemsize - 1) * each.numel() - _SCALES * each.shape[0] * each.itemsize for each in found)
    return saved, _TRANSIENT * max((each.numel() * each.itemsize for each in found), default=0)
