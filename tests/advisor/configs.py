"""Config trees for the advisor, and models of which there is nothing but a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def write_config_json(folder: Path, fields: dict[str, Any]) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def supervised(student: str, teacher: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """The teacher's full distribution on gold responses: nothing is sampled, so no engine is built."""
    return {
        "run": {"name": "advised"},
        "student": {"model": student, "parallel": parallel},
        "teacher": {"model": teacher},
        "reference": None,
        "data": {"prompts": "prompts.jsonl", "max_context": 8192},
        "mixture": {"student": 0, "gold": 1, "gold_weight": 1.0},
        "loss": {"opd": "reverse_kl", "off_policy": "divergence", "reference_kl": 0},
    }
