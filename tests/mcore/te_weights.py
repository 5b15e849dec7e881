"""A student whose weights Transformer Engine holds in FP8, from its folder to an optimizer step, a checkpoint and back.

For processes of their own, one for each data-parallel rank; te_tensors.py says what of Transformer Engine is real. Its layers
compute nothing: the gradients are drawn.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.mcore.te_tensors import install, quantizer

if TYPE_CHECKING:
    from megatron_opd.mcore.model import HiddenStateModel
    from megatron_opd.mcore.trainer import Trainer

Weights = dict[str, Tensor]
SHAPE = (208, 320)


@dataclass(frozen=True)
class Found:
    """By Megatron's own names, but for what is exported; whole on every rank."""

    in_fp8: tuple[str, ...]
    exported: Weights
    held: Weights  # dequantised by Transformer Engine
    masters: Weights
    masters_of_megatron_lm: Weights  # where the weights come from its checkpoint
    plain: Weights  # those of a model in bf16
    storages: tuple[int, int]  # bytes of the weights while they are lent, and after
    exported_within_offload: Weights  # while they are back alone, as for a push
    exported_after_offload: Weights
    stepped: Weights  # held after a step
    stepped_masters: Weights
    expected: Weights  # the stepped masters, quantised whole
    stale: tuple[str, ...]  # whose transposed copy is not of what is held
    exported_after_step: Weights
    resumed: Weights
    resumed_masters: Weights
    resumed_export: Weights
    resumed_in_bf16: Weights  # exported by a model in bf16 that reads the checkpoint
    nbytes: int  # of all that a weight of SHAPE holds


def main() -> None:
    """Rank 0 pickles what it finds, by recipe: ``OUT MODEL MEGATRON RANK SIZE`` in sys.argv; checkpoints go beside OUT."""
    install()
    out, model, megatron_lm, rank, size = sys.argv[1:]
    _gather_one_by_one()
    store = dist.FileStore(f"{out}.store", int(size))
    dist.init_process_group("gloo", rank=int(rank), world_size=int(size), store=store)
    from megatron.core import parallel_state

    found = {}
    for recipe in ("current", "blockwise"):
        found[recipe] = _found(Path(model), Path(megatron_lm), recipe, Path(out).parent / recipe)
        parallel_state.destroy_model_parallel()
    if rank == "0":
        Path(out).write_bytes(pickle.dumps(found))
    dist.barrier()


def _gather_one_by_one() -> None:
    """Megatron gathers weights in FP8 and in bf16 in one go, of which gloo, unlike NCCL, makes a muddle of both."""
    from megatron.core.distributed import param_and_grad_buffer

    import megatron_opd.mcore  # noqa: F401  (patches torch for Megatron)

    param_and_grad_buffer._coalescing_manager = lambda *_, **__: nullcontext()


