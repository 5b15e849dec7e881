"""Typed configuration: sections, keys and defaults; an unknown key is an error.

Defaults that StableOPD's paper (arXiv 2604.08527) does not give are ours and say so.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_opd.types import Aggregation, Objective, OffPolicyTerm, OpdKind, SamplingParams

Fp8Recipe = Literal["delayed", "current", "blockwise", "mxfp8"]
FrozenFp8Recipe = Literal["current", "blockwise", "mxfp8"]  # delayed scaling learns its scales from training passes


def fp8_multiple(recipe: Fp8Recipe | None) -> int:
    """Rows and columns of every FP8 product are multiples of it: 32 where a scale is for 32 numbers; null: 1."""
    return 1 if recipe is None else 32 if recipe == "mxfp8" else 16


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunConfig(_Section):
    name: str = Field(pattern=r"^[\w.\-]+$")
    dir: str  # default: runs/${run.name}
    seed: int = Field(default=17, ge=0, lt=2**31)
    steps: int = Field(default=500, ge=1)
    max_skipped_steps: int = Field(default=10, ge=1)  # non-finite steps in a row before the run stops


class ParallelConfig(_Section):
    tp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    cp: int = Field(default=1, ge=1)
    ep: int = Field(default=1, ge=1)
    dp: int | None = Field(default=None, ge=1)  # null: what the world size leaves
    vpp: int = Field(default=1, ge=1)  # virtual stages of each pipeline rank: above 1, the interleaved schedule
    sequence_parallel: bool = False

    @property
    def model_parallel_size(self) -> int:
        return self.tp * self.pp * self.cp

    @property
    def sequence_multiple(self) -> int:
        """The length of each packed sequence is a multiple of it: context parallelism cuts it into 2 cp chunks."""
        return 1 if self.cp == 1 else 2 * self.cp

    def batch_multiple(self, rows: int = 1) -> int:
        """The tokens of a micro-batch are a multiple of it; so is :attr:`sequence_multiple` of what they are.

        Each rank then holds a multiple of ``rows`` tokens, under sequence parallelism too.
        """
        return math.lcm(self.sequence_multiple, rows * self.cp * (self.tp if self.sequence_parallel else 1))

    @property
    def microbatch_multiple(self) -> int:
        """The interleaved schedule takes micro-batches in groups of pp."""
        return self.pp if self.vpp > 1 else 1


class StudentConfig(_Section):
    model: str  # an HF folder, or a hub name
    init: Literal["pretrained", "random"] = "pretrained"  # random: config.json alone is read (warm start of tiny models)
    load: str | None = None  # a checkpoint of Megatron-LM; its weights in place of those in `model`
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    parallel: ParallelConfig = ParallelConfig()
    offload: bool = False  # parameters and optimizer state wait in host memory during rollouts; gradients are freed
    # Matrix products of the layers by Transformer Engine; null: in `dtype`. More of it by `megatron`: fp8_margin,
    # fp8_amax_history_len, first_last_layers_bf16, num_layers_at_start_in_bf16, ...
    fp8: Fp8Recipe | None = None
    fp8_param: bool = False  # the weights of those products are held in FP8, beside fp32 masters; `current` and `blockwise`
    megatron: dict[str, Any] = {}  # native TransformerConfig fields, checked against the installed class


class TeacherConfig(_Section):
    backend: Literal["megatron", "sglang"] = "megatron"  # megatron: full vocabulary; sglang: scores of given tokens only
    model: str
    load: str | None = None  # a checkpoint of Megatron-LM; its weights in place of those in `model`
    urls: list[str] = []  # sglang: of running servers, all with this model; none: the run starts one
    api_key_file: str | None = None  # of the servers at urls: a text file
    # On the same ranks; null: the student's. sglang: tp alone, of the server; null: rollout.tp.
    parallel: ParallelConfig | None = None
    offload: bool = False  # the weights wait in host memory while the model does not score
    quantize: Literal["fp8"] | None = None  # ModelOpt holds the weights of the linear layers in FP8: half of bf16's memory
    fp8: FrozenFp8Recipe | None = None  # products of the layers in FP8, as the student's; the weights stay in its dtype
    self_distillation: bool = False  # the teacher may have the student's own weights


class ReferenceConfig(_Section):
    model: str | None = None  # null: the initial student
    load: str | None = None  # a checkpoint of Megatron-LM; its weights in place of those in `model`
    parallel: ParallelConfig | None = None  # on the same ranks; null: the student's
    offload: bool = False  # the weights wait in host memory while the model does not score
    quantize: Literal["fp8"] | None = None  # as a teacher's
    fp8: FrozenFp8Recipe | None = None  # as a teacher's


class SamplingConfig(_Section):
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=4096, ge=1)


class LengthBudget(_Section):
    """max_new_tokens of training rollouts grows linearly from ``start`` to the configured one over ``steps``; ours."""

    start: int = Field(ge=1)
    steps: int = Field(ge=1)


class RolloutConfig(_Section):
    backend: Literal["embedded", "sglang"] = "embedded"  # sglang: servers in processes and an environment of their own
    sampling: SamplingConfig = SamplingConfig()
    length_budget: LengthBudget | None = None  # null: max_new_tokens from the first step on
    max_batch_size: int = Field(default=64, ge=1)  # sequences decoded at once on each rank, or at each server
    # Nats a token: mean |log pi_trainer - log pi_engine| of a step's rollouts; ours. Kernels differ by some 0.01 in bf16, an
    # engine that has other weights by 1 and more. null: no bound.
    max_engine_gap: float | None = Field(default=0.2, gt=0)
    # 1: the rollouts of a step are written while the step before trains, by weights that are one update older. SGLang alone.
    lag: Literal[0, 1] = 0
    # Of SGLang's servers. colocated: on the training's own devices, which the two have by turns.
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    # auto: ipc where colocated, else collective. disk: a folder in run.dir that the servers see too, where nothing else works.
    # native: whole tensors to every rank, by SGLang's own broadcast, for servers that were started without our loader.
    weight_sync: Literal["auto", "collective", "ipc", "native", "disk"] = "auto"
    # SGLang servers that the run starts, shared out over its machines; where the only one is lost in use, the run ends.
    engines: int = Field(default=1, ge=1)
    urls: list[str] = []  # of running servers instead: of `megatron-opd serve`, or started as `megatron-opd check` prints
    api_key_file: str | None = None  # of the servers at urls, and of the router: a text file
    router: str | None = None  # URL of a running sglang-router, which picks the server of each request; null: the run does
    tp: int = Field(default=1, ge=1)  # tensor-parallel ranks of each
    python: str | None = None  # the interpreter of SGLang's environment, for the servers that we start; null: this one
    # An address that trainer and servers listen on, or an interface's name, such as eth0, for the address that each machine has
    # there; for servers on other machines, and for a run on several, that of a network that they share.
    host: str = "127.0.0.1"
    startup_timeout: float = Field(default=600.0, gt=0)  # seconds
    request_timeout: float = Field(default=600.0, gt=0)  # seconds for one response, one call, or one broadcast of weights
    max_restarts: int = Field(default=3, ge=0)  # of each server that the run started and lost
    sync_bucket_bytes: int = Field(default=1 << 29, ge=1)  # of one broadcast of weights
    digests: Literal["first", "always"] = "first"  # pushes whose tensors are compared by digest with what the servers then have
    sglang: dict[str, Any] = {}  # native ServerArgs fields, checked against the installed package

    @property
    def transport(self) -> Literal["collective", "ipc", "native", "disk"]:
        """The way of the weights to SGLang's servers."""
        if self.weight_sync != "auto":
            return self.weight_sync
        return "ipc" if self.placement == "colocated" else "collective"


