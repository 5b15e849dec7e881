"""A frozen teacher or reference on the student's ranks: forward only, no gradient buffers, no DDP, no optimizer memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_opd.config import Fp8Recipe, ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.families import EMBEDDING, LM_HEAD
from megatron_opd.mcore.frozen_fp8 import quantize_to_fp8
from megatron_opd.mcore.megatron_lm import load_head, load_megatron_lm
from megatron_opd.mcore.model import HiddenStateModel, ModelSpec, build_model, load_pretrained, model_spec, transformer_config
from megatron_opd.mcore.parallel import ParallelLayout, frozen_layout
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.schedule import forward_only
from megatron_opd.types import PackedBatch


def build_frozen(
    spec: ModelSpec,
    parallel: ParallelConfig,
    layout: ParallelLayout,
    platform: Platform,
    dtype: torch.dtype,
    native: dict[str, Any] | None = None,
    fp8: Fp8Recipe | None = None,
) -> tuple[HiddenStateModel, ...]:
    """This rank's chunks without an LM head and without weights; nothing in them asks for a gradient."""
    config = transformer_config(spec, parallel, platform, dtype, native or {}, fp8=fp8)
    chunks = build_model(spec, config, layout, platform, with_head=False)
    for chunk in chunks:
        chunk.eval()
        chunk.requires_grad_(False)
    return chunks


class FrozenModel:
    """Final hidden states of packed micro-batches from a layout of its own, and the LM head in the student's row layout.

    The head is held where the student's loss is computed, cut at the student's rows, whatever padding the model itself came
    with: the shards of both models hold the same ids.
    """

    def __init__(
        self,
        folder: HFFolder,
        section: str,
        parallel: ParallelConfig,
        student: ParallelLayout,
        platform: Platform,
        dtype: torch.dtype,
        student_padded_vocab: int,
        *,
        checkpoint: Path | None = None,
        offload: bool = False,
        quantized: bool = False,
        fp8: Fp8Recipe | None = None,
    ) -> None:
        """Collective over the world.

        Args:
            section: of the config, named in errors.
            parallel: the model's own, on all of the student's ranks.
            checkpoint: of Megatron-LM, whose weights are taken in place of those in ``folder``.
            student_padded_vocab: the student's vocabulary rows over all of its tensor-parallel ranks.
            offload: the weights of the layers wait in host memory outside :meth:`on_device`.
            quantized: the linear layers are held in FP8, once they are loaded; :func:`~.frozen_fp8.check_fp8` has passed.
            fp8: the recipe of the layers' products; None: in ``dtype``.
        """
        self.student, self.platform, self.dtype = student, platform, dtype
        self.layout = frozen_layout(parallel, student, section)
        self.spec = model_spec(folder, parallel, section)
        self.chunks = build_frozen(self.spec, parallel, self.layout, platform, dtype, fp8=fp8)
        if checkpoint is None:
            load_pretrained(self.chunks, self.spec, folder, self.layout)
        else:
            load_megatron_lm(self.chunks, checkpoint, f"{section}.load")
        if quantized:
            quantize_to_fp8(self.chunks, self.layout)
        self.lm_head: Tensor | None = None  # [V_student_padded/tp, H], on the student's last stage only
        rows = student_padded_vocab // student.tp_size
        if checkpoint is not None:
            head = load_head(checkpoint, self.spec, student.tp_rank, student.tp_size, rows, dtype)
        elif student.is_last_stage:
            (name,) = EMBEDDING.hf if self.spec.dims.tied else LM_HEAD.hf
            head = folder.rows(name, student.tp_rank * rows, (student.tp_rank + 1) * rows)
        if student.is_last_stage:
            self.lm_head = head.to(platform.device, dtype)
        self._waiting = [platform.to_host(parameter.data) for parameter in self.parameters()] if offload else None
        self._leave_device()

    @property
    def hidden_size(self) -> int:
        return int(self.spec.hf.hidden_size)

    def parameters(self) -> list[Parameter]:
        """Of the layers and the embedding; the LM head is not among them."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The weights are in device memory; offloaded ones leave it at the end, unchanged, so nothing is copied back."""
        if self._waiting is not None:
            for parameter, weights in zip(self.parameters(), self._waiting, strict=True):
                parameter.data = weights.to(self.platform.device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self._leave_device()

    def _leave_device(self) -> None:
        if self._waiting is not None:
            for parameter, weights in zip(self.parameters(), self._waiting, strict=True):
                parameter.data = weights

    def hidden_states(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """[T, H] in host memory for each micro-batch, on the last stage of the model's own layout; nothing elsewhere.

        Within :meth:`on_device`. ``batches``: this replica's, sliced for its own context-parallel rank.
        """
        return forward_only(self.chunks, HiddenStateModel.forward_packed, batches, self.layout, keep=self.platform.to_host)