def _found(folder: Path, megatron_lm: Path, recipe: Any, scratch: Path) -> Found:
    from megatron_opd.config import OptimizerConfig, ParallelConfig
    from megatron_opd.hf_folder import HFFolder
    from megatron_opd.mcore.checkpoint import load_checkpoint, start_checkpoint
    from megatron_opd.mcore.fp8_weights import memory
    from megatron_opd.mcore.megatron_lm import find_checkpoint, load_megatron_lm
    from megatron_opd.mcore.model import build_model, load_pretrained, model_spec, transformer_config
    from megatron_opd.mcore.parallel import init_layout
    from megatron_opd.mcore.platform import Platform
    from megatron_opd.mcore.trainer import Trainer
    from megatron_opd.types import TrainState
    from tests.mcore.training import STABLE_OPD

    parallel, source = ParallelConfig(), HFFolder(folder)
    platform = Platform(torch.device("cpu"), "gloo", transformer_engine=True)
    spec, layout = model_spec(source, parallel, "student"), init_layout(parallel, seed=1)

    def build(fp8_param: bool) -> tuple[HiddenStateModel, ...]:
        native = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 0}
        config = transformer_config(spec, parallel, platform, torch.bfloat16, native, fp8=recipe, fp8_param=fp8_param)
        return build_model(spec, config, layout, platform)

    def train(chunks: Sequence[HiddenStateModel]) -> Trainer:
        return Trainer(
            chunks,
            spec,
            layout,
            platform,
            STABLE_OPD,
            OptimizerConfig(lr=1e-2, warmup_steps=0),
            total_steps=3,
            loss_vocab_size=spec.dims.vocab_size,
            stop_ids=(2,),
            chunk_tokens=None,
            offload=True,
        )

    def start(fp8_param: bool = True) -> Trainer:
        chunks = build(fp8_param)
        load_pretrained(chunks, spec, source, layout)
        return train(chunks)

    trainer, plain = start(), build(fp8_param=False)
    load_pretrained(plain, spec, source, layout)
    from_megatron_lm = build(fp8_param=True)
    load_megatron_lm(from_megatron_lm, find_checkpoint(str(megatron_lm), "load"), "load")
    in_fp8 = tuple(name for name, weight in trainer.chunks[0].named_parameters() if _quantised(weight))
    exported, held, masters = _exported(trainer), _held(trainer), _masters(trainer)
    with trainer.off_device():
        with trainer.weights_on_device():
            exported_within_offload = _exported(trainer)
        lent = _bytes(memory(trainer.parameters()))
    storages = lent, _bytes(memory(trainer.parameters()))
    exported_after_offload = _exported(trainer)
    generator = torch.Generator().manual_seed(5)
    weights: list[Any] = trainer.parameters()
    for weight in weights:
        weight.main_grad.copy_(torch.randn(weight.shape, generator=generator))
    trainer.optimizer.step()
    stepped, stepped_masters = _held(trainer), _masters(trainer)
    expected = {name: quantizer(recipe)(stepped_masters[name].bfloat16()).dequantize() for name in in_fp8}
    saved = start_checkpoint(scratch, trainer, TrainState(step=1), seed=1, keep=1).finish()
    resumed, in_bf16 = start(), start(fp8_param=False)
    for each in (resumed, in_bf16):
        load_checkpoint(saved, each)
    return Found(
        in_fp8=in_fp8,
        exported=exported,
        held=held,
        masters=masters,
        masters_of_megatron_lm=_masters(train(from_megatron_lm)),
        plain={name: weight.detach().clone() for name, weight in plain[0].named_parameters()},
        storages=storages,
        exported_within_offload=exported_within_offload,
        exported_after_offload=exported_after_offload,
        stepped=stepped,
        stepped_masters=stepped_masters,
        expected=expected,
        stale=tuple(name for name in in_fp8 if _is_stale(trainer.chunks[0].get_parameter(name))),
        exported_after_step=_exported(trainer),
        resumed=_held(resumed),
        resumed_masters=_masters(resumed),
        resumed_export=_exported(resumed),
        resumed_in_bf16=_exported(in_bf16),
        nbytes=_bytes(memory([quantizer(recipe)(torch.ones(SHAPE, dtype=torch.bfloat16))])),
    )


def _quantised(weight: Tensor) -> bool:
    from transformer_engine.pytorch.tensor import QuantizedTensor

    return isinstance(weight, QuantizedTensor)


def _exported(trainer: Trainer) -> Weights:
    return {name: tensor.clone() for name, tensor in trainer.export().whole()}


@torch.no_grad()
def _held(trainer: Trainer) -> Weights:
    named = trainer.chunks[0].named_parameters()
    return {name: (each.dequantize() if _quantised(each) else each.detach()).clone() for name, each in named}


def _masters(trainer: Trainer) -> Weights:
    """Put together of all ranks' shards."""
    own: dict[str, tuple[int, Tensor]] = {}
    for optimizer in trainer.optimizer.chained_optimizers:
        for models, mains in zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True):
            for weight, main in zip(models, mains, strict=True):
                name = next(name for name, each in trainer.chunks[0].named_parameters() if each is weight)
                own[name] = optimizer._get_model_param_range_map(weight)["param"].start, main.detach().clone()
    shards: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shards, own)
    whole = {name: torch.full(each.shape, torch.nan).flatten() for name, each in trainer.chunks[0].named_parameters()}
    for start, main, name in ((*value, name) for each in shards for name, value in each.items()):
        whole[name][start : start + len(main)] = main
    return {name: whole[name].view(each.shape) for name, each in trainer.chunks[0].named_parameters()}


def _is_stale(weight: Any) -> bool:
    if hasattr(weight, "_transpose"):
        return bool(weight._transpose_invalid) or not torch.equal(weight._transpose, weight._data.t())
    return not torch.equal(weight._columnwise_data, weight._rowwise_data.t())


def _bytes(tensors: Any) -> int:
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())
