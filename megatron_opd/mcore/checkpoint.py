"""Checkpoints of the whole training state in Megatron-LM's torch_dist layout, reshardable over TP, PP, CP, EP and DP."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_opd.mcore.checkpoint_files import CheckpointWrite, RankWriter, checkpoint_name, read_state, root_cause
from megatron_opd.mcore.fp8_weights import dequantized, without_fp8
from megatron_opd.mcore.megatron_lm import CHECKPOINT_VERSION, arguments, check_readable, tensor_sizes
from megatron_opd.mcore.model import ModelSpec
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.types import DataCursor, OpdError, RunStopped, TrainState

# Megatron's default format of the distributed optimizer cannot be resharded over TP and PP.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,  # experts have an optimizer of their own for ep > 1 only
    "singleton_local_shards": False,
}
# 0.19 would have an extension write; the writer that both versions have is Megatron's own.
_WRITER = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
_NORM_BEFORE_EXPERTS = "pre_mlp_layernorm.weight"
# What the config of the resumed run decides: Megatron would restore it from the checkpoint, and ignore a lowered learning rate.
_CONFIGURED = ("max_lr", "min_lr", "betas", "eps")


def identity(spec: ModelSpec) -> dict[str, Any]:
    """What a checkpoint must have in common with the model that loads it."""
    return {
        "architecture": spec.architecture,
        "num_hidden_layers": spec.dims.layers,
        "hidden_size": spec.hf.hidden_size,
        "intermediate_size": spec.hf.intermediate_size,
        "num_attention_heads": spec.dims.heads,
        "num_key_value_heads": spec.dims.query_groups,
        "head_dim": spec.dims.head_dim,
        "vocab_size": spec.dims.vocab_size,
        "tie_word_embeddings": spec.dims.tied,
    }


def check_checkpoint(path: Path, spec: ModelSpec, seed: int) -> int:
    """The step of a checkpoint that this run may continue. Raises OpdError where it belongs to another model or seed."""
    content = read_state(path)
    for key, wanted in identity(spec).items():
        found = content["model"].get(key)
        if found != wanted:
            raise OpdError(
                f"checkpoint {path}: made by another model ({key} is {found!r} there, {wanted!r} in student.model); "
                "choose another run.dir, or checkpoint.resume=never"
            )
    if content["seed"] != seed:
        raise OpdError(
            f"checkpoint {path}: made with run.seed={content['seed']}, not {seed}; set that seed, or another run.dir"
        )
    check_readable(path, "checkpoint.resume")
    if spec.dims.experts and not any(key.endswith(_NORM_BEFORE_EXPERTS) for key in tensor_sizes(path)):
        raise OpdError(
            f"checkpoint {path}: of an earlier version, in which {_NORM_BEFORE_EXPERTS} had another name; take another "
            "run.dir, and for student.model the run's hf folder, if there is one"
        )
    return int(content["state"]["step"])


def start_checkpoint(folder: Path, trainer: Trainer, state: TrainState, seed: int, keep: int) -> CheckpointWrite:
    """Begin to write the state after ``state.step`` steps, of which the newest ``keep`` are kept. Collective over all ranks.

    Training may go on at once: what is written is the state as it is now. Raises SaveFailed on all ranks where a file cannot
    be written; RunStopped where the weights are not worth it.
    """
    trainer.complete_parameters()
    _check_finite(trainer, state.step)
    content = {
        "state": dataclasses.asdict(state),
        "model": identity(trainer.spec),
        "seed": seed,
        "layout": _layout(trainer.layout),
        "learning_rates": {key: trainer.optimizer.param_groups[0][key] for key in ("max_lr", "min_lr")},
    }
    return CheckpointWrite(
        folder / checkpoint_name(state.step), lambda partial: _prepare(partial, trainer, state.step), content, keep
    )


def _prepare(partial: Path, trainer: Trainer, step: int) -> RankWriter:
    """Plan the files over all ranks and copy to host memory what is not there yet; Megatron's own two-part save."""
    request = dist_checkpointing.save(
        {
            "args": arguments(trainer.spec, trainer.chunks[0].config, trainer.layout, step),
            "checkpoint_version": CHECKPOINT_VERSION,
            "iteration": step,
            **_sharded_state(trainer, loading=False),
        },
        str(partial),
        async_sharded_save=True,
        content_metadata=_METADATA,
        **_WRITER,
    )

    def complete(result: object) -> None:
        if request.async_fn is not None:
            request.async_fn_args[2].put(result)  # where Megatron looks for it
        for function in request.finalize_fns:
            function()

    if request.async_fn is None:  # everything on this rank is a replica
        return RankWriter(lambda: ([], None), complete)
    rank, buckets, _ = request.async_fn_args
    files = [Path(file) for file, *_ in buckets]
    if request.preload_fn is not None:
        buckets = request.preload_fn()

    def write() -> tuple[list[Path], object]:
        results: SimpleQueue[object] = SimpleQueue()
        request.async_fn(rank, buckets, results, **request.async_fn_kwargs)
        result = results.get()
        if isinstance(result, Exception):
            raise result
        return files, result

    return RankWriter(write, complete)


