"""Published models' config.json as they stand: parity with transformers, and the way through the converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_opd.config import ParallelConfig
from tests.conftest import Table
from tests.conversion.folders import convert, identical, other_files, tensors
from tests.hub_models import CONFIGS, make_hub_model
from tests.mcore.test_parity import SEQUENCES, megatron_logits
from tests.worker_pool import WorkerPool


@pytest.mark.parametrize("layout", [pytest.param("tp1", marks=pytest.mark.slow), "pp2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(pool: WorkerPool, tmp_path: Path, table: Table, name: str, layout: str) -> None:
    make_hub_model(tmp_path, name)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    parallel = ParallelConfig(pp=2) if layout == "pp2" else ParallelConfig()
    *_, logits = pool.run(parallel.model_parallel_size, megatron_logits, str(tmp_path), parallel)
    with torch.no_grad():
        expected = torch.cat([reference(torch.tensor([sequence])).logits[0] for sequence in SEQUENCES])  # [T, V]
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    table.add("logits against transformers (largest difference / largest logit)", f"{name:24} {layout}", f"{difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_changes_nothing(tmp_path: Path, name: str) -> None:
    model, megatron, back = make_hub_model(tmp_path / "model", name), tmp_path / "megatron", tmp_path / "back"
    assert convert("to-megatron", model, megatron) == 0
    assert convert("to-hf", megatron, back) == 0
    assert identical(tensors(model), tensors(back))
    assert other_files(model) == other_files(back)
