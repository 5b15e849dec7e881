"""SmolLM2-135M, a published model of 9 query and 3 key-value heads: there and back bit for bit, and the same logits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_opd.config import ParallelConfig
from megatron_opd.data import load_tokenizer
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.megatron_lm import load_megatron_lm
from megatron_opd.mcore.model import HiddenStateModel, build_model, model_spec, transformer_config
from megatron_opd.mcore.schedule import forward_only
from tests.conftest import Table
from tests.conversion.folders import convert, identical, other_files, tensors
from tests.mcore.worlds import open_layout, packed
from tests.worker_pool import WorkerPool

SMOLLM2 = Path(__file__).parents[2] / "examples" / "smollm2" / "work" / "student"
TEXTS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many in all?",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SMOLLM2.is_dir(), reason="made by make test-slow")]


def logits(folder: str, checkpoint: str, parallel: ParallelConfig, sequences: list[list[int]]) -> torch.Tensor | None:
    """[T, V] of the checkpoint's weights in fp32; None away from the last stage."""
    layout, platform = open_layout(parallel)
    spec = model_spec(HFFolder(folder), parallel, "student")
    config = transformer_config(spec, parallel, platform, torch.float32, {})
    chunks = build_model(spec, config, layout, platform)
    load_megatron_lm(chunks, Path(checkpoint), "student.load")
    hidden = forward_only(chunks, HiddenStateModel.forward_packed, [packed(sequences)], layout)
    return (hidden[0] @ chunks[-1].lm_head.T)[:, : spec.dims.vocab_size].detach() if layout.is_last_stage else None


def test_smollm2_there_and_back_and_its_logits(pool: WorkerPool, table: Table, tmp_path: Path) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert convert("to-megatron", SMOLLM2, megatron, "--shard-gb", 0.05) == 0
    assert convert("to-hf", megatron, back, "--shard-gb", 0.1) == 0
    assert identical(tensors(SMOLLM2), tensors(back)) and other_files(SMOLLM2) == other_files(back)
    shutil.rmtree(back)
    tokenizer = load_tokenizer(SMOLLM2)
    sequences = [tokenizer.encode(text) for text in TEXTS]
    reference = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.cat([reference(torch.tensor([sequence])).logits[0] for sequence in sequences])  # [T, V]
    for name, parallel in {"tp1": ParallelConfig(), "pp2": ParallelConfig(pp=2)}.items():
        results = pool.run(parallel.pp, logits, str(SMOLLM2), str(megatron / "release"), parallel, sequences)
        (found,) = (each for each in results if each is not None)
        gap = ((found - expected).abs().max() / expected.abs().max()).item()
        table.add("logits against transformers (largest difference / largest logit)", f"SmolLM2-135M {name}", f"{gap:.1e}")
        assert gap <= 1e-5
