"""What sets one architecture apart: the whole of its support is one of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from megatron_opd.mcore.sharding import Entry, Layers, Sharding, Vocabulary

EMBEDDING = Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary())
FINAL_NORM = Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Sharding())
LM_HEAD = Entry("output_layer.weight", ("lm_head.weight",), Vocabulary())


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's transformers in Megatron's terms.

    Args:
        table: where every tensor lives, by the names of Megatron's local layer spec.
        fields: of TransformerConfig, beyond those that follow from every config.json in the same way.
        refusals: what a config.json asks for and this cannot compute exactly, in words that follow "config.json".
        rope_kinds: of RoPE scaling that are a change of the inverse frequencies alone.
        partial_rotary: whether ``partial_rotary_factor`` leaves the rest of each head without positions.
    """

    table: tuple[Entry, ...]
    fields: Callable[[PretrainedConfig], dict[str, Any]] = lambda hf: {}
    refusals: Callable[[PretrainedConfig], list[str]] = lambda hf: []
    experts: Callable[[PretrainedConfig], int] = lambda hf: 0
    rope_kinds: tuple[str, ...] = ("default", "linear", "llama3")
    partial_rotary: bool = False


def layer(megatron: str, sharding: Sharding, *hf: str, layers: Layers = "all", bias: bool = False) -> Entry:
    """A tensor of each layer; names within it."""
    names = tuple(f"model.layers.{{i}}.{name}" for name in hf)
    return Entry(f"decoder.layers.{{i}}.{megatron}", names, sharding, layers, bias=bias)


def window(hf: PretrainedConfig) -> dict[str, Any]:
    """Fields for ``sliding_window``, in the layers that config.json gives one: all unless it lists their types."""
    fields = hf.to_dict()
    size, types = fields.get("sliding_window"), fields.get("layer_types")
    if not size or (types and "sliding_attention" not in types):
        return {}
    return {
        "window_size": (size - 1, 0),  # tokens to the left of a query's own, and to its right
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in types] if types else None,
    }


def flags_set(hf: PretrainedConfig, *names: str) -> list[str]:
    """A refusal for each of these keys that config.json sets to anything but false, zero or nothing."""
    fields = hf.to_dict()
    return [f"sets {name}={fields[name]}, which is not supported" for name in names if fields.get(name)]


def other_activation(hf: PretrainedConfig, wanted: str = "silu", key: str = "hidden_act") -> list[str]:
    """A refusal where config.json has another activation function."""
    found = hf.to_dict().get(key)
    return [] if found == wanted else [f"sets {key}={found}; only {wanted} is supported"]
