"""Builds Megatron models inside pool workers, as the run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.model import HiddenStateModel, ModelSpec, build_model, load_pretrained, model_spec, transformer_config
from megatron_opd.mcore.parallel import ParallelLayout, init_layout
from megatron_opd.mcore.platform import Platform
from megatron_opd.types import PackedBatch


def open_layout(parallel: ParallelConfig) -> tuple[ParallelLayout, Platform]:
    platform = Platform.detect()
    platform.prepare_process()
    return init_layout(parallel, seed=1), platform


def build_student(
    folder: str | Path,
    parallel: ParallelConfig,
    layout: ParallelLayout,
    platform: Platform,
    dtype: torch.dtype = torch.float32,
    native: dict[str, Any] | None = None,
) -> tuple[tuple[HiddenStateModel, ...], ModelSpec]:
    source = HFFolder(folder)
    spec = model_spec(source, parallel, "student")
    config = transformer_config(spec, parallel, platform, dtype, native or {})
    chunks = build_model(spec, config, layout, platform)
    load_pretrained(chunks, spec, source, layout)
    return chunks, spec


def packed(sequences: list[list[int]]) -> PackedBatch:
    """Sequences as one micro-batch without weights."""
    lengths = [len(sequence) for sequence in sequences]
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    zeros = torch.zeros(len(tokens))
    return PackedBatch(
        tokens=tokens,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        labels=torch.zeros_like(tokens),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        old_log_probs=zeros,
        rollout_weights=zeros,
        teacher_weights=zeros,
        gold_weights=zeros,
    )
