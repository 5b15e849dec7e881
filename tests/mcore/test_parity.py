"""Megatron's logits and weights against transformers', from the same HF folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder, write_hf_folder
from megatron_opd.mcore.hf_export import Export
from megatron_opd.mcore.model import HiddenStateModel
from megatron_opd.mcore.schedule import forward_only
from tests.conftest import Table
from tests.mcore.worlds import build_student, open_layout, packed
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# 101 rows are not divisible by 2, and head_dim 16 x 4 heads is not the hidden size 32.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "llama, tied": {"arch": "llama", "tied": True},
    "llama, llama3 RoPE": {"arch": "llama", "rope_scaling": LLAMA3_ROPE},
    "llama, all biases": {"arch": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2 (qkv bias)": {"arch": "qwen2", "hidden": 64},
    "qwen2, tied": {"arch": "qwen2", "hidden": 64, "tied": True},
    "qwen3 (qk norm)": {"arch": "qwen3"},
    "qwen3, tied": {"arch": "qwen3", "tied": True},
    "llama, sharded file": {"arch": "llama", "max_shard_size": "20KB"},
    "mistral, window": {"arch": "mistral", "sliding_window": 5},
    "qwen3, window": {"arch": "qwen3", "layers": 4, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "phi3, part rotary": {"arch": "phi3", "partial_rotary_factor": 0.75, "sliding_window": 6},
    "phi3, tied": {"arch": "phi3", "tied": True, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "mixtral": {"arch": "mixtral"},
    "qwen3 moe": {"arch": "qwen3_moe"},
}
EXPERTS = ("mixtral", "qwen3 moe")
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "tp2 sp": ParallelConfig(tp=2, sequence_parallel=True),
    "pp2": ParallelConfig(pp=2),
    "ep2": ParallelConfig(ep=2, dp=2),
    "ep2 x tp2 sp": ParallelConfig(ep=2, tp=2, sequence_parallel=True),
    "ep2 x pp2": ParallelConfig(ep=2, pp=2, dp=2),
}


def cases(*models: str) -> list[tuple[str, str]]:
    """Models with the layouts that they have: experts take tensor parallelism together with expert parallelism only."""
    return [(m, n) for m in models for n in LAYOUTS if n == "tp1" or n == "pp2" or (m in EXPERTS) == ("ep2" in n)]


SEQUENCES = [[7, 99, 3, 100, 41, 12, 5, 77, 23, 64, 8, 9], [55, 0, 31], [2, 2, 90, 17, 66, 81, 50]]


def megatron_logits(folder: str, parallel: ParallelConfig) -> torch.Tensor | None:
    """[T, V], gathered over TP; None away from the last stage."""
    layout, platform = open_layout(parallel)
    chunks, spec = build_student(folder, parallel, layout, platform)
    hidden = forward_only(chunks, HiddenStateModel.forward_packed, [packed(SEQUENCES)], layout)
    if not layout.is_last_stage:
        return None
    local = (hidden[0] @ chunks[-1].lm_head.T).detach()  # [T, V/tp]
    shards = [torch.empty_like(local) for _ in range(layout.tp_size)]
    dist.all_gather(shards, local, group=layout.tp)
    return torch.cat(shards, dim=1)[:, : spec.dims.vocab_size]


@pytest.mark.parametrize(("model", "layout"), cases(*MODELS))
def test_logits_equal_transformers(pool: WorkerPool, tmp_path: Path, table: Table, model: str, layout: str) -> None:
    reference = make_model(tmp_path, **MODELS[model])
    parallel = LAYOUTS[layout]
    results = pool.run(parallel.model_parallel_size * (parallel.dp or 1), megatron_logits, str(tmp_path), parallel)
    with torch.no_grad():
        expected = torch.cat([reference(torch.tensor([sequence])).logits[0] for sequence in SEQUENCES])  # [T, V]
    for logits in results:
        if logits is not None:
            difference = ((logits - expected).abs().max() / expected.abs().max()).item()
            table.add(
                "logits against transformers (largest difference / largest logit)",
                f"{model:20} {layout:8}",
                f"{difference:.1e}",
            )
            assert difference <= 1e-5
    assert any(logits is not None for logits in results)


def exported(folder: str, parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    layout, platform = open_layout(parallel)
    chunks, spec = build_student(folder, parallel, layout, platform)
    return {name: tensor.clone() for name, tensor in Export(chunks, spec.architecture, spec.dims, layout).whole()}


@pytest.mark.parametrize(("model", "layout"), cases("llama, tied", "qwen2 (qkv bias)", "qwen3 (qk norm)", *EXPERTS))
def test_export_returns_every_tensor_bit_for_bit_on_every_rank(
    pool: WorkerPool, tmp_path: Path, model: str, layout: str
) -> None:
    make_model(tmp_path, **MODELS[model])
    source = HFFolder(tmp_path)
    parallel = LAYOUTS[layout]
    for weights in pool.run(parallel.model_parallel_size * (parallel.dp or 1), exported, str(tmp_path), parallel):
        assert set(weights) == set(source.files)
        assert all(torch.equal(weights[name], source.tensor(name)) for name in weights)


def test_written_folder_loads_in_transformers_and_generates(tmp_path: Path) -> None:
    original = make_model(tmp_path / "source", "qwen3", tied=True)
    source = HFFolder(tmp_path / "source")
    write_hf_folder(((name, source.tensor(name)) for name in source.files), source.path, tmp_path / "copy", torch.float32)
    copy: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    prompt = torch.tensor([SEQUENCES[0]])
    assert torch.equal(copy(prompt).logits, original(prompt).logits)
    assert copy.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt.shape[1]
