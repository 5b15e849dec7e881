"""Prompts, the rollout mixture and packing."""

from megatron_opd.data.mixture import Mixture, gold_rollout
from megatron_opd.data.packing import context_slice, pack
from megatron_opd.data.prompts import PromptDataset, load_prompts
from megatron_opd.data.tokenizers import check_same_tokenizer, load_tokenizer, stop_ids

__all__ = [
    "Mixture",
    "PromptDataset",
    "check_same_tokenizer",
    "context_slice",
    "gold_rollout",
    "load_prompts",
    "load_tokenizer",
    "pack",
    "stop_ids",
]
