"""Weights that Transformer Engine holds in FP8: its own tensor classes and Megatron's own optimizer, without CUDA's kernels."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.config import Config, ParallelConfig
from megatron_opd.config_checks import check_combinations
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.fake_world import FAKE
from megatron_opd.mcore.footprint import Rank, state_bytes
from megatron_opd.mcore.fp8 import check_fp8_param_platform, fp8_weight_bytes
from megatron_opd.mcore.model import model_spec, transformer_config
from megatron_opd.types import OpdError
from tests.conftest import Table
from tests.conversion.folders import convert
from tests.mcore.te_tensors import OWN
from tests.mcore.te_weights import SHAPE, Found, Weights
from tests.mcore.test_fp8 import HOPPER, machine
from tests.mcore.test_te_spec import STAND_INS
from tests.tiny_models import make_model

RANKS = 2  # data-parallel, so that each weight's masters are cut
HALF_STEP = 2.0**-4  # of E4M3's three digits, relative to a normal number
SMALLEST_STEP = 2.0**-9 / 448  # between subnormal ones, relative to the largest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes are multiples of 16, as FP8 needs, but not of 128, a block."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    make_model(folder, "qwen3", layers=2, hidden=160, heads=4, kv_heads=2, head_dim=48, vocab_size=256, max_positions=64)
    return folder


@pytest.fixture(scope="module")
def both(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    if not OWN.exists():
        pytest.skip("no .transformer-engine; make test-fp8-recipes")
    scratch = tmp_path_factory.mktemp("found")
    assert convert("to-megatron", model, scratch / "megatron") == 0
    arguments = [str(scratch / "out"), str(model), str(scratch / "megatron")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", "from tests.mcore.te_weights import main; main()", *arguments, str(rank), str(RANKS)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(STAND_INS), *sys.path])},
        )
        for rank in range(RANKS)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=600)
            assert rank.returncode == 0, errors[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    made: dict[str, Found] = pickle.loads((scratch / "out").read_bytes())
    return made


@pytest.fixture(params=["current", "blockwise"])
def found(both: dict[str, Found], request: pytest.FixtureRequest) -> Found:
    return both[request.param]


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].float(), other[name].float()) for name in one)


def test_the_products_weights_are_in_fp8_but_for_the_first_layer(found: Found) -> None:
    products = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert set(found.in_fp8) == {f"decoder.layers.1.{name}.weight" for name in products}


def test_what_is_exported_is_what_is_held(found: Found, model: Path, table: Table) -> None:
    """The largest error of E4M3 against the folder's weights; all others are the folder's, in bf16."""
    folder, worst = HFFolder(model), 0.0
    for name, exported in found.exported.items():
        plain = folder.tensor(name).bfloat16().float()
        if name.startswith("model.layers.1.") and "proj" in name:
            largest = max(float(found.plain[each].abs().max()) for each in found.in_fp8)
            error = (exported.float() - plain).abs()
            assert bool((error <= 1.01 * HALF_STEP * plain.abs() + 2 * SMALLEST_STEP * largest).all())
            worst = max(worst, float(error.norm() / plain.norm()))
            assert worst > 0
        else:
            assert torch.equal(exported.float(), plain)
    assert all(each.dtype is torch.bfloat16 for each in found.exported.values())
    table.add("Weights held in FP8: relative error of an exported one", "largest", f"{worst:.4f}")


def test_masters_are_what_was_read_and_not_what_is_left_of_it(found: Found) -> None:
    assert same(found.masters, found.plain)
    assert same(found.masters_of_megatron_lm, found.plain)
    assert not same(found.held, found.plain)


def test_offload_takes_all_their_memory_and_brings_it_back(found: Found) -> None:
    lent, back = found.storages
    assert lent == 0 and back > 0
    assert same(found.exported_within_offload, found.exported)
    assert same(found.exported_after_offload, found.exported)


def test_a_step_moves_the_masters_and_quantises_them(found: Found) -> None:
    assert not same(found.stepped_masters, found.masters)
    assert same({name: found.stepped[name] for name in found.in_fp8}, found.expected)
    assert not found.stale


def test_a_checkpoint_brings_back_masters_and_weights(found: Found) -> None:
    assert same(found.resumed_masters, found.stepped_masters)
    assert same(found.resumed, found.stepped)
    assert same(found.resumed_export, found.exported_after_step)


def test_a_run_in_bf16_reads_the_checkpoint(found: Found) -> None:
    assert same(found.resumed_in_bf16, found.exported_after_step)


@pytest.mark.parametrize("recipe", ["current", "blockwise"])
def test_bytes_are_those_of_transformer_engines_tensors(both: dict[str, Found], recipe: Any) -> None:
    assert both[recipe].nbytes == fp8_weight_bytes(recipe, *SHAPE)


def config(model: Path, **student: Any) -> Config:
    optimizer = student.pop("optimizer", {})
    return Config.model_validate(
        {
            "run": {"name": "fp8", "dir": str(model.parent / "run"), "steps": 20},
            "student": {"model": str(model), "fp8": "current", "fp8_param": True, **student},
            "teacher": {"model": str(model)},
            "data": {"prompts": "none.jsonl", "prompts_per_step": 2},
            "optimizer": {"warmup_steps": 1, **optimizer},
        }
    )


@pytest.mark.parametrize("recipe", ["current", "blockwise"])
def test_megatrons_config(model: Path, recipe: Any) -> None:
    check_combinations(config(model, fp8=recipe))
    spec = model_spec(HFFolder(model), ParallelConfig(), "student")
    native = transformer_config(spec, ParallelConfig(), FAKE, torch.bfloat16, {}, fp8=recipe, fp8_param=True)
    assert native.fp8_param


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fp8": None}, ["student.fp8 is null", "student.fp8=current"]),
        ({"fp8": "delayed"}, ["a scale of 1", "student.fp8=current"]),
        ({"fp8": "mxfp8"}, ["gradient buffers", "student.fp8=current"]),
        ({"optimizer": {"distributed": False}}, ["optimizer.distributed=true"]),
        (
            {"optimizer": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
            ["transposed copies", "set one of the two"],
        ),
    ],
)
def test_refusals(model: Path, changed: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(OpdError) as caught:
        check_combinations(config(model, **changed))
    assert all(each in str(caught.value) for each in ["student.fp8_param: true", *said]), caught.value
    assert "\n" not in str(caught.value)


def test_versions_of_transformer_engine() -> None:
    check_fp8_param_platform(machine(HOPPER, (2, 2)), "current")
    check_fp8_param_platform(machine(HOPPER, (2, 4)), "blockwise")
    with pytest.raises(OpdError, match=r"needs Transformer Engine 2\.4 with student\.fp8=blockwise, but 2\.3 is installed"):
        check_fp8_param_platform(machine(HOPPER, (2, 3)), "blockwise")


def test_memory_of_a_rank(model: Path) -> None:
    """Numbers and transposed copies, a byte each, are bf16's two bytes; scales come on top, but not in the first layer."""
    native = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 0}
    held, plain = (
        config(model, fp8="blockwise", fp8_param=param, megatron=native, optimizer={"distributed": True})
        for param in (True, False)
    )
    spec = model_spec(HFFolder(model), ParallelConfig(), "student")
    in_fp8, in_bf16 = (state_bytes(each, spec, Rank(0, 1)) for each in (held, plain))
    middle = int(spec.hf.intermediate_size)
    shapes = [(4 * 48 + 2 * 2 * 48, 160), (160, 4 * 48), (2 * middle, 160), (160, middle)]
    scales = sum(fp8_weight_bytes("blockwise", *shape) - 2 * shape[0] * shape[1] for shape in shapes)
    assert in_fp8.parameters - in_bf16.parameters == scales
    assert fp8_weight_bytes("current", 256, 128) == 2 * 256 * 128 + 4
    # [2, 3] blocks and [3, 2] transposed, each row padded to four scales of four bytes
    assert fp8_weight_bytes("blockwise", 256, 300) == 2 * 256 * 300 + 4 * (2 * 4 + 3 * 4)
