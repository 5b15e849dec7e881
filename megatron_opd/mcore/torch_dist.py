"""A torch_dist checkpoint's weights, one parameter in memory at a time: torch's own storage classes and our plans."""

from __future__ import annotations

import io
import json
import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    Metadata,
    ReadItem,
    SavePlan,
    TensorStorageMetadata,
    WriteItem,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_opd.mcore.checkpoint_files import root_cause
from megatron_opd.mcore.megatron_lm import CHECKPOINT_VERSION
from megatron_opd.mcore.weight_places import Blueprint, Place
from megatron_opd.types import OpdError


class WeightWriter:
    """Writes files of at most ``shard_bytes`` (more where one block is larger); torch keeps no more than one in memory."""

    def __init__(self, folder: Path, blueprint: Blueprint, shard_bytes: int) -> None:
        self._folder, self._blueprint, self._shard_bytes = folder, blueprint, shard_bytes

    def write(self, names: Iterable[str], dtype: Callable[[str], torch.dtype], full: Callable[[str], Tensor]) -> None:
        """The parameters ``names`` of the blueprint, in this order, into the folder, which this makes.

        Args:
            dtype: of a parameter, without reading it.
            full: a whole parameter, asked for once.
        """
        self._folder.mkdir()
        planner = _OneByOne(self._blueprint, full)
        plans = [SavePlan(items) for items in self._files(names, dtype)]
        writer = FileSystemWriter(self._folder)
        writer.set_up_storage_writer(is_coordinator=True)
        # Each file is planned like the one file of a rank, so that torch lets go of its tensors at its end.
        plans, metadata = create_default_global_save_plan(writer.prepare_global_plan(plans))
        writer.finish(metadata, [writer.write_data(plan, planner).wait() for plan in plans])
        # As megatron-core 0.16 has it, which newer versions read too.
        (self._folder / "metadata.json").write_text(
            json.dumps(
                {
                    "sharded_backend": "torch_dist",
                    "sharded_backend_version": 1,
                    "common_backend": "torch",
                    "common_backend_version": 1,
                }
            ),
            encoding="utf-8",
        )
        self._write_common(self._blueprint.arguments)

    def _write_common(self, arguments: Namespace) -> None:
        with (self._folder / "common.pt").open("wb") as file:
            torch.save({"args": arguments, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0}, file)
            file.flush()
            os.fsync(file.fileno())

    def _files(self, names: Iterable[str], dtype: Callable[[str], torch.dtype]) -> Iterator[list[WriteItem]]:
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._blueprint.objects]
        size = 0
        for name in names:
            for place in self._blueprint.places[name]:
                nbytes = place.numel * dtype(name).itemsize
                if size and size + nbytes > self._shard_bytes:
                    yield items
                    items, size = [], 0
                items.append(_write_item(place, dtype(name)))
                size += nbytes
        yield items


def _write_item(place: Place, dtype: torch.dtype) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(place.key, torch.Size(place.offset)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.shape)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(place.global_shape),
        ),
    )


class _OneByOne(DefaultSavePlanner):
    """Makes a parameter when its first block is to be written, and forgets it with the next."""

    def __init__(self, blueprint: Blueprint, full: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._objects, self._full = blueprint.objects, full
        self._blocks: dict[tuple[str, tuple[int, ...]], tuple[str, int, Place]] = {}
        for name, blocks in blueprint.places.items():
            start = 0
            for place in blocks:
                self._blocks[place.key, place.offset] = (name, start, place)
                start += place.rows
        self._name, self._tensor = "", torch.empty(0)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], stream)  # a list, as Megatron has it
            return stream
        name, start, place = self._blocks[write_item.index.fqn, tuple(write_item.index.offset or ())]
        if name != self._name:
            self._tensor = torch.empty(0)  # freed before the next is made
            self._name, self._tensor = name, self._full(name)
        return self._tensor.narrow(0, start, place.rows).reshape(place.shape)


class WeightReader:
    """Reads parameters of a checkpoint of any layout. Raises OpdError naming the file and what is wrong with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._index: Metadata = self._reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
            raise OpdError(
                f"{folder / '.metadata'}: cannot be read ({root_cause(error)}); copy the checkpoint again"
            ) from error
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)
        self.tensors = {
            key: entry for key, entry in self._index.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }
        self._by_layer: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}

    def check_files(self) -> None:
        """Every file is there and long enough for what the index places in it. Raises OpdError."""
        ends: dict[str, int] = {}
        for info in (self._index.storage_data or {}).values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            file = self.folder / name
            if not file.is_file():
                raise OpdError(f"{file}: listed in .metadata but missing; copy the checkpoint again")
            if file.stat().st_size < end:
                raise OpdError(f"{file}: truncated ({file.stat().st_size} bytes of {end}); copy the checkpoint again")

    def read(self, places: Iterable[Place]) -> Tensor:
        """The rows of these blocks, one after the other: a parameter as the model has it."""
        parts = [self._block(place) for place in places]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _block(self, place: Place) -> Tensor:
        entry = self.tensors[place.key]
        target = torch.empty(place.shape, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.shape))
        stored = replace(entry, chunks=self._near(place))
        items = create_read_items_for_chunk_list(place.key, stored, [wanted])
        if sum(prod(item.lengths) for item in items) != place.numel:
            raise OpdError(f"{self.folder}: .metadata has not all of {place.key}; copy the checkpoint again")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, AssertionError) as error:
            raise OpdError(
                f"{self.folder}: {place.key} cannot be read ({root_cause(error)}); copy the checkpoint again"
            ) from error
        return target.reshape(place.local_shape)

    def _near(self, place: Place) -> list[ChunkStorageMetadata]:
        """Stored blocks that may overlap: where one key has thousands of experts, they cannot all be looked at each time."""
        key = place.key
        if not place.stacked:
            return self.tensors[key].chunks
        if key not in self._by_layer:
            by_layer: dict[int, list[ChunkStorageMetadata]] = {}
            for chunk in self.tensors[key].chunks:
                for number in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    by_layer.setdefault(number, []).append(chunk)
            self._by_layer[key] = by_layer
        return self._by_layer[key].get(place.offset[0], [])


class _Into(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was copied in place."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError(f"{read_item.dest_index.fqn} is no tensor")
