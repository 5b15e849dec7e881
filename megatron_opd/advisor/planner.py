"""From a config and a number of GPUs to the memory of every class of ranks. What plans have in common is computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from megatron_opd.advisor.plan import EngineBytes, Frozen, Plan, RankClass
from megatron_opd.advisor.workload import largest_workload, longest_sequence, shortest_microbatch
from megatron_opd.config import Config
from megatron_opd.engine_checks import started_servers
from megatron_opd.hf_folder import HFFolder, expected_shapes
from megatron_opd.mcore.fake_world import FAKE
from megatron_opd.mcore.footprint import (
    Kernels,
    PassesBytes,
    Rank,
    StateBytes,
    Workload,
    chunk_layers,
    chunk_passes,
    frozen_bytes,
    head_bytes,
    loss_chunk_bytes,
    scheduled,
    state_bytes,
)
from megatron_opd.mcore.model import RECOMPUTED_BY_TE, ModelSpec, dtype_of
from megatron_opd.preflight import Models, check_models
from megatron_opd.rollout.slot_cache import most_bytes
from megatron_opd.summary import axes
from megatron_opd.types import OpdError

_EXPERTS = "experts: routing counts as balanced"
Result = TypeVar("Result")
NODE = 8  # GPUs that share a host, as far as there are so many


class NoRoom(Exception):
    """A rank needs more memory than there is."""


class Planner:
    """Plans of many configs for runs on ``device``, whose kernels keep what ``kernels`` says."""

    def __init__(self, device: torch.device, kernels: Kernels, memory: int = 0) -> None:
        """``memory``: bytes of a GPU, of which SGLang's servers take a share."""
        self.device, self.kernels, self.memory = device, kernels, memory
        self._known: dict[tuple[Any, ...], Any] = {}

    def plan(self, config: Config, gpus: int, *, up_to: float = math.inf) -> Plan:
        """Raises OpdError where the config does not fit ``gpus`` GPUs or its models, of which only config.json is read, and
        NoRoom as soon as a rank needs more than ``up_to`` bytes."""
        notes = _notes(config)
        config = without_te_recompute(config)
        models = check_models(config, FAKE, gpus)
        workload = largest_workload(config, models, gpus)
        classes = []
        for name, rank, ranks in rank_classes(config, gpus):
            if self._state(config, models.student_spec, rank).total > up_to:  # known before any pass is measured
                raise NoRoom(f"{name}: the student's state")
            classes.append(self._rank_class(config, models, workload, rank, name, ranks))
            if classes[-1].peak > up_to:
                raise NoRoom(f"{name}: {classes[-1].peak} bytes")
        return Plan(
            gpus=gpus,
            layout=axes(config.student.parallel, gpus),
            workload=workload,
            shortest_microbatch=shortest_microbatch(config, models),
            experts=models.student_spec.dims.experts > 0,
            classes=classes,
            notes=notes if models.student_spec.dims.experts == 0 else (*notes, _EXPERTS),
        )

    def _rank_class(self, config: Config, models: Models, workload: Workload, rank: Rank, name: str, ranks: int) -> RankClass:
        student, parallel = models.student_spec, config.student.parallel
        last = rank.stage(parallel) == parallel.pp - 1
        scored = frozen_scored(config, models)
        hidden = _compared_with(scored)
        itemsize = dtype_of(config).itemsize
        tokens = workload.tokens * workload.microbatches // parallel.cp
        return RankClass(
            name=name,
            ranks=ranks,
            state=self._state(config, student, rank),
            passes=self._passes(config, student, rank, workload),
            loss=loss_chunk_bytes(config, student, rank, workload, hidden, models.vocab_size, self.device) if last else 0,
            frozen={section: self._frozen(config, models, section, rank, workload) for section in scored},
            engine=self._engines(config, models, rank.world_size),
            export=2 * student.dims.padded_vocab_size * int(student.hf.hidden_size) * itemsize,
            waiting=tokens * sum(hidden) * itemsize if last else 0,
            student_offload=config.student.offload,
        )

    def _state(self, config: Config, spec: ModelSpec, rank: Rank) -> StateBytes:
        key = ("state", *student_key(config, spec, rank), config.optimizer.model_dump_json())
        return self._once(key, lambda: state_bytes(config, spec, rank))

    def _passes(self, config: Config, spec: ModelSpec, rank: Rank, workload: Workload) -> PassesBytes:
        key = ("passes", *student_key(config, spec, rank), workload.lengths)
        passes = self._once(key, lambda: chunk_passes(config, spec, rank, workload.lengths, self.kernels))
        return scheduled(config, rank, passes, workload.microbatches)

    def _frozen(self, config: Config, models: Models, section: str, rank: Rank, workload: Workload) -> Frozen:
        spec, parallel = models.frozen_specs[section], config.layouts[section]
        place = rank.stage(parallel) == 0, rank.stage(parallel) == parallel.pp - 1, rank.world_size
        model = str(models.frozen[section].path), config.student.dtype, parallel.model_dump_json()
        size = self._once(
            ("frozen", *model, place, workload.lengths, config.quantizes(section)),
            lambda: frozen_bytes(config, spec, section, rank, workload.lengths, self.kernels),
        )
        return Frozen(size, head_bytes(config, models.student_spec, spec, rank), _offloaded(config, section))

    def _engines(self, config: Config, models: Models, gpus: int) -> EngineBytes:
        """As ``setup.build_system`` builds them."""
        engines, share = [], 0
        mixture, prompts = config.mixture, config.data.prompts_per_step
        if config.starts_servers:
            share = int(self.memory * server_share(config, gpus))
        if config.samples and config.rollout.backend == "embedded":
            engines.append((models.student, prompts * mixture.student))
        if config.teacher_writes:
            embedded = [folder for name, folder in models.teachers.items() if name not in config.sglang_teachers]
            engines += [(folder, prompts * mixture.teacher) for folder in embedded]
        sizes = [self._engine(config, models, folder, responses, gpus) for folder, responses in engines]
        asleep = share if config.rollout.placement == "colocated" else 0  # while the training has the memory
        weights = share - asleep + sum(each.weights for each in sizes)
        pushed = 0
        if asleep and config.rollout.backend == "sglang" and config.samples and not config.rollout.urls:
            pushed = self._elements(models.student) * dtype_of(config).itemsize // config.rollout.tp
        return EngineBytes(weights, asleep + max((each.cache for each in sizes), default=0), pushed)

    def _engine(self, config: Config, models: Models, folder: HFFolder, responses: int, gpus: int) -> EngineBytes:
        itemsize, hf = dtype_of(config).itemsize, folder.config
        # How many held-out prompts there are only their file tells.
        slots = config.rollout.max_batch_size if config.eval else min(config.rollout.max_batch_size, -(-responses // gpus))
        cache = most_bytes(
            hf.num_hidden_layers,
            slots,
            hf.num_key_value_heads,
            key_and_value(hf.to_dict()),
            longest_sequence(config, models),
            itemsize,
        )
        return EngineBytes(self._elements(folder) * itemsize, cache)

    def _elements(self, folder: HFFolder) -> int:
        """Of all of a model's weights."""
        shapes = ("elements", str(folder.path))
        return self._once(shapes, lambda: sum(math.prod(shape) for shape in expected_shapes(folder.config).values()))

    def _once(self, key: tuple[Any, ...], compute: Callable[[], Result]) -> Result:
        if key not in self._known:
            self._known[key] = compute()
        result: Result = self._known[key]
        return result


def key_and_value(hf: dict[str, Any]) -> int:
    """Elements of one head's key and value as transformers caches them, latent attention's after their projections up."""
    if "kv_lora_rank" in hf:
        return int(hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"] + hf["v_head_dim"])
    return 2 * int(hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])


def server_share(config: Config, gpus: int) -> float:
    """Of a GPU's memory that SGLang's servers keep; 0 where they have GPUs of their own, beyond those of the first node."""
    native = config.rollout.sglang
    if int(native.get("base_gpu_id", 0)) >= min(gpus, NODE):
        return 0.0
    if "mem_fraction_static" not in native:
        whose, remedy = started_servers(config, "rollout.sglang.base_gpu_id to GPUs of their own")
        raise OpdError(
            f"rollout.sglang.mem_fraction_static: not set, so {whose} would take what is there of the GPUs that they share "
            f"with the training; set it, or {remedy}"
        )
    return float(native["mem_fraction_static"])


def frozen_scored(config: Config, models: Models) -> dict[str, ModelSpec]:
    """The frozen models whose hidden states the loss needs, by section; a teacher may do nothing but write."""
    needed = config.objective.needs_teacher
    return {section: spec for section, spec in models.frozen_specs.items() if needed or section == "reference"}


def _compared_with(scored: dict[str, ModelSpec]) -> tuple[int, ...]:
    """Hidden sizes of the models that a micro-batch is compared with: one teacher, here the widest, and the reference."""
    sizes = {section: int(spec.hf.hidden_size) for section, spec in scored.items()}
    teachers = [size for section, size in sizes.items() if section != "reference"]
    return (*([max(teachers)] if teachers else []), *([sizes["reference"]] if "reference" in sizes else []))


def _notes(config: Config) -> tuple[str, ...]:
    by_te = _recomputed_by_te(config)
    return (
        *(
            ["FP8: products are counted in bf16; Transformer Engine's copies of weights and inputs are not"]
            if config.fp8
            else []
        ),
        *(
            ["student.fp8_param: weights are counted with the transposed copies that Hopper takes, two bytes each as in bf16"]
            if config.student.fp8_param
            else []
        ),
        *(["float32: flash attention has none; without it activations are larger"] if dtype_of(config).itemsize > 2 else []),
        *(
            [f"recompute of {', '.join(by_te)}, which takes Transformer Engine: left out, activations are smaller"]
            if by_te
            else []
        ),
    )


def _recomputed_by_te(config: Config) -> list[str]:
    return [module for module in config.student.megatron.get("recompute_modules") or () if module in RECOMPUTED_BY_TE]


def without_te_recompute(config: Config) -> Config:
    """What the modules here cannot recompute is not recomputed: an upper bound."""
    native, by_te = config.student.megatron, _recomputed_by_te(config)
    if not by_te:
        return config
    kept = [module for module in native["recompute_modules"] if module not in by_te]
    rest = {name: value for name, value in native.items() if not name.startswith("recompute_")}
    native = {**native, "recompute_modules": kept} if kept else rest
    return config.model_copy(update={"student": config.student.model_copy(update={"megatron": native})})


def rank_classes(config: Config, gpus: int) -> Iterator[tuple[str, Rank, int]]:
    """Name, first rank and number of ranks of each combination of pipeline stages, the student's and the frozen models'."""
    stages: dict[tuple[int, ...], int] = {}
    for number in range(gpus):
        rank = Rank(number, gpus)
        stages.setdefault(tuple(rank.stage(layout) for layout in config.layouts.values()), number)
    ends = [*stages.values(), gpus][1:]
    for (own, first), end in zip(stages.items(), ends, strict=True):
        yield _name(config, own), Rank(first, gpus), end - first


def _name(config: Config, own: tuple[int, ...]) -> str:
    """The student's stage, and a frozen model's where it has others."""
    pp = config.student.parallel.pp
    names = [f"pp {own[0]}/{pp}"]
    for (section, layout), stage in zip(config.layouts.items(), own, strict=True):
        if layout.pp not in (pp, 1):
            names.append(f"{section} pp {stage}/{layout.pp}")
    return ", ".join(names)


def student_key(config: Config, spec: ModelSpec, rank: Rank) -> tuple[Any, ...]:
    """What the student's memory on a rank depends on: stages of equal depth are alike, but for the first and the last."""
    student, stage = config.student, rank.stage(config.student.parallel)
    place = chunk_layers(config, spec, rank), stage == 0, stage == student.parallel.pp - 1
    return student.model, student.dtype, student.parallel.model_dump_json(), repr(student.megatron), rank.world_size, place


def _offloaded(config: Config, section: str) -> bool:
    if section == "reference":
        assert config.reference is not None
        return config.reference.offload
    return config.all_teachers[section.removeprefix("teachers.") if section != "teacher" else ""].offload
