"""Whether two folders, each in either form, are the same model bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from transformers.utils.hub import CHAT_TEMPLATE_DIR

from megatron_opd.config import ParallelConfig
from megatron_opd.conversion.convert import HF_FILES
from megatron_opd.conversion.digests import file_check, recorded
from megatron_opd.conversion.target import is_of_weights
from megatron_opd.conversion.weights import HFWeights, MegatronWeights, Weights, entry_bytes, same
from megatron_opd.hf_folder import TEXTS, HFFolder
from megatron_opd.mcore.hf_mapping import Entry, entries
from megatron_opd.mcore.model import model_spec
from megatron_opd.mcore.torch_dist import consecutive
from megatron_opd.types import OpdError
from megatron_opd.workers import Report, StartReport, Task, share

_SHARED = 1 << 26  # bytes of tensors that one process compares before it is given more


def differences(one: Path, other: Path, config: Path | None, processes: int, start: StartReport) -> list[str]:
    """One line for each: files against their manifest, config.json by key, tensors by dtype, shape and bits.

    Args:
        config: a folder with config.json for a Megatron checkpoint that brings none.

    Raises OpdError where a folder is no model.
    """
    mine, theirs = config_for(one, other, config)
    files = [(folder, name, expected) for folder in (one, other) for name, expected in recorded(folder).items()]
    left, right = _open(one, mine), _open(other, theirs)
    there = {entry.megatron: entry.hf for entry in entries(right.spec.architecture, right.spec.dims)}
    common = [e for e in entries(left.spec.architecture, left.spec.dims) if there.get(e.megatron) == e.hf]
    sizes = [entry_bytes(left, entry) for entry in common]
    tasks: list[Task[list[str]]] = [file_check(*file) for file in files]
    tasks += [_tensor_check(left, right, [common[n] for n in part]) for part in consecutive(sizes, _SHARED)]
    report = start(sum(expected.nbytes for *_, expected in files) + sum(sizes))
    with closing(share(tasks, processes, report)) as done:
        found = dict(done)
    lines = _config_differences(mine, theirs) if mine != theirs else ()
    lonely = sorted(left.tensors.keys() ^ right.tensors.keys())
    return [
        *(line for number in range(len(files)) for line in found[number]),
        *lines,
        *(f"{name}: only in {one if name in left.tensors else other}" for name in lonely),
        *(line for number in range(len(files), len(tasks)) for line in found[number]),
    ]


def _tensor_check(left: Weights, right: Weights, table: Sequence[Entry]) -> Task[list[str]]:
    def check(report: Report) -> list[str]:
        lines = []
        for entry in table:
            place = "" if entry.index is None else f"[{entry.index}]"
            for tensor, here, there in zip(entry.hf, left.read(entry), right.read(entry), strict=True):
                name = tensor + place
                report(here.nbytes)
                if here.dtype != there.dtype or here.shape != there.shape:
                    lines.append(f"{name}: {here.dtype} {list(here.shape)} against {there.dtype} {list(there.shape)}")
                elif not same(here, there):
                    lines.append(f"{name}: values differ")
        return lines

    return check


def is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


def config_for(one: Path, other: Path, config: Path | None) -> tuple[Path, Path]:
    """The folder of the config.json that each of the two goes by: its own, ``config`` or the other's. Raises OpdError."""
    mine, theirs = _config_of(one), _config_of(other)
    if config is not None and mine is not None and theirs is not None:
        raise OpdError(f"--hf: {config}, but {one} and {other} bring a config.json each; remove it")
    fallback = config or mine or theirs
    if fallback is None:
        raise OpdError(f"{one}: no config.json here or in {other}; name the Hugging Face folder of this model with --hf")
    return mine or fallback, theirs or fallback


def _config_of(path: Path) -> Path | None:
    """The folder of its config.json, if it brings one."""
    return next((folder for folder in (path, path / HF_FILES) if is_hf(folder)), None)


def _open(path: Path, config: Path) -> Weights:
    spec = model_spec(HFFolder(config), ParallelConfig(), "source")
    return HFWeights(HFFolder(path), spec) if is_hf(path) else MegatronWeights(path, spec)


def _config_differences(one: Path, other: Path) -> Iterator[str]:
    left, right = (json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (one, other))
    for key in sorted(left.keys() | right.keys()):
        here, there = (json.dumps(each[key], sort_keys=True) if key in each else "not there" for each in (left, right))
        if here != there:
            yield f"config.json: {key} is {here} in {one}, {there} in {other}"
    for name in sorted(_texts(one) | _texts(other)):
        contents = [(folder / name).read_bytes() if (folder / name).is_file() else None for folder in (one, other)]
        if contents[0] != contents[1]:
            yield f"{name}: {'differs' if None not in contents else f'only in {one if contents[1] is None else other}'}"


def _texts(folder: Path) -> set[str]:
    """Tokenizer, generation config and the like."""
    files = [*folder.iterdir(), *(folder / CHAT_TEMPLATE_DIR).rglob("*")]
    texts = (file for file in files if file.is_file() and file.suffix in TEXTS and not is_of_weights(file.name))
    return {str(file.relative_to(folder)) for file in texts} - {"config.json"}
