"""A frozen teacher or reference on the student's ranks: forward only, no gradient buffers, no DDP, no optimizer memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.hf_mapping import EMBEDDING, LM_HEAD
from megatron_opd.mcore.model import build_model, load_pretrained, model_spec, transformer_config
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.schedule import forward_only
from megatron_opd.types import PackedBatch


class FrozenModel:
    """Final hidden states of packed micro-batches, and the LM head in the student's row layout.

    ``student_padded_vocab`` is the number of vocabulary rows over all of the student's tensor-parallel ranks: the frozen
    head is cut at the same rows, whatever padding the model itself came with, so the shards of both models hold the same ids.
    """

    def __init__(
        self,
        folder: HFFolder,
        key: str,
        parallel: ParallelConfig,
        layout: ParallelLayout,
        platform: Platform,
        dtype: torch.dtype,
        student_padded_vocab: int,
    ) -> None:
        self.layout = layout
        self.spec = model_spec(folder, parallel, key)
        config = transformer_config(self.spec, parallel, platform, dtype, native={})
        self.model = build_model(self.spec, config, layout, platform, with_head=False)
        load_pretrained(self.model, self.spec, folder, layout)
        self.model.eval()
        self.model.requires_grad_(False)
        self.lm_head: Tensor | None = None  # [V_student_padded/tp, H], last stage only
        if layout.is_last_stage:
            rows = student_padded_vocab // layout.tp_size
            (name,) = EMBEDDING.hf if self.spec.dims.tied else LM_HEAD.hf
            head = folder.rows(name, layout.tp_rank * rows, (layout.tp_rank + 1) * rows)
            self.lm_head = head.to(platform.device, dtype)

    def hidden_states(self, batches: Sequence[PackedBatch]) -> list[Tensor] | None:
        """[T, H] for each micro-batch on the last pipeline stage, None elsewhere."""
        hidden = forward_only(self.model, self.model.forward_packed, batches)
        return hidden if self.layout.is_last_stage else None
