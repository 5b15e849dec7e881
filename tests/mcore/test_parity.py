"""Megatron's logits and weights against transformers', from the same HF folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
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
# Both kinds of layers, each with RoPE of its own; a window that is shorter than the sequences.
GEMMA3: dict[str, Any] = {
    "arch": "gemma3",
    "layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
    },
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16}
YARN_OF_DEEPSEEK = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.2,
}
# 101 rows are not divisible by 2, and head_dim 16 x 4 heads is not the hidden size 32.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "llama, tied": {"arch": "llama", "tied": True},
    "llama, llama3 RoPE": {"arch": "llama", "rope_scaling": LLAMA3_ROPE},
    "llama, YaRN": {"arch": "llama", "rope_scaling": YARN},
    "mistral, YaRN": {"arch": "mistral", "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "qwen2, YaRN": {"arch": "qwen2", "hidden": 64, "rope_scaling": {**YARN, "attention_factor": 1.7}},
    "qwen3, YaRN": {"arch": "qwen3", "rope_scaling": {**YARN, "beta_fast": 4.0, "truncate": False}},
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
    "gemma3": GEMMA3,
    "gemma3, tied": {**GEMMA3, "tied": True, "rope_parameters": None},
    "mixtral, YaRN": {"arch": "mixtral", "rope_scaling": YARN},
    "qwen3 moe, YaRN": {"arch": "qwen3_moe", "rope_scaling": YARN},
    "gpt-oss": {"arch": "gpt_oss"},
    "deepseek v3": {"arch": "deepseek_v3"},
    "deepseek v3, yarn": {
        "arch": "deepseek_v3",
        "rope_scaling": YARN_OF_DEEPSEEK,
        "tied": True,
        "n_group": 1,
        "topk_group": 1,
    },
}
if Version(megatron.core.__version__) < Version("0.19"):  # which refuses it
    whole_queries = {"heads": 6, "q_lora_rank": None, "first_k_dense_replace": 0}
    MODELS["deepseek v3, whole queries"] = {"arch": "deepseek_v3", **whole_queries}
DEEPSEEK = tuple(name for name in MODELS if "deepseek" in name)
FAST_DEEPSEEK = (*((name, "tp1") for name in DEEPSEEK), ("deepseek v3", "ep2 x tp2 sp"))
EXPERTS = ("mixtral", "qwen3 moe", "gpt-oss", *DEEPSEEK)
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "tp2 sp": ParallelConfig(tp=2, sequence_parallel=True),
    "pp2": ParallelConfig(pp=2),
    "ep2": ParallelConfig(ep=2, dp=2),
    "ep2 x tp2 sp": ParallelConfig(ep=2, tp=2, sequence_parallel=True),
    "ep2 x pp2": ParallelConfig(ep=2, pp=2, dp=2),
}


def cases(*models: str) -> list[Any]:
    """Models with the layouts that they have: experts take tensor parallelism together with expert parallelism only.

    No layout touches YaRN.
    """
    return [
        pytest.param(m, n, marks=pytest.mark.slow if m in DEEPSEEK and (m, n) not in FAST_DEEPSEEK else [])
        for m in models
        for n in LAYOUTS
        if n == "tp1" or ("YaRN" not in m and (n == "pp2" or (m in EXPERTS) == ("ep2" in n)))
    ]


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


@pytest.mark.parametrize(
    ("model", "layout"), cases("llama, tied", "qwen2 (qkv bias)", "qwen3 (qk norm)", "gemma3, tied", *EXPERTS)
)
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
