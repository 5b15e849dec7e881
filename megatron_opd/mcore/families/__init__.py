"""The architectures that can be loaded, exported and sent to engines, each declared once."""

from __future__ import annotations

from megatron_opd.mcore.families.deepseek import DEEPSEEK_V3
from megatron_opd.mcore.families.experts import MIXTRAL, QWEN3_MOE
from megatron_opd.mcore.families.family import EMBEDDING, LM_HEAD, Family
from megatron_opd.mcore.families.gemma import GEMMA3
from megatron_opd.mcore.families.gpt_oss import GPT_OSS
from megatron_opd.mcore.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from megatron_opd.mcore.families.phi3 import PHI3
from megatron_opd.types import OpdError

__all__ = ["EMBEDDING", "FAMILIES", "LM_HEAD", "Family", "family_of"]

FAMILIES = {  # by architectures[0] of config.json
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Phi3ForCausalLM": PHI3,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Gemma3ForCausalLM": GEMMA3,
    "GptOssForCausalLM": GPT_OSS,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
}
_REFUSED = {  # with the reason
    "Gemma2ForCausalLM": "it softcaps logits and attention scores, which the loss and flash attention do not",
    "Gemma3ForConditionalGeneration": "it also sees images; give a folder of its text model, a Gemma3ForCausalLM",
}


def family_of(architecture: str) -> Family:
    """Raises OpdError for an architecture that is not among them."""
    if architecture in _REFUSED:
        raise OpdError(f"architecture {architecture}: not supported, since {_REFUSED[architecture]}")
    if architecture not in FAMILIES:
        raise OpdError(f"architecture {architecture}: not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[architecture]