class DataConfig(_Section):
    prompts: str
    prompts_per_step: int = Field(default=64, ge=1)
    max_context: int | None = Field(default=None, ge=2)  # prompt + response, tokens; null: the student's own limit


class MixtureConfig(_Section):
    """Responses for each prompt, and each source's weight in the loss."""

    student: int = Field(default=4, ge=0)
    teacher: int = Field(default=0, ge=0)
    gold: int = Field(default=1, ge=0, le=1)
    student_weight: float = Field(default=1.0, ge=0)
    teacher_weight: float = Field(default=1.0, ge=0)  # ours: plain cross-entropy on teacher-written responses
    gold_weight: float = Field(default=0.1, ge=0)  # lambda_gold; the value is ours, the paper gives none


class LossConfig(_Section):
    opd: OpdKind = "sampled"
    clip: float | None = Field(default=0.2, gt=0, lt=1)  # epsilon; ours; null: importance sampling without clipping
    beta: float = Field(default=0.5, gt=0, lt=1)  # of jsd
    alpha: float = Field(default=0.1, gt=0, lt=1)  # of the skew divergences
    k: int = Field(default=32, ge=1)  # of the top-k divergences
    reference_kl: float = Field(default=0.01, ge=0)  # beta_KL; ours
    aggregation: Aggregation = "token"  # ours; it decides whether plain OPD collapses
    stop_class: Literal["auto", "none"] = "auto"  # auto: the end tokens of student and teacher count as one
    off_policy: OffPolicyTerm = "cross_entropy"  # on gold and teacher-written responses; divergence: GKD
    extrapolation: float = Field(default=1.0, gt=0)  # ExOPD's lambda
    teacher_mix: float = Field(default=1.0, gt=0, le=1)  # TOP-D's alpha
    ratio_bounds: list[float] | None = Field(default=None, min_length=2, max_length=2)  # MOPD's, of pi_theta / pi_old
    position_weight: float = Field(default=0.0, ge=0)  # IW-OPD's gamma
    gated_forward_kl: float = Field(default=0.0, ge=0)  # EOPD's lambda
    truncated_weight: float = Field(default=1.0, ge=0, le=1)  # of the tokens of truncated responses; 0 leaves them out; ours
    repeated_tail_weight: float = Field(default=1.0, ge=0, le=1)  # of the tokens of repeated tails; ours
    entropy_gate: float = Field(default=1.0, ge=0)  # EOPD's tau, nats; ours
    chunk_tokens: int | None = Field(default=None, ge=1)  # null: from a byte budget


