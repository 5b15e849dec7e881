"""What a config.json asks for and Megatron cannot compute exactly is refused, with key, value and reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.model import model_spec
from megatron_opd.types import OpdError
from tests.conversion.folders import edit_config
from tests.tiny_models import make_model

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "biases of attention alone": (
        "llama",
        {"attention_bias": True},
        r"sets attention_bias=True and mlp_bias=False; Megatron has biases in all",
    ),
    "biases of the MLP alone": ("llama", {"mlp_bias": True}, r"sets attention_bias=False and mlp_bias=True"),
    "dynamic RoPE": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        r"RoPE scaling 'dynamic' is not supported \(its frequencies depend on a sequence's length\)",
    ),
    "YaRN": (
        "gemma3",
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        r"RoPE scaling 'yarn' is not supported \(it scales queries and keys too\)",
    ),
    "LongRoPE": (
        "phi3",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32},
        r"RoPE scaling 'longrope' is not supported \(its factors depend on a sequence's length\)",
    ),
    "positions for a part of each head": (
        "qwen3",
        {"partial_rotary_factor": 0.5},
        r"partial_rotary_factor=0.5 is not supported for Qwen3ForCausalLM",
    ),
    "another activation": ("phi3", {"hidden_act": "gelu"}, r"sets hidden_act=gelu; only silu is supported"),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals_name_key_value_and_reason(tmp_path: Path, case: str) -> None:
    arch, fields, message = CASES[case]
    make_model(tmp_path, arch)  # type: ignore[arg-type]
    edit_config(tmp_path, **{"rope_parameters": None, **fields})
    with pytest.raises(OpdError, match=message):
        model_spec(HFFolder(tmp_path), ParallelConfig(), "student")
