"""The run's models, reduced, and a trainer and scorers of them in the run's own layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_opd.audit.reduced_model import write_reduced_model
from megatron_opd.config import Config, teacher_key
from megatron_opd.data.packing import context_slice
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.fp8 import without_tuning
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.hf_export import Export
from megatron_opd.mcore.hf_mapping import entries, named_weights
from megatron_opd.mcore.model import build_model, load_pretrained, model_spec, transformer_config
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.sharding import Sharding
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.preflight import Inputs
from megatron_opd.scoring.megatron import MegatronScorer
from megatron_opd.scoring.routed import RoutedScorer
from megatron_opd.types import FrozenScores, PackedBatch, Scorer

# The teachers have fewer ids than the student has rows, and both are padded.
_STUDENT_VOCAB, _TEACHER_VOCAB = 107, 101
STOP_IDS = (5, 100)  # in different shards, where there are several
_CHUNK_TOKENS = 16  # so that a short micro-batch has several chunks, as a long one has
# TransformerConfig fields that speak of the number of layers, which then must stay.
_OF_DEPTH = {
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
}


@dataclass(frozen=True)
class ReducedModels:
    """Folders with random weights, other ones in each."""

    student: HFFolder
    teachers: dict[str, HFFolder]  # by name; a single one has the name ""; none where the objective needs none
    reference: HFFolder | None

    @property
    def vocab_size(self) -> int:
        """Ids that all of them share."""
        return _TEACHER_VOCAB if self.teachers else _STUDENT_VOCAB


def write_reduced_models(config: Config, inputs: Inputs, folder: Path) -> ReducedModels:
    """Below ``folder``, this rank's own: ranks on other machines may not see its files. All ranks' have the same weights."""
    layouts = config.layouts
    keep_depth = not _OF_DEPTH.isdisjoint(config.student.megatron)
    student = write_reduced_model(
        inputs.student, folder / "student", "student", layouts["student"], _STUDENT_VOCAB, seed=1, keep_depth=keep_depth
    )
    reference, teachers = None, {}
    if inputs.reference is not None:
        reference = write_reduced_model(
            inputs.reference, folder / "reference", "reference", layouts["reference"], _STUDENT_VOCAB, seed=2
        )
    if config.objective.needs_teacher:
        teachers = {
            name: write_reduced_model(
                source,
                folder / f"teacher-{number}",
                teacher_key(name),
                layouts[teacher_key(name)],
                _TEACHER_VOCAB,
                seed=3 + number,
            )
            for number, (name, source) in enumerate(inputs.teachers.items())
        }
    return ReducedModels(student, teachers, reference)


class GradientTrainer(Trainer):
    """A trainer that stops before the optimizer."""

    def gradients(
        self, batches: Sequence[PackedBatch], teacher: Sequence[FrozenScores], reference: Sequence[FrozenScores]
    ) -> tuple[float, dict[str, Tensor]]:
        """The global batch's loss, and its gradients by HF name: full, unpadded, on CPU, equal on all ranks."""
        outputs = self.accumulate_gradients(batches, teacher, reference)
        loss = self._reduce(batches, outputs)[0].item()
        parameters = self.parameters()
        weights = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]  # what exports weights brings gradients to HF names as well
            exported = Export(self.chunks, self.spec.architecture, self.spec.dims, self.layout).whole()
            gradients = {name: gradient.cpu().clone() for name, gradient in exported}
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        return loss, gradients

    def replicated_gradients(self) -> Iterator[Tensor]:
        """The last ones, of this stage's parameters that every tensor-parallel rank holds whole."""
        parameters = named_weights(self.chunks, first_expert=0)
        for entry in entries(self.spec.architecture, self.spec.dims):
            if type(entry.sharding) is Sharding and entry.megatron in parameters and not entry.buffer:
                yield parameters[entry.megatron].main_grad  # type: ignore[attr-defined]  # Megatron's DDP sets it


@dataclass(frozen=True)
class ReducedRun:
    """The parts of a training step, in fp32."""

    trainer: GradientTrainer
    teacher: Scorer | None
    reference: Scorer | None

    def gradients(self, shares: Sequence[Sequence[PackedBatch]]) -> tuple[float, dict[str, Tensor]]:
        """:meth:`GradientTrainer.gradients` of a global batch, as it is packed."""
        layout = self.trainer.layout
        batches = [context_slice(batch, layout.cp_rank, layout.cp_size) for batch in shares[layout.dp_rank]]
        nothing = [FrozenScores() for _ in batches]
        teacher, reference = (each.score(shares) if each else nothing for each in (self.teacher, self.reference))
        return self.trainer.gradients(batches, teacher, reference)


def build_reduced_run(config: Config, models: ReducedModels, platform: Platform, layout: ParallelLayout) -> ReducedRun:
    parallel = config.student.parallel
    spec = model_spec(models.student, parallel, "student")
    native = {
        **without_tuning(config.student.megatron),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }  # a dense copy has no such draws
    chunks = build_model(spec, transformer_config(spec, parallel, platform, torch.float32, native), layout, platform)
    load_pretrained(chunks, spec, models.student, layout)
    trainer = GradientTrainer(
        chunks,
        spec,
        layout,
        platform,
        config.objective,
        # Distributed, each rank would hold the sum over ranks of its own part of the gradients alone.
        config.optimizer.model_copy(update={"distributed": False}),
        total_steps=config.run.steps,
        loss_vocab_size=models.vocab_size,
        stop_ids=STOP_IDS,
        chunk_tokens=min(config.loss.chunk_tokens or _CHUNK_TOKENS, _CHUNK_TOKENS),
    )

    def scorer(folder: HFFolder, section: str) -> Scorer:
        padded, own = spec.dims.padded_vocab_size, config.layouts[section]
        return MegatronScorer(FrozenModel(folder, section, own, layout, platform, torch.float32, padded))

    teachers = {name: scorer(folder, teacher_key(name)) for name, folder in models.teachers.items()}
    return ReducedRun(
        trainer=trainer,
        teacher=teachers.get("") or (RoutedScorer(teachers) if teachers else None),
        reference=scorer(models.reference, "reference") if models.reference else None,
    )