class OptimizerConfig(_Section):
    lr: float = Field(default=1e-6, gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0)  # 0 turns clipping off
    distributed: bool = True  # Megatron's distributed optimizer
    overlap_grad_reduce: bool = False  # gradients are reduced while the backward goes on
    bucket_size: int | None = Field(default=None, ge=1)  # parameters that are reduced together; null: Megatron's choice
    overlap_param_gather: bool = False  # parameters are gathered while the next forward goes on; needs overlap_grad_reduce


class PackingConfig(_Section):
    max_tokens_per_microbatch: int = Field(default=16384, ge=2)


class Threshold(_Section):
    """Of one monitor's figure; the highest one reached decides. All but warn go beyond the paper: ours."""

    warn: float | None = None
    rollback: float | None = None  # back to the last healthy checkpoint, with stronger terms; see monitors.rollback
    stop: float | None = None  # after a checkpoint


class RollbackConfig(_Section):
    """What a rollback changes; ours."""

    reference_kl_factor: float = Field(default=2.0, ge=1)  # on loss.reference_kl, each time
    gold_weight_factor: float = Field(default=2.0, ge=1)  # on mixture.gold_weight, each time
    limit: int = Field(default=3, ge=1)  # of rollbacks in a run; then it stops
    margin: int = Field(default=5, ge=0)  # steps before the alarm in which no checkpoint counts as healthy: alarms come late


class ControlConfig(_Section):
    """Coefficients that follow a target; ours, off by default. Each rises by at most ``rate`` a step, relative."""

    reference_kl_target: float | None = Field(
        default=None, gt=0
    )  # nats a token: KL(student || reference) above it raises beta_KL
    truncation_target: float | None = Field(default=None, gt=0, lt=1)  # a truncation rate above it raises lambda_gold
    rate: float = Field(default=0.1, gt=0, le=1)
    max_factor: float = Field(default=100.0, gt=1)  # on the configured coefficient; below it they never fall


class MonitorsConfig(_Section):
    truncation: Threshold = Threshold(warn=0.3)
    repetition: Threshold = Threshold(warn=0.05)
    length_growth: Threshold = Threshold(warn=2.0)
    collapse: Threshold = Threshold(warn=1.0)  # the early warning, see monitoring/early_warning.py; 1 is its own threshold
    repetition_tail_chars: int = Field(default=10_000, ge=1)  # the paper's L
    repetition_threshold: float = Field(default=10.0, gt=1)  # the paper's tau
    ngram: int = Field(default=4, ge=2)  # tokens; a token that ends an n-gram for the second time is repeated
    overlap_k: int = Field(default=16, ge=0)  # likeliest tokens of student and teacher that are compared; 0: none
    overlap_every: int = Field(default=16, ge=1)  # positions from one comparison to the next
    rollback: RollbackConfig = RollbackConfig()
    control: ControlConfig = ControlConfig()