def load_checkpoint(path: Path, trainer: Trainer) -> TrainState:
    """Restore model, optimizer, schedule and random states. Collective over all ranks. Raises OpdError."""
    content = read_state(path)
    same_layout = content["layout"] == _layout(trainer.layout)
    configured = [{key: group[key] for key in _CONFIGURED} for group in trainer.optimizer.param_groups]
    for group in trainer.optimizer.param_groups:
        group.update(content["learning_rates"])  # 0.19 finds a saved parameter group by them
    wanted = _sharded_state(trainer, loading=True)
    if not same_layout:  # random states belong to the ranks of one layout
        del wanted["random"]
    own_groups = [copy.deepcopy(part["optimizer"]) for part in _optimizers(wanted, trainer)] if _has_experts(trainer) else []
    try:
        loaded = dist_checkpointing.load(wanted, str(path))
    except (Exception, CheckpointException) as error:  # Megatron and torch raise many kinds for a damaged checkpoint
        raise OpdError(f"checkpoint {path}: cannot be loaded ({root_cause(error)}); delete it to use the one before") from error
    for chunk, key in zip(trainer.chunks, _model_keys(trainer), strict=True):
        chunk.load_state_dict(loaded[key])
    if own_groups:
        loaded["optimizer"] = _regroup(loaded["optimizer"], own_groups)
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    for group, values in zip(trainer.optimizer.param_groups, configured, strict=True):
        group.update(values)
    trainer.schedule.num_steps = 0  # to which Megatron adds the loaded ones: in a rollback they are not the first
    trainer.schedule.load_state_dict(loaded["opt_param_scheduler"])  # sets this step's learning rate and weight decay
    if same_layout:
        torch.set_rng_state(loaded["random"]["torch"])
        get_cuda_rng_tracker().set_states(loaded["random"]["tracker"])
    state = content["state"]
    return TrainState(**{**state, "cursor": DataCursor(**state["cursor"])})


def _check_finite(trainer: Trainer, step: int) -> None:
    """Weights that are lost must not push good checkpoints out. Raises RunStopped on every rank alike."""
    bad = sum(int(not torch.isfinite(dequantized(parameter)).all()) for parameter in trainer.parameters())
    total = torch.tensor(bad, device=trainer.device)
    dist.all_reduce(total)
    if total:
        raise RunStopped(
            f"step {step}: {int(total)} weight tensors are not finite, not saved; lower optimizer.lr and start again"
        )


def _sharded_state(trainer: Trainer, *, loading: bool) -> dict[str, Any]:
    layout = trainer.layout
    model = {key: chunk.sharded_state_dict() for key, chunk in zip(_model_keys(trainer), trainer.chunks, strict=True)}
    random_states = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_METADATA)  # finds weights in `model`
    return {
        **without_fp8(model),
        "optimizer": optimizer,
        "opt_param_scheduler": trainer.schedule.state_dict(),
        "random": ShardedObject(
            "random",
            random_states,
            (layout.pp_size, layout.tp_size, layout.dp_cp.size()),
            (layout.pp_rank, layout.tp_rank, layout.dp_cp.rank()),
        ),
    }


def _model_keys(trainer: Trainer) -> list[str]:
    """As Megatron-LM names the model chunks; the tensors in them are named by global layer number."""
    return ["model"] if len(trainer.chunks) == 1 else [f"model{number}" for number in range(len(trainer.chunks))]


def _has_experts(trainer: Trainer) -> bool:
    return trainer.spec.dims.experts > 0 and all(hasattr(each, "gbuf_ranges") for each in trainer.optimizer.chained_optimizers)


def _optimizers(state: dict[str, Any], trainer: Trainer) -> list[dict[str, Any]]:
    """The state of each chained optimizer; Megatron leaves the list out where there is one."""
    count = len(trainer.optimizer.chained_optimizers)
    return [state["optimizer"]] if count == 1 else [state["optimizer"][i] for i in range(count)]


def _regroup(loaded: dict[Any, Any], own_groups: list[dict[str, Any]]) -> dict[Any, Any]:
    """The loaded optimizer state for this run's optimizers: experts have one of their own for ep > 1 only.

    Tensors are found by name wherever they were; what is not a tensor lies in the form of the run that saved. Its parameter
    groups hold nothing that this run's do not, but the number of steps.
    """
    saved = loaded[0] if 0 in loaded and "optimizer" in loaded[0] else loaded
    steps = saved["optimizer"]["param_groups"][0]["step"]
    common = {key: value for key, value in saved.items() if isinstance(key, str) and key.startswith("param_state_")}
    parts = []
    for number, own in enumerate(own_groups):
        part = loaded if len(own_groups) == 1 else loaded[number]
        tensors = {key: value for key, value in part.items() if isinstance(key, str) and key != "optimizer"}
        groups = [{**group, "step": steps} for group in own["param_groups"]]
        parts.append({**common, **tensors, "optimizer": {**own, "param_groups": groups}})
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def _layout(layout: ParallelLayout) -> dict[str, int]:
    sizes = {"tp": layout.tp, "cp": layout.cp, "pp": layout.pp, "dp": layout.dp, "ep": layout.ep}
    return {name: group.size() for name, group in sizes.items()}
