"""Prompts, the rollout mixture and packing."""

from megatron_opd.data.mixture import Mixture, gold_rollout
from megatron_opd.data.packing import Multiples, context_slice, pack, padding_share
from megatron_opd.data.prompts import PromptDataset, load_prompts
from megatron_opd.data.tokenizers import check_same_tokenizer, load_tokenizer, stop_ids

__all__ = [
    "Mixture",
    "Multiples",
    "PromptDataset",
    "check_same_tokenizer",
    "context_slice",
    "gold_rollout",
    "load_prompts",
    "load_tokenizer",
    "pack",
    "padding_share",
    "stop_ids",
]