class CheckpointConfig(_Section):
    every: int = Field(default=50, ge=1)
    keep: int = Field(default=3, ge=1)
    resume: Literal["auto", "never"] = "auto"
    async_save: bool = True  # processes beside the training write; false: the training waits


HELDOUT = "heldout"  # what eval.prompts is called among the tasks
TaskFormat = Literal["prompts", "gsm8k", "math500", "aime", "amc", "minerva", "olympiad"]


class EvalTaskConfig(_Section):
    """One benchmark beside ``eval.prompts``; its figures are called eval/<name>/..."""

    name: str = Field(pattern=r"^[\w.\-]+$")
    path: str
    format: TaskFormat = "prompts"  # as data.prompts; else as the benchmark's publishers have it (docs/evaluation.md)
    limit: int | None = Field(default=None, ge=1)  # the first items alone
    samples: int | None = Field(default=None, ge=1)  # null: eval.samples
    max_new_tokens: int | None = Field(default=None, ge=1)  # null: eval.max_new_tokens


class EvalConfig(_Section):
    prompts: str | None = None
    tasks: list[EvalTaskConfig] = []
    every: int = Field(default=25, ge=1)
    limit: int | None = Field(default=None, ge=1)  # of prompts: the first ones alone
    samples: int = Field(default=1, ge=1)  # responses to each prompt
    temperature: float = Field(default=0.6, gt=0)  # the paper's evaluation temperature
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int | None = Field(default=None, ge=1)  # null: as the rollouts
    # Behind each problem of a task that is no file of prompts; ours.
    instruction: str = r"Work it out step by step and put the final answer into \boxed{}."
    teacher: bool = True  # score the teacher once too, for comparison
    # What teacher, student and reference say of the responses to prompts, a forward pass of each; ours.
    score: bool = True


