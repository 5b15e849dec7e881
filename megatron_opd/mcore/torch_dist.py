"""A torch_dist checkpoint's weights, one parameter in memory at a time: torch's own storage classes and our plans."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    FileSystemReader,
    LoadPlan,
    Metadata,
    ReadItem,
    SavePlan,
    TensorStorageMetadata,
    WriteItem,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view
from torch.utils.serialization import config

from megatron_opd.mcore.checkpoint_files import root_cause
from megatron_opd.mcore.megatron_lm import CHECKPOINT_VERSION
from megatron_opd.mcore.weight_places import Blueprint, Place
from megatron_opd.shard import fill
from megatron_opd.types import OpdError


class WeightFiles:
    """The files of a new checkpoint: planned first, written one by one in any order and process, and their index last."""

    def __init__(self, blueprint: Blueprint, dtypes: dict[str, torch.dtype], shard_bytes: int) -> None:
        """Args:
        dtypes: of each parameter, which are written in this order.
        shard_bytes: of the largest file; more where one parameter is larger.
        """
        self._blueprint, self._dtypes = blueprint, dtypes
        names = list(dtypes)
        sizes = [sum(place.numel for place in blueprint.places[name]) * dtypes[name].itemsize for name in names]
        self._parameters = [[names[number] for number in part] for part in consecutive(sizes, shard_bytes)]
        self.names = [f"__{number}_0.distcp" for number in range(len(self._parameters))]  # as torch names a rank's

    def parameters(self, number: int) -> list[str]:
        """Of one file, in its order."""
        return self._parameters[number]

    def write(self, number: int, stream: BinaryIO, full: Callable[[str], Tensor]) -> list[int]:
        """Write one file from front to back; returns where each of its blocks ends, for :meth:`finish`.

        Args:
            full: gives a whole parameter; asked for one after the other.
        """
        ends = []
        # Of each archive in a file torch would keep a CRC32, slowly, which no reader of a checkpoint compares.
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]  # of the module, made by torch
            for key in self._objects(number):
                torch.save([self._blueprint.objects[key]], stream)  # a list, as Megatron has it
                ends.append(stream.tell())
            for name in self._parameters[number]:
                start, tensor = 0, full(name)
                for place in self._blueprint.places[name]:
                    torch.save(_as_whole(tensor.narrow(0, start, place.rows)).reshape(place.shape), stream)
                    ends.append(stream.tell())
                    start += place.rows
                del tensor  # before the next is made
        return ends

    def finish(self, folder: Path, ends: Sequence[Sequence[int]]) -> None:
        """Write into ``folder``, where the files lie, what makes them a checkpoint. ``ends``: of each file's blocks."""
        plans, metadata = create_default_global_save_plan([SavePlan(list(self._items(n))) for n in range(len(self.names))])
        metadata.storage_data = {
            item.index: _StorageInfo(name, start, end - start)
            for name, plan, own in zip(self.names, plans, ends, strict=True)
            for item, start, end in zip(plan.items, [0, *own[:-1]], own, strict=True)
        }
        with (folder / ".metadata").open("wb") as file:
            pickle.dump(metadata, file)
        # As megatron-core 0.16 has it, which newer versions read too.
        (folder / "metadata.json").write_text(
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
        common = {"args": self._blueprint.arguments, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0}
        torch.save(common, folder / "common.pt")

    def _objects(self, number: int) -> list[str]:
        return list(self._blueprint.objects) if number == 0 else []

    def _items(self, number: int) -> Iterator[WriteItem]:
        for key in self._objects(number):
            yield WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)
        for name in self._parameters[number]:
            for place in self._blueprint.places[name]:
                yield _write_item(place, self._dtypes[name])


def consecutive(sizes: Iterable[int], limit: int) -> list[range]:
    """Numbers of consecutive items whose ``sizes`` together are at most ``limit``; more where one alone is larger."""
    parts, start, total, end = [], 0, 0, 0
    for size in sizes:
        if end > start and total + size > limit:
            parts.append(range(start, end))
            start, total = end, 0
        total += size
        end += 1
    return [*parts, range(start, end)]


def _as_whole(rows: Tensor) -> Tensor:
    """With a storage that has these elements alone, since torch saves the whole of a storage."""
    flat = rows.contiguous().view(-1)
    return torch.from_numpy(flat.view(torch.uint8).numpy()).view(rows.dtype).view(rows.shape)


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


_DAMAGED = (KeyError, AttributeError, ValueError, TypeError, IndexError)  # where an index says what no file holds


class WeightReader:
    """Reads parameters of a checkpoint of any layout. Raises OpdError naming the file and what is wrong with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._index: Metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._index, is_coordinator=True)
            self.tensors = {
                key: entry for key, entry in self._index.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
            }
        except Exception as error:  # unpickling what is damaged raises any kind
            raise OpdError(
                f"{folder / '.metadata'}: cannot be read ({root_cause(error)}); copy the checkpoint again"
            ) from error
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
        places = list(places)
        rows = sum(place.rows for place in places)
        whole = torch.empty(rows, *places[0].local_shape[1:], dtype=self.tensors[places[0].key].properties.dtype)
        for place, target in zip(places, whole.split([place.rows for place in places]), strict=True):
            self._read_block(place, target.view(place.shape))
        return whole

    def _read_block(self, place: Place, target: Tensor) -> None:
        entry = self.tensors[place.key]
        wanted = ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.shape))
        stored = replace(entry, chunks=self._near(place))
        try:
            items = create_read_items_for_chunk_list(place.key, stored, [wanted])
            if sum(prod(item.lengths) for item in items) != place.numel:
                raise OpdError(f"{self.folder}: .metadata has not all of {place.key}; copy the checkpoint again")
            into = _Into(target)
            rest = [item for item in items if not self._read_whole(item, into.resolve_tensor(item))]
            self._reader.read_data(LoadPlan(rest), into)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, AssertionError, *_DAMAGED) as error:
            raise OpdError(
                f"{self.folder}: {place.key} cannot be read ({root_cause(error)}); copy the checkpoint again"
            ) from error

    def _read_whole(self, item: ReadItem, target: Tensor) -> bool:
        """Read a stored block straight into ``target``, where all of it is wanted and it lies there as the target does.

        torch's reader would make a tensor of the block first and then copy that.
        """
        info: _StorageInfo = self._reader.storage_data[item.storage_index]
        if any(item.storage_offsets) or info.transform_descriptors or not target.is_contiguous():
            return False
        with (self.folder / info.relative_path).open("rb", buffering=0) as file:
            view = cast(IO[bytes], _create_file_view(file, info.offset, info.length))
            stored = torch.load(view, map_location="meta", weights_only=True)
            if (stored.shape, stored.dtype) != (target.shape, target.dtype) or not stored.is_contiguous():
                return False
            start = stored.untyped_storage()._checkpoint_offset + stored.storage_offset() * stored.itemsize
            if start + target.nbytes > info.length:
                raise ValueError(f"a block of {info.length} bytes ends within its tensor")
            fill(file.fileno(), info.offset + start, target.view(-1).view(torch.uint8).numpy().data)
        return True

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
