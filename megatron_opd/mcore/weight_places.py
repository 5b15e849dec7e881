"""Where each parameter lies in a torch_dist checkpoint, asked of Megatron's own modules; nothing is allocated.

The model is built on one rank of a fake world, and its ``sharded_state_dict`` says key, global shape and offset of everything:
the very call with which the trainer loads, so the converter cannot name a tensor in another way.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

from megatron_opd.config import ParallelConfig
from megatron_opd.mcore.fake_world import FAKE, fake_rank
from megatron_opd.mcore.hf_mapping import named_weights, own_weights
from megatron_opd.mcore.megatron_lm import arguments, sharded_state
from megatron_opd.mcore.model import ModelSpec, build_model, transformer_config
from megatron_opd.mcore.parallel import init_layout
from megatron_opd.mcore.platform import Platform


@dataclass(frozen=True)
class Place:
    """Consecutive rows of one parameter, as a block of a tensor in the file."""

    key: str  # of the tensor in the file, which may hold all layers
    global_shape: tuple[int, ...]  # of that tensor: layers (and experts) first where it holds them all
    offset: tuple[int, ...]  # of the block in it
    local_shape: tuple[int, ...]  # of the rows, as the model has them

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the block: 1 for each layer or expert dimension, and the rows."""
        return (1,) * (len(self.offset) - len(self.local_shape)) + self.local_shape

    @property
    def stacked(self) -> bool:
        """Whether the tensor in the file holds all layers."""
        return len(self.offset) > len(self.local_shape)

    @property
    def rows(self) -> int:
        return self.local_shape[0]

    @property
    def numel(self) -> int:
        return prod(self.local_shape)


@dataclass(frozen=True)
class Blueprint:
    """A model's checkpoint without its weights."""

    places: dict[str, tuple[Place, ...]]  # by the canonical names of the mapping table; together all rows of the parameter
    objects: dict[str, object]  # by key in the file: the state of FP8 scaling, of which there is none; Megatron-LM asks for it
    arguments: Namespace  # Megatron-LM's


def blueprint(
    spec: ModelSpec, parallel: ParallelConfig, dtype: torch.dtype, metadata: dict[str, object], platform: Platform = FAKE
) -> Blueprint:
    """Of the whole model on one rank; ``parallel`` is only noted in the arguments.

    Args:
        metadata: a checkpoint's own content metadata, which decides names; empty for a new one.
        platform: whose layer spec is built; a checkpoint is the same for each.

    Raises RuntimeError in a process that belongs to a world already, or sees a GPU.
    """
    alone = ParallelConfig()
    with fake_rank(0, 1):
        layout = init_layout(alone, seed=0)
        config = transformer_config(spec, alone, platform, dtype, {"perform_initialization": False})
        (chunk,) = build_model(spec, config, layout, platform)
        canonical = {id(each): name for name, each in named_weights([chunk], 0).items()}
        own_names = {name: canonical[id(each)] for name, each in own_weights(chunk)}
        state = sharded_state(chunk, metadata)
        apply_factories(state)
        objects = {each.unique_key: each.data for each in state.values() if isinstance(each, ShardedObject)}
        places = {own_names[name]: tuple(map(_place, _tensors(each))) for name, each in state.items() if name in own_names}
        given = arguments(spec, config, layout, iteration=0)
    given.tensor_model_parallel_size = parallel.tp
    given.pipeline_model_parallel_size = parallel.pp
    given.expert_model_parallel_size = parallel.ep
    given.world_size = max(parallel.tp, parallel.ep) * parallel.pp
    given.no_save_optim = True
    return Blueprint(places, objects, given)


def _tensors(value: Any) -> Iterator[ShardedTensor]:
    """A parameter of one block, or of several in the order of its rows."""
    if isinstance(value, ShardedTensor):
        yield value
    else:
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _place(sharded: ShardedTensor) -> Place:
    return Place(sharded.key, tuple(sharded.global_shape), tuple(sharded.global_offset), tuple(sharded.local_shape))
