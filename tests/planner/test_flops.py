"""The planner's FLOPs against what torch counts in transformers' own model, which shares no code with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_opd.config_file import validate_config
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.footprint import Rank
from megatron_opd.mcore.fused_stand_ins import causal_pairs
from megatron_opd.mcore.model import model_spec
from megatron_opd.mcore.work import PassWork, loss_work, training_work
from tests.tiny_models import Arch, make_model

LENGTHS = (64, 48, 16)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def work(
    folder: Path, parallel: dict[str, Any], native: dict[str, Any] | None = None, world_size: int = 1, number: int = 0
) -> tuple[PassWork, float]:
    """Of the layers, and FLOPs of the head's products and gradients."""
    tree = {
        "run": {"name": "counted"},
        "student": {"model": str(folder), "dtype": "float32", "parallel": parallel, "megatron": native or {}},
        "reference": None,
        "data": {"prompts": "none.jsonl"},
        "mixture": {"student": 0, "gold": 1, "gold_weight": 1.0},
        "loss": {"reference_kl": 0},
    }
    config = validate_config(tree)
    spec = model_spec(HFFolder(folder), config.student.parallel, "student")
    rank = Rank(number, world_size)
    loss = loss_work(config, spec, rank, teacher=None, reference=None, vocab_size=spec.dims.vocab_size)
    return training_work(config, spec, rank, LENGTHS, "fused"), loss.of(0, sum(LENGTHS)).products


def transformers_flops(folder: Path) -> tuple[int, int]:
    """Forward and backward of the sequences: of linear layers, and of attention over whole squares."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    linear = attention = 0
    for length in LENGTHS:
        with FlopCounterMode(display=False) as counter:
            model(torch.ones(1, length, dtype=torch.int64)).logits.sum().backward()
        counts = counter.get_flop_counts()["Global"]
        batched = counts.pop(torch.ops.aten.bmm)
        rotary = 2 * length * (config.head_dim // 2)  # frequencies times positions, a product too
        attention += batched - rotary
        linear += sum(counts.values())
    return linear, attention


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_products_and_attention_are_transformers(arch: Arch, tmp_path: Path) -> None:
    make_model(tmp_path / "model", arch, layers=5, hidden=64)
    passes, head = work(tmp_path / "model", {})
    linear, squares = transformers_flops(tmp_path / "model")
    assert passes.both.products + head == linear
    half = causal_pairs(LENGTHS, None) / sum(length**2 for length in LENGTHS)  # of the squares, causal attention has
    assert passes.forward.attention == pytest.approx(squares / 3 * half, rel=1e-12)
    assert passes.backward.attention == pytest.approx(squares / 3 * half * 5 / 2, rel=1e-12)  # the scores a second time


def test_ranks_share_the_work(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama", layers=4, hidden=64)
    alone, head = work(tmp_path / "model", {})
    for parallel, size in (({"tp": 2, "sequence_parallel": True}, 2), ({"cp": 2}, 2), ({"pp": 2}, 2), ({"pp": 2, "vpp": 2}, 2)):
        ranks = [work(tmp_path / "model", parallel, world_size=size, number=number)[0] for number in range(size)]
        assert sum(rank.both.products for rank in ranks) == alone.both.products
        assert sum(rank.both.attention for rank in ranks) == pytest.approx(alone.both.attention, rel=1e-12)
    assert head > 0


def test_recompute_is_one_forward_more(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama", layers=4, hidden=64)
    plain, again = work(tmp_path / "model", {})[0], work(tmp_path / "model", {}, FULL)[0]
    assert again.forward.flops == plain.forward.flops
    assert again.backward.flops == plain.backward.flops + plain.forward.flops


def test_experts_are_those_that_a_token_passes(tmp_path: Path) -> None:
    """Of four experts two each: twice their products, in whatever layout, beside those of a model with one."""
    make_model(tmp_path / "model", "qwen3_moe", layers=2, hidden=64)
    hf = HFFolder(tmp_path / "model").config
    passes, _ = work(tmp_path / "model", {})
    tokens, hidden = sum(LENGTHS), hf.hidden_size
    heads = (2 * hf.num_attention_heads + 2 * hf.num_key_value_heads) * hf.head_dim
    experts = hf.num_experts_per_tok * 3 * hf.moe_intermediate_size
    each = 2 * tokens * hidden * (heads + experts + hf.num_experts)
    assert passes.forward.products == hf.num_hidden_layers * each
    assert passes.backward.products == 2 * passes.forward.products


def test_a_window_bounds_the_pairs() -> None:
    lengths, window = (7, 3), 4
    assert causal_pairs(lengths, window) == sum(min(query + 1, window) for length in lengths for query in range(length))
    assert causal_pairs(lengths, None) == causal_pairs(lengths, 100) == 28 + 6
