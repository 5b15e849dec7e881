"""A world of one on NCCL, both layer specs on CUDA, and the loss gap of each FP8 recipe to bf16 over 50 steps."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch

from megatron_opd.config import Fp8Recipe
from megatron_opd.mcore.fp8 import check_fp8_param_platform, check_fp8_platform
from megatron_opd.mcore.platform import Platform
from megatron_opd.types import OpdError
from tests.conftest import Table
from tests.gpu.one_rank import HeldInFp8, alone, backend_and_sum, held_in_fp8, losses
from tests.tiny_models import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_engine = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine")
STEPS = 50
HELD: tuple[Fp8Recipe, ...] = ("current", "blockwise")  # of which weights can be held in FP8
BOUND = 0.1  # of bf16's fall over the steps: mean |gap| of a step's loss; ours, before any GPU has run it


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Student and teacher."""
    folder = tmp_path_factory.mktemp("gpu")
    shape = {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 4, "head_dim": 64, "vocab_size": 1024, "max_positions": 512}
    for seed, name in enumerate(("student", "teacher")):
        make_model(folder / name, "qwen3", seed=seed, **shape)  # type: ignore[arg-type]
    return folder / "student", folder / "teacher"


@pytest.fixture(scope="module")
def in_bf16(models: tuple[Path, Path]) -> list[float]:
    return alone(partial(losses, transformer_engine=True), *models, STEPS, torch.bfloat16)


def test_nccl_reduces() -> None:
    assert alone(backend_and_sum) == ("nccl", 3.0)


def test_local_layers_on_cuda_lower_the_loss(models: tuple[Path, Path], table: Table) -> None:
    found = alone(partial(losses, transformer_engine=False), *models, 10, torch.float32)
    table.add(
        "Gold loss, nats a token, first and last step", "local layers, fp32, 10 steps", f"{found[0]:.4f}, {found[-1]:.4f}"
    )
    assert found[-1] < found[0]


@needs_engine
def test_both_layer_specs_begin_alike(models: tuple[Path, Path], in_bf16: list[float], table: Table) -> None:
    (local,) = alone(partial(losses, transformer_engine=False), *models, 1, torch.float32)
    title = "Gold loss, nats a token, first and last step"
    table.add(title, f"Transformer Engine, bf16, {STEPS} steps", f"{in_bf16[0]:.4f}, {in_bf16[-1]:.4f}")
    assert in_bf16[0] == pytest.approx(local, rel=1e-2)
    assert in_bf16[-1] < in_bf16[0]


def skip_without(recipe: Fp8Recipe, *, weights: bool) -> None:
    try:
        check_fp8_platform(Platform.detect(), recipe, "student")
        if weights:
            check_fp8_param_platform(Platform.detect(), recipe)
    except OpdError as error:
        pytest.skip(str(error))


@needs_engine
@pytest.mark.parametrize("recipe", HELD)
def test_weights_held_in_fp8(models: tuple[Path, Path], tmp_path: Path, recipe: Fp8Recipe) -> None:
    """Masters are what was read; exports, hence weight sync, what Transformer Engine holds; a checkpoint brings it back."""
    skip_without(recipe, weights=True)
    assert alone(held_in_fp8, *models, tmp_path, recipe) == HeldInFp8([], [], [], [], [])


@needs_engine
@pytest.mark.parametrize(
    ("recipe", "weights"), [*((each, False) for each in get_args(Fp8Recipe)), *((each, True) for each in HELD)]
)
def test_loss_gap_of_fp8_to_bf16(
    models: tuple[Path, Path], in_bf16: list[float], table: Table, recipe: Fp8Recipe, weights: bool
) -> None:
    skip_without(recipe, weights=weights)
    frozen: Fp8Recipe = "current" if recipe == "delayed" else recipe
    train = partial(losses, transformer_engine=True, fp8=recipe, fp8_param=weights, frozen_fp8=frozen)
    found = alone(train, *models, STEPS, torch.bfloat16)
    gaps = [abs(one - other) for one, other in zip(found, in_bf16, strict=True)]
    mean = sum(gaps) / STEPS
    row = f"{recipe}, weights too" if weights else recipe
    table.add(f"FP8's loss gap to bf16 over {STEPS} steps, nats: mean, last", row, f"{mean:.4f}, {gaps[-1]:.4f}")
    assert found != in_bf16
    assert mean < BOUND * (in_bf16[0] - in_bf16[-1])
