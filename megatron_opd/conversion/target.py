"""The folder that a conversion makes: there when it is whole, with a manifest of its files, and never before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_opd.hf_folder import INDEX
from megatron_opd.mcore.checkpoint_files import list_files, root_cause
from megatron_opd.types import OpdError

MANIFEST = "manifest.json"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


@contextmanager
def new_folder(target: Path, needed: int) -> Iterator[Path]:
    """Give a folder to fill, and show it as ``target`` when the block ends well; else nothing is left.

    Args:
        needed: bytes that will be written.

    Raises OpdError where ``target`` holds something, the disk is too small, or writing fails.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OpdError(f"{target}: exists and is not empty; give another target, or delete it")
    parent = target.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OpdError(f"{target}: needs {needed / 1e9:.2f} GB, but {parent} has {free / 1e9:.2f} GB free; make room")
    partial = target.resolve().with_name(f".{target.resolve().name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        yield partial
        _write_manifest(partial)
        partial.rename(target.resolve())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OpdError(f"{target}: cannot be written ({root_cause(cause)}); nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_all_but_weights(source: Path, target: Path) -> None:
    """config.json, generation config, tokenizer and whatever else lies there, byte for byte."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix not in _WEIGHTS and file.name not in (INDEX, MANIFEST):
            shutil.copyfile(file, target / file.name)


def damage(folder: Path) -> list[str]:
    """What differs from the manifest of ``folder``; nothing where it has none. Reads every file. Raises OpdError."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return []
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        wanted = {name: (entry["bytes"], entry["blake2b"]) for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OpdError(f"{manifest}: cannot be read ({root_cause(error)}); delete it to compare without it") from error
    missing = [name for name in wanted if not (folder / name).is_file()]
    found = list_files([folder / name for name in wanted if name not in missing], folder, to_disk=False)
    return [f"{folder / name}: missing" for name in missing] + [
        f"{folder / name}: has changed since it was written" for name, entry in found.items() if entry != wanted[name]
    ]


def _write_manifest(folder: Path) -> None:
    files = list_files(sorted(path for path in folder.rglob("*") if path.is_file()), folder, to_disk=True)
    listed = {name: {"bytes": size, "blake2b": digest} for name, (size, digest) in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"files": listed}, indent=2) + "\n", encoding="utf-8")
