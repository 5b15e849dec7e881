"""A world of one on NCCL, both layer specs on CUDA, and the loss gap of each FP8 recipe to bf16 over 50 steps."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch

from megatron_opd.config import Fp8Recipe
from megatron_opd.mcore.fp8 import check_fp8_platform
from megatron_opd.mcore.platform import Platform
from megatron_opd.types import OpdError
from tests.conftest import Table
from tests.gpu.one_rank import alone, backend_and_sum, losses
from tests.tiny_models import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_engine = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine")
STEPS = 50
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


@needs_engine
@pytest.mark.parametrize("recipe", get_args(Fp8Recipe))
def test_loss_gap_of_fp8_to_bf16(models: tuple[Path, Path], in_bf16: list[float], table: Table, recipe: Fp8Recipe) -> None:
    try:
        check_fp8_platform(Platform.detect(), recipe, "student")
    except OpdError as error:
        pytest.skip(str(error))
    frozen: Fp8Recipe = "current" if recipe == "delayed" else recipe
    found = alone(partial(losses, transformer_engine=True, fp8=recipe, frozen_fp8=frozen), *models, STEPS, torch.bfloat16)
    gaps = [abs(one - other) for one, other in zip(found, in_bf16, strict=True)]
    mean = sum(gaps) / STEPS
    table.add(f"FP8's loss gap to bf16 over {STEPS} steps, nats: mean, last", recipe, f"{mean:.4f}, {gaps[-1]:.4f}")
    assert found != in_bf16
    assert mean < BOUND * (in_bf16[0] - in_bf16[-1])
