"""Whether two folders, each in either form, are the same model bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_opd.config import ParallelConfig
from megatron_opd.conversion.convert import HF_FILES, StartReport
from megatron_opd.conversion.target import damage
from megatron_opd.conversion.weights import HFWeights, MegatronWeights, Weights, same
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.hf_mapping import entries
from megatron_opd.mcore.model import model_spec
from megatron_opd.types import OpdError


def differences(one: Path, other: Path, config: Path | None, start: StartReport) -> Iterator[str]:
    """One line for each: files against their manifest, config.json by key, tensors by dtype, shape and bits.

    Args:
        config: a folder with config.json for a Megatron checkpoint that brings none.

    Raises OpdError where a folder is no model.
    """
    yield from damage(one)
    yield from damage(other)
    configs = [_config(path) for path in (one, other)]
    fallback = config or next((path for path in configs if path is not None), None)
    if fallback is None:
        raise OpdError(f"{one}: no config.json here or in {other}; name the Hugging Face folder of this model with --hf")
    if configs[0] is not None and configs[1] is not None:
        yield from _config_differences(configs[0], configs[1])
    left, right = (_open(path, own or fallback) for path, own in zip((one, other), configs, strict=True))
    for name in sorted(left.tensors.keys() ^ right.tensors.keys()):
        yield f"{name}: only in {one if name in left.tensors else other}"
    report = start(sum(info.nbytes for info in left.tensors.values()))
    common = {entry.megatron: entry for entry in entries(right.spec.architecture, right.spec.dims)}
    for entry in entries(left.spec.architecture, left.spec.dims):
        if entry.megatron not in common or entry.hf != common[entry.megatron].hf:
            continue
        place = "" if entry.index is None else f"[{entry.index}]"
        for tensor, here, there in zip(entry.hf, left.read(entry), right.read(entry), strict=True):
            name = tensor + place
            report(here.nbytes)
            if here.dtype != there.dtype or here.shape != there.shape:
                yield f"{name}: {here.dtype} {list(here.shape)} against {there.dtype} {list(there.shape)}"
            elif not same(here, there):
                yield f"{name}: values differ"


def _is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


def _config(path: Path) -> Path | None:
    """The folder of its config.json, if it brings one."""
    return next((folder for folder in (path, path / HF_FILES) if _is_hf(folder)), None)


def _open(path: Path, config: Path) -> Weights:
    spec = model_spec(HFFolder(config), ParallelConfig(), "source")
    return HFWeights(HFFolder(path), spec) if _is_hf(path) else MegatronWeights(path, spec)


def _config_differences(one: Path, other: Path) -> Iterator[str]:
    left, right = (json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (one, other))
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key):
            yield f"config.json: {key} is {left.get(key)!r} in {one}, {right.get(key)!r} in {other}"
