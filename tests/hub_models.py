"""Tiny models whose config.json has the keys of published ones, in the spelling of their time; sizes alone are ours.

Odd head counts, head sizes that are not hidden / heads where the original names them, and 101 ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_opd.hf_folder import SINGLE, checkpoint_tensors
from tests.tiny_models import SPECIAL_TOKENS, make_tokenizer, randomise

_SIZES = {"vocab_size": 101, "intermediate_size": 56, "num_hidden_layers": 2, "initializer_range": 0.02, "use_cache": True}
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    **_SIZES,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-2-7b-hf": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        **_LLAMA,
        "hidden_size": 48,
        "max_position_embeddings": 4096,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
    },
    "vicuna-7b-v1.5-16k": {
        **_LLAMA,
        "hidden_size": 48,
        "max_length": 16384,
        "max_position_embeddings": 4096,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "pad_token_id": 0,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
    "Llama-3.2-1B-Instruct": {
        **_LLAMA,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": [1, 2, 3],
        "head_dim": 16,
        "hidden_size": 60,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,  # 8192 in the original
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "granite-3b-code-base": {
        **_LLAMA,
        "attention_bias": True,
        "attention_dropout": 0.1,
        "hidden_size": 48,
        "max_position_embeddings": 2048,
        "mlp_bias": True,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "rope_theta": 10000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": 48,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "model_type": "qwen2",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_mrope": False,
        "use_sliding_window": False,
        **_SIZES,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 48,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 6,  # 4096 in the original
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        **_SIZES,
    },
    "Phi-3-mini-4k-instruct": {
        "_name_or_path": "Phi-3-mini-4k-instruct",
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 48,
        "max_position_embeddings": 4096,
        "model_type": "phi3",
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 0,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 7,  # 2047 in the original
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **_SIZES,
    },
}


def make_hub_model(folder: Path, name: str) -> Path:
    """Write config.json as the hub has it, random weights in its dtype, and a tokenizer."""
    config = CONFIGS[name]
    folder.mkdir(exist_ok=True)
    make_tokenizer(folder, [f"w{index}" for index in range(len(SPECIAL_TOKENS), config["vocab_size"])])
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    randomise(model, seed=0)
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[config["torch_dtype"]]
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    weights = {key: tensor.to(dtype).contiguous() for key, tensor in checkpoint_tensors(model).items() if key not in tied}
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    return folder
