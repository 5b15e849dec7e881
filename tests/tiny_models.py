"""Tiny model folders in HF format, as the hub would give them: config.json, safetensors, tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

Arch = Literal["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "mistral", "phi3", "gemma3", "gpt_oss", "deepseek_v3"]

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")  # ids 0 to 4; the words follow
EOS_ID = SPECIAL_TOKENS.index("<eos>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mixtral": MixtralConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "gemma3": Gemma3TextConfig,
    "gpt_oss": GptOssConfig,
    "deepseek_v3": DeepseekV3Config,
}
_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "truncate": False,
        },
    },
    # Latent sizes, head sizes and widths all differ; the first layer is dense; 2 of 4 groups of 2 experts are looked at.
    "deepseek_v3": {
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "head_dim": 6,
        "v_head_dim": 14,
        "num_key_value_heads": None,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
    },
}


def make_tokenizer(folder: str | Path, vocab_words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Write a tokenizer of SPECIAL_TOKENS and ``vocab_words``, split at white space, with a chat template."""
    vocab = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *vocab_words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    return fast


def make_model(
    folder: str | Path,
    arch: Arch = "llama",
    *,
    tied: bool = False,
    vocab_size: int = 101,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    max_positions: int = 128,
    seed: int = 0,
    rope_scaling: dict[str, Any] | None = None,
    max_shard_size: str | None = None,
    vocab_words: Sequence[str] | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """Write a random fp32 model and its tokenizer (words w5, w6, ... unless given) to ``folder``; returns the model.

    Args:
        fields: more of config.json.
    """
    config = _CONFIGS[arch](
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=0,
        **{"num_key_value_heads": kv_heads, "head_dim": head_dim, **_EXPERTS.get(arch, {}), **fields},
        **({} if rope_scaling is None else {"rope_scaling": rope_scaling}),
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed)
    if max_shard_size is None:
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer(folder, vocab_words or [f"w{index}" for index in range(len(SPECIAL_TOKENS), vocab_size)])
    return model


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights large enough that logits spread over several nats, random norms and biases: a wrong or missing tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if (
                model.config.model_type == "gpt_oss" and parameter.dim() == 3
            ):  # [E, in, out]; large enough for the clamp of the gate
                parameter.copy_(noise * 4 / parameter.shape[1] ** 0.5)
            elif parameter.dim() >= 2:
                parameter.copy_(noise * 2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.5 * noise if name.endswith("bias") else 1 + 0.2 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # wide enough to change which experts are chosen
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
