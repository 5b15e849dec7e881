"""A model's parameters in either of Megatron's layer specs: their canonical names, shapes, and places in a checkpoint.

The Transformer Engine spec is for a process of its own, whose path has the modules of tests/stand_ins.
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.fake_world import fake_rank
from megatron_opd.mcore.hf_export import Export
from megatron_opd.mcore.hf_mapping import named_weights
from megatron_opd.mcore.megatron_lm import find_checkpoint, load_megatron_lm
from megatron_opd.mcore.model import build_model, model_spec, transformer_config
from megatron_opd.mcore.parallel import init_layout
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.weight_places import Place, blueprint

MEGATRON = "megatron"  # the converted checkpoint, in the folder of the model


def platform(backend: str, transformer_engine: bool) -> Platform:
    return Platform(torch.device("cpu"), backend, transformer_engine)


@dataclass(frozen=True)
class Parameters:
    places: dict[str, tuple[Place, ...]]  # in a checkpoint, by canonical name
    shards: dict[str, tuple[int, ...]]  # shapes on the second of two ranks, by canonical name


def parameters(folder: Path, transformer_engine: bool) -> Parameters:
    """The second rank has its own experts, or its rows and columns."""
    alone = ParallelConfig()
    fake = platform("fake", transformer_engine)
    spec = model_spec(HFFolder(folder), alone, "source")
    places = blueprint(spec, alone, torch.float32, {}, fake).places
    experts = spec.dims.experts
    parallel = ParallelConfig(ep=2, dp=2) if experts else ParallelConfig(tp=2)
    spec = model_spec(HFFolder(folder), parallel, "source")
    with fake_rank(1, 2):
        layout = init_layout(parallel, seed=0)
        config = transformer_config(spec, parallel, fake, torch.float32, {"perform_initialization": False})
        named = named_weights(build_model(spec, config, layout, fake), layout.ep_rank * (experts // layout.ep_size))
        return Parameters(places, {name: tuple(parameter.shape) for name, parameter in named.items()})


def loaded(folder: Path) -> dict[str, Tensor]:
    """The Transformer Engine spec's weights by Hugging Face name; in a world of one rank."""
    gloo, alone = platform("gloo", transformer_engine=True), ParallelConfig()
    spec = model_spec(HFFolder(folder), alone, "source")
    layout = init_layout(alone, seed=0)
    chunks = build_model(spec, transformer_config(spec, alone, gloo, torch.float32, {}), layout, gloo)
    load_megatron_lm(chunks, find_checkpoint(str(folder / MEGATRON), "load"), "load")
    return {name: tensor.clone() for name, tensor in Export(chunks, spec.architecture, spec.dims, layout).whole()}


def main() -> None:
    """Pickles both of each folder: ``OUT FOLDER ...`` in sys.argv."""
    out, *folders = map(Path, sys.argv[1:])
    found = {folder: parameters(folder, transformer_engine=True) for folder in folders}  # in worlds that do not exist
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    weights = {}
    for folder in folders:
        weights[folder] = loaded(folder)
        parallel_state.destroy_model_parallel()
    out.write_bytes(pickle.dumps({folder: (found[folder], weights[folder]) for folder in folders}))
