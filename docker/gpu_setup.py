"""What the GPU image adds to NVIDIA's own builds of PyTorch and its kin, of which none may change.

gpu_setup.py trainer             installs what pyproject.toml asks for and the image does not bring
gpu_setup.py share-nccl PYTHON   has that environment's torch load the NCCL of this one's
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# numpy, because the others are compiled against it. PyPI's apex is an unrelated package, and torch there another build.
NVIDIAS = re.compile(r"torch.*|triton|pytorch-triton|transformer-engine.*|apex|flash-attn.*|numpy")
LOADED_NCCL = "import torch; print(next(line.split()[-1] for line in open('/proc/self/maps') if 'libnccl.so' in line))"


def wanted(pyproject: Path) -> tuple[list[Requirement], list[Requirement]]:
    """What to install, and what the image must have brought."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    every = [Requirement(each) for each in (*project["dependencies"], *project["optional-dependencies"]["gpu"])]
    return [each for each in every if not _nvidias(each.name)], [each for each in every if _nvidias(each.name)]


def unmet(requirement: Requirement, installed: dict[str, str]) -> str | None:
    """What is wrong with the image's own package. NVIDIA calls a build of 2.13.0 2.13.0a0+commit: the release alone counts."""
    version = installed.get(canonicalize_name(requirement.name))
    if version is not None and requirement.specifier.contains(Version(version).base_version):
        return None
    return f"pyproject.toml asks for {requirement}, the base image has {version}: take another image"


def install_trainer() -> None:
    ours, theirs = wanted(Path("pyproject.toml"))
    before = _installed()
    if wrong := [message for each in theirs if (message := unmet(each, before))]:
        sys.exit("\n".join(wrong))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(f"{name}=={version}\n" for name, version in before.items())
        constraints.flush()
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--constraint", constraints.name, *map(str, ours)],
            # The image's own list would hold back nvidia-modelopt too, and is empty in some releases.
            env={name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"},
            check=True,
        )
    importlib.invalidate_caches()
    if (after := _installed()) != before:
        sys.exit(f"pip has replaced packages of the base image: {before} is now {after}")


def share_nccl(python: str) -> None:
    """NCCL refuses a group whose ranks are of different versions, and trainer and engines make one to pass on weights."""
    ours, theirs = _loaded_nccl(sys.executable), _loaded_nccl(python)
    if ours != theirs:
        theirs.unlink()
        theirs.symlink_to(ours)
    if (now := _loaded_nccl(python)) != ours:
        sys.exit(f"{python} loads {now}, the trainer {ours}")


def _nvidias(name: str) -> bool:
    return NVIDIAS.fullmatch(canonicalize_name(name)) is not None


def _installed() -> dict[str, str]:
    # Of two of a name the one that Python would import: the first on its path.
    found = {canonicalize_name(each.metadata["Name"]): each.version for each in reversed(list(metadata.distributions()))}
    return {name: version for name, version in sorted(found.items()) if _nvidias(name)}


def _loaded_nccl(python: str) -> Path:
    return Path(subprocess.run([python, "-c", LOADED_NCCL], stdout=subprocess.PIPE, text=True, check=True).stdout.strip())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["trainer"]:
            install_trainer()
        case ["share-nccl", python]:
            share_nccl(python)
        case _:
            sys.exit(__doc__)
