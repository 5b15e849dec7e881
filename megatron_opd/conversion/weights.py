"""Both forms of a model as Hugging Face tensors: what there is, by headers alone, and then one table entry at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_opd.config import ParallelConfig
from megatron_opd.conversion.safetensors_file import dtype_named
from megatron_opd.hf_folder import HFFolder, expected_shapes
from megatron_opd.mcore.families import EMBEDDING, LM_HEAD
from megatron_opd.mcore.hf_export import TensorInfo
from megatron_opd.mcore.hf_mapping import entries
from megatron_opd.mcore.megatron_lm import check_weights, content_metadata, find_checkpoint
from megatron_opd.mcore.model import ModelSpec
from megatron_opd.mcore.sharding import Entry
from megatron_opd.mcore.torch_dist import WeightReader
from megatron_opd.mcore.weight_places import blueprint
from megatron_opd.types import OpdError

_LISTED = 8
_FREQUENCIES = ".rotary_emb.inv_freq"  # folders as old as Llama-2's have them; transformers computes its own


class Weights(Protocol):
    """A model's weights on disk, complete by what the headers say."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """By Hugging Face name."""
        ...

    def read(self, entry: Entry) -> list[Tensor]:
        """The tensors ``entry.hf``, unpadded, as they are stored; of stacks the entry's expert. Raises OpdError."""
        ...


def entry_bytes(weights: Weights, entry: Entry) -> int:
    """Of what :meth:`Weights.read` gives."""
    whole = sum(weights.tensors[name].nbytes for name in entry.hf)
    return whole if entry.index is None else whole // weights.spec.dims.experts


class HFWeights:
    """Of a Hugging Face folder. Raises OpdError where its tensors are not those that config.json asks for."""

    def __init__(self, folder: HFFolder, spec: ModelSpec) -> None:
        self.folder, self.spec = folder, spec
        expected = expected_shapes(folder.config)
        mapped = {name for entry in entries(spec.architecture, spec.dims) for name in entry.hf}
        check_names(expected, mapped, f"{folder.path / 'config.json'}", "use a config.json of a supported model")
        found = set(folder.headers)
        self.left_out = []  # lines on what there is but says nothing new
        if spec.dims.tied and LM_HEAD.hf[0] in found:
            self._check_repeated_head()
            found.remove(LM_HEAD.hf[0])
            self.left_out.append(f"{LM_HEAD.hf[0]} repeats the embedding that it is tied to, and is left out")
        frequencies = {name for name in found if name.endswith(_FREQUENCIES)}
        if frequencies:
            found -= frequencies
            self.left_out.append(f"{_list(frequencies)} follow from config.json, and are left out")
        check_names(found, expected, str(folder.path), "use the config.json that belongs to these weights")
        folder.check_tensors()
        self.tensors = {
            name: TensorInfo(name, dtype_named(folder.headers[name][1], f"{folder.files[name]}: {name}"), shape)
            for name, shape in expected.items()
        }

    def read(self, entry: Entry) -> list[Tensor]:
        return self.folder.tensors(entry.hf, entry.index)

    def _check_repeated_head(self) -> None:
        """Some folders store the tied head a second time: it says nothing new, or config.json lies."""
        if not same(self.folder.tensor(LM_HEAD.hf[0]), self.folder.tensor(EMBEDDING.hf[0])):
            raise OpdError(
                f"{self.folder.path / 'config.json'}: tie_word_embeddings is true, but {LM_HEAD.hf[0]} differs from "
                f"{EMBEDDING.hf[0]}; set it to false"
            )


class MegatronWeights:
    """Of a torch_dist checkpoint, of Megatron-LM or the trainer. ``spec`` is its model's; the padding is the file's own.

    Raises OpdError where it is of another model.
    """

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        key = str(path)
        self.path = find_checkpoint(str(path), key)
        self._reader = WeightReader(self.path)
        check_weights(self.path, spec, key)
        rows = int(self._reader.tensors[EMBEDDING.megatron].size[0])
        self.spec = replace(spec, dims=replace(spec.dims, padded_vocab_size=rows))
        self._places = blueprint(self.spec, ParallelConfig(), torch.float32, content_metadata(self.path)).places
        self._check_tensors()
        self._reader.check_files()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return {info.name: info for entry in self._entries() for info in self._infos(entry)}

    def read(self, entry: Entry) -> list[Tensor]:
        return entry.sharding.split(self._reader.read(self._places[entry.megatron]), self.spec.dims)

    def _entries(self) -> Iterator[Entry]:
        return entries(self.spec.architecture, self.spec.dims)

    def _infos(self, entry: Entry) -> Iterator[TensorInfo]:
        """Shapes go through the same split as weights do."""
        places = self._places[entry.megatron]
        rows = sum(place.rows for place in places)
        dtype = self._reader.tensors[places[0].key].properties.dtype
        like = torch.empty(rows, *places[0].local_shape[1:], dtype=dtype, device="meta")
        for name, part in zip(entry.hf, entry.sharding.split(like, self.spec.dims), strict=True):
            stack = () if entry.index is None else (self.spec.dims.experts,)
            yield TensorInfo(name, dtype, (*stack, *part.shape))

    def _check_tensors(self) -> None:
        places = {place.key: place for each in self._places.values() for place in each}
        found = {key for key in self._reader.tensors if not key.startswith("optimizer.") and "_extra_state" not in key}
        check_names(found, places, str(self.path), "give the config.json of that model")
        for key, place in places.items():
            size = tuple(self._reader.tensors[key].size)
            if size != place.global_shape:
                raise OpdError(
                    f"{self.path}: tensor {key} has shape {list(size)}, config.json asks for {list(place.global_shape)}; "
                    "give the config.json of that model"
                )


def check_names(found: Collection[str], expected: Collection[str], where: str, remedy: str) -> None:
    """Raises OpdError that lists what is missing, and what is there but not expected."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    parts = [f"{_list(names)} {what}" for names, what in ((missing, "missing"), (unexpected, "unexpected")) if names]
    if parts:
        raise OpdError(f"{where}: tensors do not fit: {'; '.join(parts)}; {remedy}")


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


def _list(unordered: Collection[str]) -> str:
    names = sorted(unordered)
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