class Config(_Section):
    run: RunConfig
    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = {}  # several, in place of one: each prompt names its own
    reference: ReferenceConfig | None = ReferenceConfig()
    rollout: RolloutConfig = RolloutConfig()
    data: DataConfig
    mixture: MixtureConfig = MixtureConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    packing: PackingConfig = PackingConfig()
    monitors: MonitorsConfig = MonitorsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig | None = None
    metrics: list[Literal["jsonl", "tensorboard", "wandb"]] = ["jsonl", "tensorboard"]

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """By name; a single one has the name ""."""
        return {"": self.teacher} if self.teacher is not None else self.teachers

    @property
    def served_teachers(self) -> dict[str, TeacherConfig]:
        """Those that score behind SGLang servers, by name; they are on none of the ranks."""
        return {name: each for name, each in self.all_teachers.items() if each.backend == "sglang"}

    def teacher_scores_at(self, temperature: float) -> bool:
        """Whether every teacher can say what it thinks of responses sampled at another ``temperature`` than the loss's."""
        return not self.served_teachers or temperature == self.objective.temperature

    @property
    def scores_heldout(self) -> bool:
        """Whether the held-out responses are scored, and not only judged: a reference or a teacher can tell."""
        if self.eval is None or self.eval.prompts is None or not self.eval.score:
            return False
        teacher = self.objective.needs_teacher and self.teacher_scores_at(self.eval.temperature)
        return teacher or self.objective.needs_reference

    @property
    def responses_per_step(self) -> int:
        """Of all sources."""
        return self.data.prompts_per_step * (self.mixture.student + self.mixture.teacher + self.mixture.gold)

    @property
    def samples(self) -> bool:
        """Whether the student writes."""
        return self.mixture.student > 0 or self.eval is not None

    @property
    def uses_teachers(self) -> bool:
        return self.objective.needs_teacher or self.mixture.teacher > 0

    @property
    def teacher_writes(self) -> bool:
        evaluated = self.eval is not None and self.eval.teacher
        return self.uses_teachers and (self.mixture.teacher > 0 or evaluated)

    @property
    def sglang_teachers(self) -> dict[str, TeacherConfig]:
        """Those behind SGLang servers that the run uses, to write, to score, or both; by name."""
        if self.rollout.backend == "sglang" and self.teacher_writes:
            return self.all_teachers
        return self.served_teachers if self.uses_teachers else {}

    @property
    def starts_servers(self) -> bool:
        """Of SGLang."""
        own = self.rollout.backend == "sglang" and self.samples and not self.rollout.urls
        return own or bool(self.teachers_to_start)

    @property
    def teachers_to_start(self) -> list[str]:
        """Sections of the teachers whose SGLang servers the run starts."""
        return [teacher_key(name) for name, each in self.sglang_teachers.items() if not each.urls]

    @property
    def megatron_checkpoints(self) -> dict[str, str]:
        """Where Megatron-LM's own weights are taken from, by section."""
        own = {"student": self.student.load, **{teacher_key(name): each.load for name, each in self.all_teachers.items()}}
        if self.reference is not None:
            own["reference"] = self.reference.load or (None if self.reference.model else self.student.load)
        return {section: path for section, path in own.items() if path is not None}

    @property
    def layouts(self) -> dict[str, ParallelConfig]:
        """Of the models on the ranks, by section; the frozen ones' are the student's, without virtual stages, unless set."""
        student = self.student.parallel
        here = {name: each for name, each in self.all_teachers.items() if each.backend == "megatron"}
        own = {teacher_key(name): teacher.parallel for name, teacher in here.items()}
        if self.reference is not None:
            own["reference"] = self.reference.parallel
        shared = student.model_copy(update={"vpp": 1})
        return {"student": student, **{section: parallel or shared for section, parallel in own.items()}}

    @property
    def fp8(self) -> dict[str, Fp8Recipe]:
        """Of the models on the ranks that compute in FP8, by section."""
        asked: dict[str, Fp8Recipe | None] = {"student": self.student.fp8}
        asked |= {teacher_key(name): teacher.fp8 for name, teacher in self.all_teachers.items()}
        asked["reference"] = None if self.reference is None else self.reference.fp8
        return {section: recipe for section in self.layouts if (recipe := asked[section]) is not None}

    @property
    def row_multiple(self) -> int:
        """Of the tokens that each rank holds of a micro-batch, which all models see."""
        return math.lcm(*(fp8_multiple(recipe) for recipe in self.fp8.values()))

    def quantizes(self, section: str) -> bool:
        """Whether the frozen model in ``section`` is held in FP8."""
        if section == "reference":
            return self.reference is not None and self.reference.quantize is not None
        return any(teacher_key(name) == section and each.quantize is not None for name, each in self.all_teachers.items())

    @property
    def objective(self) -> Objective:
        """The loss's coefficients; a source without responses has weight 0."""
        mixture, loss = self.mixture, self.loss
        rollouts = mixture.student > 0
        return Objective(
            opd=loss.opd,
            clip=loss.clip,
            beta=loss.beta,
            temperature=self.rollout.sampling.temperature,
            student_weight=mixture.student_weight if rollouts else 0.0,
            teacher_weight=mixture.teacher_weight if mixture.teacher else 0.0,
            gold_weight=mixture.gold_weight if mixture.gold else 0.0,
            reference_kl=loss.reference_kl if rollouts and self.reference is not None else 0.0,
            alpha=loss.alpha,
            k=loss.k,
            merge_stop_class=loss.stop_class == "auto",
            extrapolation=loss.extrapolation,
            teacher_mix=loss.teacher_mix,
            ratio_bounds=None if loss.ratio_bounds is None else (loss.ratio_bounds[0], loss.ratio_bounds[1]),
            position_weight=loss.position_weight,
            gated_forward_kl=loss.gated_forward_kl,
            entropy_gate=loss.entropy_gate,
            off_policy=loss.off_policy,
        )

    def sampling(self, stop_ids: tuple[int, ...], vocab_size: int) -> SamplingParams:
        s = self.rollout.sampling
        return SamplingParams(s.temperature, s.top_p, s.max_new_tokens, stop_ids, vocab_size)


def teacher_key(name: str) -> str:
    """The section that a teacher is configured in; a single one has the name ""."""
    return f"teachers.{name}" if name else "teacher"
