"""The architectures that can be loaded, exported and sent to engines, each declared once."""

from __future__ import annotations

from megatron_opd.mcore.families.deepseek import DEEPSEEK_V3
from megatron_opd.mcore.families.experts import MIXTRAL, QWEN3_MOE
from megatron_opd.mcore.families.family import EMBEDDING, LM_HEAD, Family
from megatron_opd.mcore.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from megatron_opd.types import OpdError

__all__ = ["EMBEDDING", "FAMILIES", "LM_HEAD", "Family", "family_of"]

FAMILIES = {  # by architectures[0] of config.json
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
}


def family_of(architecture: str) -> Family:
    """Raises OpdError for an architecture that is not among them."""
    if architecture not in FAMILIES:
        raise OpdError(f"architecture {architecture}: not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[architecture]
