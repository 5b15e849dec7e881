"""From Hugging Face to Megatron-LM and back, one entry of the mapping table in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_opd.config import ParallelConfig
from megatron_opd.conversion.safetensors_file import ShardedWriter, plan_shards
from megatron_opd.conversion.target import copy_all_but_weights, new_folder
from megatron_opd.conversion.weights import HFWeights, MegatronWeights
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.checkpoint_files import LATEST
from megatron_opd.mcore.hf_mapping import entries
from megatron_opd.mcore.model import model_spec
from megatron_opd.mcore.sharding import Entry
from megatron_opd.mcore.torch_dist import WeightWriter
from megatron_opd.mcore.weight_places import Blueprint, blueprint
from megatron_opd.types import OpdError

RELEASE = "release"  # Megatron-LM's name for weights that no training step of its own has made
HF_FILES = "hf"  # beside it: config.json, tokenizer and so on, byte for byte
Report = Callable[[int], None]  # takes the bytes that have just been read
StartReport = Callable[[int], Report]  # takes the bytes that there are


def to_megatron(
    source: Path, target: Path, parallel: ParallelConfig, dtype: torch.dtype | None, shard_bytes: int, start: StartReport
) -> None:
    """Write ``target`` as a checkpoint of Megatron-LM, which ``student.load`` reads too. Raises OpdError; nothing is left then.

    Args:
        parallel: the layout that is meant to load it: noted in its arguments, and the vocabulary is padded for its tp.
        dtype: of the result, but for buffers; None: as the source has it.
    """
    folder = HFFolder(source)
    weights = HFWeights(folder, model_spec(folder, parallel, "source"))
    spec = weights.spec
    table = {entry.megatron: entry for entry in entries(spec.architecture, spec.dims)}
    dtypes = {name: (None if entry.buffer else dtype) or _one_dtype(weights, entry) for name, entry in table.items()}
    plan = blueprint(spec, parallel, dtype or max(dtypes.values(), key=list(dtypes.values()).count), {})
    _check_keys(plan, dtypes, source)
    report = start(sum(info.nbytes for info in weights.tensors.values()))

    def full(name: str) -> Tensor:
        parts = weights.read(table[name])
        report(sum(part.nbytes for part in parts))
        return table[name].sharding.merge(parts, spec.dims).to(dtypes[name])

    needed = sum(place.numel * dtypes[name].itemsize for name in table for place in plan.places[name])
    with new_folder(target, needed) as partial:
        WeightWriter(partial / RELEASE, plan, shard_bytes).write(table, dtypes.__getitem__, full)
        copy_all_but_weights(source, partial / HF_FILES)
        (partial / LATEST).write_text(RELEASE, encoding="utf-8")


def to_hf(
    source: Path, target: Path, config: Path | None, dtype: torch.dtype | None, shard_bytes: int, start: StartReport
) -> None:
    """Write ``target`` as a Hugging Face folder. Raises OpdError; nothing is left then.

    Args:
        config: the folder with config.json, tokenizer and so on; None: the one that :func:`to_megatron` left in ``source``.
        dtype: of the result, but for buffers, also in its config.json; None: as the source has it.
    """
    files = config_folder(source, config)
    weights = MegatronWeights(source, model_spec(files, ParallelConfig(), "source"))
    buffers = {name for each in entries(weights.spec.architecture, weights.spec.dims) if each.buffer for name in each.hf}
    infos = {
        name: info if dtype is None or name in buffers else replace(info, dtype=dtype) for name, info in weights.tensors.items()
    }
    report = start(sum(info.nbytes for info in weights.tensors.values()))
    with new_folder(target, sum(info.nbytes for info in infos.values())) as partial:
        writer = ShardedWriter(partial, plan_shards(infos.values(), shard_bytes))
        for entry in entries(weights.spec.architecture, weights.spec.dims):
            for name, part in zip(entry.hf, weights.read(entry), strict=True):
                report(part.nbytes)
                writer.write(name, part.to(infos[name].dtype))
        writer.finish()
        copy_all_but_weights(files.path, partial)
        if dtype is not None:
            _set_dtype(partial / "config.json", dtype)


def config_folder(source: Path, config: Path | None) -> HFFolder:
    """Raises OpdError where the checkpoint brings no config.json and none is named."""
    folder = config or source / HF_FILES
    if not (folder / "config.json").is_file():
        raise OpdError(f"{folder / 'config.json'}: not there; name the Hugging Face folder of this model with --hf")
    return HFFolder(folder)


def _one_dtype(weights: HFWeights, entry: Entry) -> torch.dtype:
    """Of the HF tensors that one parameter is made of."""
    found = {weights.tensors[name].dtype for name in entry.hf}
    if len(found) > 1:
        raise OpdError(
            f"{weights.folder.path}: {', '.join(entry.hf)} become one tensor but have several dtypes; choose one with --dtype"
        )
    return found.pop()


def _check_keys(plan: Blueprint, dtypes: dict[str, torch.dtype], source: Path) -> None:
    """A tensor of the checkpoint holds all layers, in one dtype."""
    by_key: dict[str, torch.dtype] = {}
    for name, dtype in dtypes.items():
        for place in plan.places[name]:
            if by_key.setdefault(place.key, dtype) != dtype:
                raise OpdError(f"{source}: {place.key} has another dtype in {name} than before; choose one with --dtype")


def _set_dtype(file: Path, dtype: torch.dtype) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"  # the older name of the same key
    config[key] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
