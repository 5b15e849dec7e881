"""From Hugging Face to Megatron-LM and back: each process makes whole files, with one entry of the mapping table in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_opd.config import ParallelConfig
from megatron_opd.conversion.digests import source_checks
from megatron_opd.conversion.safetensors_file import content, file_names, header, write_index
from megatron_opd.conversion.target import OutputFile, check_links, copy_all_but_weights, identity_of, new_folder
from megatron_opd.conversion.weights import HFWeights, MegatronWeights, entry_bytes
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.checkpoint_files import LATEST
from megatron_opd.mcore.hf_mapping import by_tensors, entries
from megatron_opd.mcore.model import model_spec
from megatron_opd.mcore.sharding import Entry
from megatron_opd.mcore.torch_dist import WeightFiles, consecutive
from megatron_opd.mcore.weight_places import Blueprint, blueprint
from megatron_opd.types import OpdError
from megatron_opd.workers import Report, StartReport

RELEASE = "release"  # Megatron-LM's name for weights that no training step of its own has made
HF_FILES = "hf"  # beside it: config.json, tokenizer and so on, byte for byte
_FORMAT = 5  # counts up when other files are written for the same model: those of before are not gone on with


@dataclass(frozen=True)
class Work:
    """How a conversion is done.

    Args:
        processes: that share the files; each holds two or three times the largest parameter.
        start: called with the bytes that are to be read.
        trusting: leave out the comparison of the source's files with the digests that lie beside them.
        say: takes a line where a killed conversion is resumed or thrown away.
    """

    shard_bytes: int  # of the largest file
    processes: int
    start: StartReport
    say: Callable[[str], None]
    trusting: bool = False


def to_megatron(source: Path, target: Path, parallel: ParallelConfig, dtype: torch.dtype | None, work: Work) -> None:
    """Write ``target`` as a checkpoint of Megatron-LM, which ``student.load`` reads too. Raises OpdError; nothing is left then.

    Args:
        parallel: the layout that is meant to load it: noted in its arguments, and the vocabulary is padded for its tp.
        dtype: of the result, but for buffers; None: as the source has it.
    """
    folder = HFFolder(source)
    check_links(source)
    read = _Source([source])
    weights = HFWeights(folder, model_spec(folder, parallel, "source", axes="--"))
    checks = [] if work.trusting else source_checks([source])
    for line in weights.left_out:
        work.say(f"{source}: {line}")
    spec = weights.spec
    table = {entry.megatron: entry for entry in entries(spec.architecture, spec.dims)}
    dtypes = {name: (None if entry.buffer else dtype) or _one_dtype(weights, entry) for name, entry in table.items()}
    plan = blueprint(spec, parallel, dtype or max(dtypes.values(), key=list(dtypes.values()).count), {})
    _check_keys(plan, dtypes, source)
    sizes = {name: entry_bytes(weights, entry) for name, entry in table.items()}
    files = WeightFiles(plan, dtypes, work.shard_bytes)

    def output(number: int) -> OutputFile:
        def write(stream: BinaryIO, report: Report) -> list[int]:
            def full(name: str) -> Tensor:
                report(sizes[name])
                return _cast(table[name].sharding.merge(weights.read(table[name]), spec.dims), dtypes[name], name)

            return files.write(number, stream, full)

        return OutputFile(f"{RELEASE}/{files.names[number]}", sum(sizes[name] for name in files.parameters(number)), write)

    needed = sum(place.numel * dtypes[name].itemsize for name in table for place in plan.places[name])
    identity = _identity("to-megatron", read, dtype, work, layout=parallel.model_dump())
    with new_folder(target, needed, identity, work.say) as partial:
        copy_all_but_weights(source, partial.folder / HF_FILES)  # first: what cannot be read should not end hours of work
        if dtype is not None:
            _set_dtype(partial.folder / HF_FILES / "config.json", dtype)
        ends = partial.write([output(number) for number in range(len(files.names))], checks, work.processes, work.start)
        files.finish(partial.folder / RELEASE, ends)
        (partial.folder / LATEST).write_text(RELEASE, encoding="utf-8")
        read.check_unchanged()


def to_hf(source: Path, target: Path, config: Path | None, dtype: torch.dtype | None, work: Work) -> None:
    """Write ``target`` as a Hugging Face folder. Raises OpdError; nothing is left then.

    Args:
        config: the folder with config.json, tokenizer and so on; None: the one that :func:`to_megatron` left in ``source``.
        dtype: of the result, but for buffers, also in its config.json; None: as the source has it.
    """
    files = config_folder(source, config)
    check_links(files.path)
    weights = MegatronWeights(source, model_spec(files, ParallelConfig(), "source"))
    read = _Source([weights.path, files.path])
    checks = [] if work.trusting else source_checks([source, weights.path, weights.path.parent])
    # One Hugging Face tensor, or the stack of a layer's experts, is written entry by entry.
    groups = list(by_tensors(entries(weights.spec.architecture, weights.spec.dims)))
    buffers = {name for group in groups if group[0].buffer for name in group[0].hf}
    infos = {
        name: info if dtype is None or name in buffers else replace(info, dtype=dtype) for name, info in weights.tensors.items()
    }
    parts = consecutive((sum(infos[name].nbytes for name in group[0].hf) for group in groups), work.shard_bytes)
    # Readers need each tensor aligned to its elements: the wide ones go first.
    shards = [sorted((groups[n] for n in part), key=lambda group: -infos[group[0].hf[0]].dtype.itemsize) for part in parts]
    stored = {
        name: [infos[each] for group in shard for each in group[0].hf]
        for name, shard in zip(file_names(len(shards)), shards, strict=True)
    }

    def output(name: str, shard: Sequence[Sequence[Entry]]) -> OutputFile:
        def write(stream: BinaryIO, report: Report) -> list[int]:
            stream.write(header(stored[name]))
            for entry in chain.from_iterable(shard):
                for each, tensor in zip(entry.hf, weights.read(entry), strict=True):
                    report(tensor.nbytes)
                    stream.write(content(_cast(tensor, infos[each].dtype, each)))
            return []

        return OutputFile(name, sum(weights.tensors[info.name].nbytes for info in stored[name]), write)

    identity = _identity("to-hf", read, dtype, work)
    with new_folder(target, sum(info.nbytes for info in infos.values()), identity, work.say) as partial:
        copy_all_but_weights(files.path, partial.folder)
        stored_as = {info.dtype for name, info in infos.items() if name not in buffers}
        if dtype is not None or (config is not None and len(stored_as) == 1):  # of another folder than the weights
            (written,) = stored_as
            if _set_dtype(partial.folder / "config.json", written) and dtype is None:
                work.say(f"{target / 'config.json'}: dtype is now that of the checkpoint's weights, {_name(written)}")
        partial.write([output(*each) for each in zip(stored, shards, strict=True)], checks, work.processes, work.start)
        write_index(partial.folder, stored)
        read.check_unchanged()


def config_folder(source: Path, config: Path | None) -> HFFolder:
    """Raises OpdError where the checkpoint brings no config.json and none is named."""
    folder = config or source / HF_FILES
    if not (folder / "config.json").is_file():
        raise OpdError(f"{folder / 'config.json'}: not there; name the Hugging Face folder of this model with --hf")
    return HFFolder(folder)


class _Source:
    """Folders as they were before they were read."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self.files = self._now()

    def check_unchanged(self) -> None:
        """Raises OpdError."""
        for folder, before, now in zip(self._folders, self.files, self._now(), strict=True):
            if before != now:
                raise OpdError(f"{folder}: has changed while it was read; start again")

    def _now(self) -> list[dict[str, list[int]]]:
        return [identity_of(folder) for folder in self._folders]


def _identity(command: str, source: _Source, dtype: torch.dtype | None, work: Work, **more: object) -> dict[str, Any]:
    """What the result's bytes follow from."""
    return {
        "command": command,
        "format": _FORMAT,
        "versions": {package: version(package) for package in ("torch", "transformers", "megatron-core")},
        "source": source.files,
        "dtype": str(dtype),
        "shard_bytes": work.shard_bytes,
        **more,
    }


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


def _set_dtype(file: Path, dtype: torch.dtype) -> bool:
    """Whether config.json has said otherwise."""
    config = json.loads(file.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"  # the older name of the same key
    if config.get(key) == _name(dtype):
        return False
    config[key] = _name(dtype)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return True


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Raises OpdError where a number is too large for ``dtype``."""
    cast = tensor.to(dtype)
    if cast is not tensor and not bool((cast.isfinite() | ~tensor.isfinite()).all()):
        raise OpdError(f"{name}: has numbers that are too large for {_name(dtype)}; choose another --dtype")
    return cast
