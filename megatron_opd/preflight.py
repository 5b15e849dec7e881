"""Everything that can be wrong is found here, before any model is built: files, tensors, tokenizers, prompts, layout, resume.

``prepare`` reads headers and text only, and returns what the run starts from. Every refusal is an OpdError of one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_opd.config import HELDOUT, Config, EvalConfig, teacher_key
from megatron_opd.data.packing import Multiples
from megatron_opd.data.prompts import load_prompts
from megatron_opd.data.tokenizers import check_same_tokenizer, load_tokenizer, solution_end, stop_ids
from megatron_opd.engine_checks import check_latent_attention, check_served, check_servers, check_window
from megatron_opd.evaluation.tasks import Task, load_tasks
from megatron_opd.guards import check_heldout, check_not_student, findings, prompt_findings
from megatron_opd.hf_folder import HFFolder, resolve_model
from megatron_opd.losses import TOP_K_KINDS
from megatron_opd.mcore.checkpoint import check_checkpoint
from megatron_opd.mcore.checkpoint_files import checkpoints, damage, latest_checkpoint
from megatron_opd.mcore.fp8 import check_fp8_param_platform, check_fp8_platform
from megatron_opd.mcore.frozen_fp8 import check_fp8
from megatron_opd.mcore.megatron_lm import check_weights, find_checkpoint
from megatron_opd.mcore.model import ModelSpec, TransformerConfig, check_model_fp8, dtype_of, model_spec, transformer_config
from megatron_opd.mcore.parallel import data_parallel_size
from megatron_opd.mcore.platform import Platform
from megatron_opd.quantization import require_modelopt
from megatron_opd.rollout.embedded import check_attention
from megatron_opd.types import OpdError, Prompt, SamplingParams, Tokenizer

# Positions of a context that SGLang gives to no prompt; in a request to score, the response is part of the prompt.
_KEPT_BY_SGLANG = 7


@dataclass(frozen=True)
class Inputs:
    """Checked inputs of a run."""

    student: HFFolder
    teachers: dict[str, HFFolder]  # by name; a single one has the name ""
    reference: HFFolder | None
    student_spec: ModelSpec
    student_config: TransformerConfig
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]  # that end a rollout of the student
    own_stop_ids: tuple[int, ...]  # that the student's folder names
    teacher_stop_ids: dict[str, tuple[int, ...]]
    stop_class: tuple[int, ...]  # the end tokens of student and teachers
    megatron_checkpoints: dict[str, Path]  # by section: weights that Megatron-LM saved, in place of the folder's
    prompts: list[Prompt]
    tasks: list[Task]  # to evaluate
    findings: tuple[str, ...]  # of guards.py, a line each
    loss_vocab_size: int  # ids that student, teacher and reference share
    max_positions: int  # of the shortest context among them
    own_stop_id: int  # ends gold responses
    dp_size: int
    resume: Path | None
    resume_step: int


@dataclass(frozen=True)
class Models:
    """What the config.json of every model says, checked against the layouts."""

    student: HFFolder
    teachers: dict[str, HFFolder]  # by name; a single one has the name ""
    reference: HFFolder | None
    student_spec: ModelSpec
    student_config: TransformerConfig
    frozen_specs: dict[str, ModelSpec]  # by section of the config
    served: frozenset[str]  # the teachers that are on none of the ranks

    @property
    def frozen(self) -> dict[str, HFFolder]:
        """On the ranks, by section of the config."""
        teachers = {teacher_key(name): folder for name, folder in self.teachers.items() if name not in self.served}
        return teachers if self.reference is None else {**teachers, "reference": self.reference}

    @property
    def vocab_size(self) -> int:
        """Ids that student, teacher and reference share."""
        served = [int(self.teachers[name].config.vocab_size) for name in self.served]
        return min([*served, *(spec.dims.vocab_size for spec in (self.student_spec, *self.frozen_specs.values()))])

    @property
    def max_positions(self) -> int:
        served = [int(self.teachers[name].config.max_position_embeddings) - _KEPT_BY_SGLANG for name in self.served]
        return min([*served, *(spec.max_positions for spec in (self.student_spec, *self.frozen_specs.values()))])


def check_models(config: Config, platform: Platform, world_size: int) -> Models:
    """Check what needs no weights, no tokenizer and no prompts. Raises OpdError."""
    parallel = config.student.parallel
    for section, layout in config.layouts.items():
        data_parallel_size(layout, world_size, section)
    student = HFFolder(resolve_model(config.student.model))
    student_spec = model_spec(student, parallel, "student")
    student_config = transformer_config(
        student_spec,
        parallel,
        platform,
        dtype_of(config),
        config.student.megatron,
        fp8=config.student.fp8,
        fp8_param=config.student.fp8_param,
    )
    teachers, reference = _frozen_folders(config, student)
    served = frozenset(config.served_teachers) & frozenset(teachers)
    models = Models(student, teachers, reference, student_spec, student_config, {}, served)
    specs = {section: model_spec(folder, config.layouts[section], section) for section, folder in models.frozen.items()}
    models = replace(models, frozen_specs=specs)
    for section, spec in specs.items():
        transformer_config(spec, config.layouts[section], platform, dtype_of(config), {}, section, config.fp8.get(section))
        if config.quantizes(section):
            check_fp8(spec, config.layouts[section], section)
    for section, recipe in config.fp8.items():
        if (each := {"student": student_spec, **specs}.get(section)) is not None:
            check_model_fp8(each, config.layouts[section], recipe, dtype_of(config), section)
    for name in served:
        check_window(config, models.max_positions, teachers[name], teacher_key(name))
    if config.rollout.backend == "sglang":
        check_window(config, models.max_positions, student, "student")
        if student_config.multi_latent_attention:
            check_latent_attention(config)
    if config.loss.k > models.vocab_size and config.loss.opd in TOP_K_KINDS:
        raise OpdError(f"loss.k: {config.loss.k}, but the vocabulary has {models.vocab_size} ids; lower it")
    return models


def prepare(config: Config, platform: Platform, world_size: int) -> Inputs:
    """Check the whole run. Raises OpdError."""
    inputs = prepare_models(config, platform, world_size)
    inputs = replace(inputs, prompts=_prompts(config, inputs))
    inputs = replace(inputs, tasks=prepare_tasks(config, inputs))
    check_heldout(inputs.prompts, inputs.tasks)
    _check_scored(config, inputs.tasks)
    inputs = replace(inputs, findings=(*inputs.findings, *prompt_findings(config, inputs.prompts)))
    resume, resume_step = _resume(config, inputs.student_spec)
    return replace(inputs, resume=resume, resume_step=resume_step)


def prepare_tasks(config: Config, inputs: Inputs) -> list[Task]:
    """What is evaluated. Raises OpdError."""
    if config.eval is None:
        return []
    return load_tasks(
        config.eval,
        inputs.tokenizer,
        stop_id=inputs.own_stop_id,
        positions=inputs.max_positions,
        max_new_tokens=config.rollout.sampling.max_new_tokens,
        teachers=tuple(config.all_teachers) or ("",),
    )


def prepare_models(config: Config, platform: Platform, world_size: int) -> Inputs:
    """Check models, tokenizers and engines: all but prompts and run.dir. Raises OpdError."""
    models = check_models(config, platform, world_size)
    for section, recipe in config.fp8.items():
        if section == "student" or section in models.frozen:
            check_fp8_platform(platform, recipe, section)
    if config.student.fp8_param and config.student.fp8:
        check_fp8_param_platform(platform, config.student.fp8)
    student, teachers, vocab_size = models.student, models.teachers, models.vocab_size
    found = {section: find_checkpoint(path, f"{section}.load") for section, path in config.megatron_checkpoints.items()}
    if config.student.init == "pretrained":
        _check_weights(student, models.student_spec, "student", found)
    for section, folder in models.frozen.items():
        if config.quantizes(section):
            require_modelopt(f"{section}.quantize", "fp8")
        _check_weights(folder, models.frozen_specs[section], section, found)
    for name in models.served:
        check_served(config.all_teachers[name], teachers[name], teacher_key(name))
    if config.rollout.backend != "sglang" and config.samples:
        check_attention(student.config, str(student.path))
        for name, folder in teachers.items() if config.mixture.teacher else ():
            if name not in models.served:
                check_attention(folder.config, str(folder.path))

    excluded = student.config.vocab_size - vocab_size
    check_servers(config, world_size, excluded, on_cuda=platform.device.type == "cuda")
    check_not_student(config, student, teachers, found)
    tokenizer = load_tokenizer(student.path)
    folders = (*teachers.values(), *([models.reference] if models.reference else []))
    others = {folder.path: load_tokenizer(folder.path) for folder in folders if folder.path != student.path}
    for path, other in others.items():
        check_same_tokenizer(tokenizer, other, str(student.path), str(path))
    teacher_tokenizers = {name: others.get(folder.path, tokenizer) for name, folder in teachers.items()}
    own_stops = stop_ids(student.path, tokenizer)
    teacher_stops = {name: stop_ids(folder.path, teacher_tokenizers[name]) for name, folder in teachers.items()}
    stop_class = tuple(sorted({*own_stops, *(index for stops in teacher_stops.values() for index in stops)}))
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= vocab_size:
        raise OpdError(f"student.model: the tokenizer has id {largest_id}, but a model has only {vocab_size} vocabulary rows")

    return Inputs(
        student=student,
        teachers=teachers,
        reference=models.reference,
        student_spec=models.student_spec,
        student_config=models.student_config,
        tokenizer=tokenizer,
        stop_ids=stop_class if config.objective.merge_stop_class else own_stops,
        own_stop_ids=own_stops,
        teacher_stop_ids=teacher_stops,
        stop_class=stop_class,
        megatron_checkpoints=found,
        prompts=[],
        tasks=[],
        findings=findings(config, tokenizer, teacher_tokenizers, own_stops, teacher_stops),
        loss_vocab_size=vocab_size,
        max_positions=models.max_positions,
        own_stop_id=solution_end(tokenizer, own_stops),
        dp_size=data_parallel_size(config.student.parallel, world_size),
        resume=None,
        resume_step=0,
    )


def eval_sampling(config: EvalConfig, inputs: Inputs, task: Task) -> SamplingParams:
    """Of the student's responses, and of a teacher's but for the end tokens."""
    return SamplingParams(config.temperature, config.top_p, task.max_new_tokens, inputs.stop_ids, inputs.loss_vocab_size)


def _check_weights(folder: HFFolder, spec: ModelSpec, section: str, megatron: dict[str, Path]) -> None:
    if section in megatron:
        check_weights(megatron[section], spec, f"{section}.load")
    else:
        folder.check_tensors()


def _frozen_folders(config: Config, student: HFFolder) -> tuple[dict[str, HFFolder], HFFolder | None]:
    """Only the models that the objective or the mixture uses."""
    teachers, reference = {}, None
    if config.uses_teachers:
        teachers = {name: HFFolder(resolve_model(teacher.model)) for name, teacher in config.all_teachers.items()}
    if config.reference is not None and config.objective.needs_reference:
        reference = HFFolder(resolve_model(config.reference.model)) if config.reference.model else student
    return teachers, reference


def _prompts(config: Config, inputs: Inputs) -> list[Prompt]:
    """To train on; every sequence that can arise fits the context and a micro-batch."""
    context = min(inputs.max_positions, config.data.max_context or inputs.max_positions)
    new_tokens = config.rollout.sampling.max_new_tokens if config.mixture.student or config.mixture.teacher else 1
    if new_tokens >= context:
        raise OpdError(
            f"rollout.sampling.max_new_tokens: {new_tokens} leaves no room for a prompt in {context} positions; lower it"
        )
    prompts = load_prompts(
        config.data.prompts,
        inputs.tokenizer,
        stop_id=inputs.own_stop_id,
        max_prompt_tokens=context - new_tokens,
        require_solutions=config.mixture.gold > 0,
        end_ids=inputs.stop_ids if config.mixture.gold else (),
        max_sequence_tokens=context if config.mixture.gold else None,
        teachers=tuple(config.all_teachers) or ("",),
    )
    budget = config.packing.max_tokens_per_microbatch
    longest = _padded(config, max(_sequence_length(prompt, new_tokens, gold=config.mixture.gold > 0) for prompt in prompts))
    if longest > budget:
        raise OpdError(
            f"packing.max_tokens_per_microbatch: {budget} is below the longest possible sequence, {longest}; raise it, "
            "or lower rollout.sampling.max_new_tokens"
        )
    if config.data.prompts_per_step > len(prompts):
        raise OpdError(
            f"data.prompts_per_step: {config.data.prompts_per_step}, but {config.data.prompts} has {len(prompts)} prompts"
        )
    return prompts


def _sequence_length(prompt: Prompt, new_tokens: int, *, gold: bool) -> int:
    """Input positions of the longest sequence that this prompt can give: the last token is only predicted."""
    solution = len(prompt.solution_ids) if gold and prompt.solution_ids is not None else 0
    return len(prompt.token_ids) + max(new_tokens, solution) - 1


def _padded(config: Config, length: int) -> int:
    """Positions of a micro-batch that holds one sequence of ``length``."""
    multiple = Multiples.of(config.layouts.values(), config.row_multiple).tokens
    return -(-length // multiple) * multiple


def _check_scored(config: Config, tasks: Sequence[Task]) -> None:
    """The held-out responses fit a micro-batch, where they are scored. Raises OpdError."""
    if not config.scores_heldout:
        return
    for task in tasks:
        longest = _padded(config, max(_sequence_length(prompt, task.max_new_tokens, gold=False) for prompt in task.prompts))
        if task.name == HELDOUT and longest > (budget := config.packing.max_tokens_per_microbatch):
            raise OpdError(
                f"packing.max_tokens_per_microbatch: {budget} is below the longest possible held-out sequence, {longest}; "
                "raise it, lower eval.max_new_tokens, or set eval.score=false"
            )


def _resume(config: Config, spec: ModelSpec) -> tuple[Path | None, int]:
    run_dir = Path(config.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another rank may have probed just now
    except OSError as error:
        raise OpdError(f"run.dir: {run_dir} cannot be written ({error.strerror}); choose another folder") from error
    folder = run_dir / "checkpoints"
    latest = latest_checkpoint(folder)
    if latest is None:
        if damaged := checkpoints(folder):
            raise OpdError(
                f"checkpoint.resume: every checkpoint in {folder} is damaged (in {damaged[0].name}, {damage(damaged[0])}); "
                "restore one, or delete them to start anew"
            )
        return None, 0
    if config.checkpoint.resume == "never":
        raise OpdError(f"checkpoint.resume: never, but {latest} exists; choose another run.dir or delete it")
    return latest, check_checkpoint(latest, spec, config.run.seed)
