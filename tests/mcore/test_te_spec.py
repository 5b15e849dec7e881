"""One file of weights for both of Megatron's layer specs; Transformer Engine's modules are stand-ins without kernels."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.hf_mapping import entries
from megatron_opd.mcore.model import model_spec
from tests.conversion.folders import FAMILIES, convert, identical, make, tensors
from tests.mcore.te_spec import MEGATRON, Parameters, parameters

Found = tuple[Parameters, dict[str, Tensor]]  # and the weights that were loaded
STAND_INS = Path(__file__).parents[1] / "stand_ins"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: make(tmp_path_factory.mktemp("model"), **options) for family, options in FAMILIES.items()}
    for folder in made.values():
        assert convert("to-megatron", folder, folder / MEGATRON) == 0
    return made


@pytest.fixture(scope="module")
def transformer_engine(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    out = tmp_path_factory.mktemp("found") / "found.pickle"
    done = subprocess.run(
        [sys.executable, "-c", "from tests.mcore.te_spec import main; main()", str(out), *map(str, folders.values())],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(STAND_INS), *sys.path])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = pickle.loads(out.read_bytes())
    return {family: found[folder] for family, folder in folders.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layer_specs_have_the_same_parameters_in_the_same_places(
    folders: dict[str, Path], transformer_engine: dict[str, Found], family: str
) -> None:
    found, _ = transformer_engine[family]
    spec = model_spec(HFFolder(folders[family]), ParallelConfig(), "source")
    assert set(found.places) == {entry.megatron for entry in entries(spec.architecture, spec.dims)}
    local = parameters(folders[family], transformer_engine=False)
    assert found.places == local.places
    assert found.shards == local.shards


@pytest.mark.parametrize("family", FAMILIES)
def test_the_converted_file_loads_into_the_transformer_engine_spec(
    folders: dict[str, Path], transformer_engine: dict[str, Found], family: str
) -> None:
    _, weights = transformer_engine[family]
    assert identical(weights, tensors(folders[family]))
