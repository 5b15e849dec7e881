"""The Dockerfile against the rest of the tree; building it takes an engine, and for the GPU image NVIDIA's registry."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GPU_SETUP = runpy.run_path(str(ROOT / "docker" / "gpu_setup.py"))
IMAGES = ["cpu", "gpu"]
NVIDIAS = {"torch": "2.13.0a0+9186a08b2c.nv26.7.59513937", "transformer-engine": "2.17.0"}


class Instruction(NamedTuple):
    stage: str  # "" before the first FROM
    name: str
    words: list[str]


def instructions() -> list[Instruction]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    found: list[Instruction] = []
    stage = ""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        words = shlex.split(rest)
        if name.upper() == "FROM":
            stage = words[2]  # FROM image AS stage
        found.append(Instruction(stage, name.upper(), words))
    return found


def of(stage: str, name: str) -> list[list[str]]:
    return [each.words for each in instructions() if (each.stage, each.name) == (stage, name)]


def copied() -> Iterator[str]:
    for each in instructions():
        if each.name == "COPY":
            *sources, _ = (word for word in each.words if not word.startswith("--"))
            yield from sources


def pins(requirements: list[str]) -> dict[str, str]:
    parsed = [Requirement(each) for each in requirements]
    here = [each for each in parsed if each.marker is None or each.marker.evaluate({"python_version": "3.12"})]
    return {each.name: str(each.specifier).removeprefix("==") for each in here if str(each.specifier).startswith("==")}


def test_the_default_image_is_the_gpus() -> None:
    assert [words[2] for words in (each.words for each in instructions() if each.name == "FROM")] == IMAGES


@pytest.mark.parametrize("stage", IMAGES)
def test_the_base_image_has_a_tag_with_a_version(stage: str) -> None:
    [(image, *_)] = of(stage, "FROM")
    _, _, tag = image.rpartition("/")[2].partition(":")
    assert re.match(r"\d+\.\d+", tag), image
    assert any(f"base.name={image}" in word or f"/{image}" in word for words in of(stage, "LABEL") for word in words)


@pytest.mark.parametrize("stage", IMAGES)
def test_it_runs_as_another_user_than_root(stage: str) -> None:
    arguments = dict(word.split("=") for words in of(stage, "ARG") for word in words)
    user = of(stage, "USER")[-1][0]
    assert int(arguments[user.removeprefix("$")]) > 0


@pytest.mark.parametrize("stage", IMAGES)
def test_the_images_version_is_the_packages(stage: str) -> None:
    assert f"org.opencontainers.image.version={PROJECT['version']}" in [word for words in of(stage, "LABEL") for word in words]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    ignored = [line.removeprefix("**/") for line in lines if line and not line.startswith("#")]
    sources = [source for source in copied() if source != "."]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not [pattern for pattern in ignored for part in Path(source).parts if fnmatch(part, pattern)], source


def test_scripts_that_it_runs_are_executable() -> None:
    scripts = {word for each in instructions() if each.name == "RUN" for word in each.words if (ROOT / word).suffix == ".sh"}
    assert scripts == {"docker/cpu-setup.sh"}
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)


def test_sglangs_environment_has_the_versions_of_the_package() -> None:
    lines = (ROOT / "docker" / "sglang-requirements.txt").read_text().splitlines()
    locked = pins([line for line in lines if not line.startswith("#")])
    assert len(locked) == len([line for line in lines if not line.startswith("#")])  # nothing without a version
    wanted = pins(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["sglang"])
    for name in ("sglang", "torch", "transformers"):
        assert locked[name] == wanted[name]
    assert "apex" not in locked


def test_the_trainers_environment_has_the_versions_of_the_package_and_leaves_nvidias_alone() -> None:
    ours, theirs = GPU_SETUP["wanted"](ROOT / "pyproject.toml")
    installed = pins([str(each) for each in ours])
    assert {"megatron-core", "nvidia-modelopt", "transformers"} <= installed.keys()
    wanted = pins(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["gpu"])
    assert installed == {name: version for name, version in wanted.items() if name != "torch"}
    assert {each.name for each in theirs} == {"torch", "transformer-engine", "numpy"}
    for name in ("torch", "torchvision", "triton", "transformer_engine", "transformer-engine-torch", "apex", "flash_attn"):
        assert GPU_SETUP["_nvidias"](name), name


@pytest.mark.parametrize(
    ("requirement", "fits"),
    [("torch==2.13.0", True), ("torch==2.14.0", False), ("transformer-engine[pytorch]>=2.12", True), ("numpy", False)],
)
def test_another_base_image_than_the_package_asks_for_is_refused(requirement: str, fits: bool) -> None:
    assert (GPU_SETUP["unmet"](Requirement(requirement), NVIDIAS) is None) == fits


def test_every_package_comes_from_a_list_with_versions() -> None:
    scripts = [(ROOT / "docker" / name).read_text() for name in ("cpu-setup.sh", "sglang-python")]
    commands = [" ".join(each.words) for each in instructions() if each.name == "RUN"]
    for text in [*commands, *scripts]:
        for arguments in re.findall(r"pip3? install((?: [^&|;\s]+)*)", text):
            assert "--requirement" in arguments or "--no-deps --editable ." in arguments, text
