"""Weights by a Hugging Face folder on a disk that trainer and engines share: the last resort, where no group can be formed."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from megatron_opd.hf_folder import write_hf_folder
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.weight_sync.delivery import Delivery
from megatron_opd.weight_sync.members import Members


class Disk:
    """A :class:`~megatron_opd.weight_sync.delivery.Carrier`. Every engine rank reads what it needs; the probe is the proof."""

    def __init__(self, trainer: Trainer, first_rank: FirstRank, source: Path, folder: Path, dtype: torch.dtype) -> None:
        """Args:
        source: the student's own folder, whose config and tokenizer go along.
        folder: where the versions are written, one at a time; the engines see it under the same path.
        """
        self._trainer, self._first_rank = trainer, first_rank
        self._source, self._folder, self._dtype = source, folder, dtype

    def form(self, members: Members | None) -> None:
        """Nothing connects."""

    def send(self, members: Members | None, version: int, *, check: bool) -> Delivery:
        target = self._folder / f"version-{version}"
        stream = self._trainer.export().whole()

        def write() -> None:
            try:
                if members is not None:
                    shutil.rmtree(self._folder, ignore_errors=True)
                    self._folder.mkdir(parents=True)
                    write_hf_folder(stream, self._source, target, self._dtype)
            finally:
                for _ in stream:  # collective, on every rank to its end
                    pass

        self._first_rank.everywhere(write)

        def load() -> Delivery:
            assert members is not None
            body = {"model_path": str(target), "load_format": "auto", "weight_version": str(version), "flush_cache": False}
            members.results(members.post("/update_weights_from_disk", lambda engine: body))
            size = float(sum(file.stat().st_size for file in target.glob("*.safetensors")))
            return Delivery(size, size / members.tp)

        return self._first_rank.run(load)

    def leave(self, members: Members | None) -> None:
        if self._first_rank.here:
            shutil.rmtree(self._folder, ignore_errors=True)
