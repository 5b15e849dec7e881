"""Typed configuration: one YAML file plus dotted overrides; an unknown key is an error.

``load_config("run.yaml", ["loss.opd=reverse_kl"])`` returns a :class:`Config` or raises :class:`~megatron_opd.types.OpdError`
with one line that names the key, the value and the remedy. Defaults that StableOPD's paper (arXiv 2604.08527) does not give
are ours and say so.
"""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_opd.types import SCORED_KINDS, Aggregation, Objective, OffPolicyTerm, OpdError, OpdKind, SamplingParams

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


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

    @property
    def batch_multiple(self) -> int:
        """The tokens of a micro-batch are a multiple of it; so is :attr:`sequence_multiple` of what they are."""
        return math.lcm(self.sequence_multiple, self.cp * (self.tp if self.sequence_parallel else 1))

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
    fp8: None = None  # FP8 recipes are not there yet
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


class ReferenceConfig(_Section):
    model: str | None = None  # null: the initial student
    load: str | None = None  # a checkpoint of Megatron-LM; its weights in place of those in `model`
    parallel: ParallelConfig | None = None  # on the same ranks; null: the student's
    offload: bool = False  # the weights wait in host memory while the model does not score


class SamplingConfig(_Section):
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=4096, ge=1)


class RolloutConfig(_Section):
    backend: Literal["embedded", "sglang"] = "embedded"  # sglang: servers in processes and an environment of their own
    sampling: SamplingConfig = SamplingConfig()
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
    engines: int = Field(default=1, ge=1)  # SGLang servers that the run starts; where the only one is lost in use, the run ends
    urls: list[str] = []  # of running servers instead; `megatron-opd check` prints how to start them
    api_key_file: str | None = None  # of the servers at urls: a text file
    tp: int = Field(default=1, ge=1)  # tensor-parallel ranks of each
    python: str | None = None  # the interpreter of SGLang's environment; null: this one
    host: str = "127.0.0.1"  # the interface that trainer and servers use; the cluster's for servers on other machines
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
    warn: float | None = None
    stop: float | None = None


class MonitorsConfig(_Section):
    truncation: Threshold = Threshold(warn=0.3)
    repetition: Threshold = Threshold(warn=0.05)
    length_growth: Threshold = Threshold(warn=2.0)
    repetition_tail_chars: int = Field(default=10_000, ge=1)  # the paper's L
    repetition_threshold: float = Field(default=10.0, gt=1)  # the paper's tau


class CheckpointConfig(_Section):
    every: int = Field(default=50, ge=1)
    keep: int = Field(default=3, ge=1)
    resume: Literal["auto", "never"] = "auto"
    async_save: bool = True  # processes beside the training write; false: the training waits


class EvalConfig(_Section):
    prompts: str
    every: int = Field(default=25, ge=1)
    limit: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.6, gt=0)  # the paper's evaluation temperature
    max_new_tokens: int | None = Field(default=None, ge=1)  # null: as the rollouts
    teacher: bool = True  # score the teacher once too, for comparison


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
        own = any(not teacher.urls for teacher in self.sglang_teachers.values())
        return own or (self.rollout.backend == "sglang" and self.samples and not self.rollout.urls)

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


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML reads 1e-6 as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read ``path``, apply ``key.path=value`` overrides (values are YAML), resolve ``${a.b}`` and validate.

    Relative paths inside the file stay relative to the working directory. Raises OpdError.
    """
    file = Path(path)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise OpdError(f"config {file}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OpdError(f"config {file}: not valid YAML ({_one_line(error)})") from error
    if not isinstance(tree, dict):
        raise OpdError(f"config {file}: must be a mapping of sections such as run, student, data")
    for override in overrides or []:
        _apply_override(tree, override)
    return validate_config(tree)


def validate_config(tree: dict[str, Any]) -> Config:
    """A plain tree → Config, with the checks that need no file and no model. Raises OpdError."""
    if isinstance(tree.get("run"), dict):
        tree = {**tree, "run": {"dir": "runs/${run.name}", **tree["run"]}}
    tree = _interpolate(tree, tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise OpdError(_explain(error)) from error
    _check_combinations(config)
    return config


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise OpdError(f"override {override!r}: must have the form key.path=value")
    node: Any = tree
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise OpdError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    try:
        node[leaf] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise OpdError(f"override {override!r}: the value is not valid YAML ({_one_line(error)})") from error


def _interpolate(node: Any, root: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        return {key: _interpolate(value, root) for key, value in node.items()}
    if isinstance(node, list):
        return [_interpolate(value, root) for value in node]
    if isinstance(node, str):
        return re.sub(r"\$\{([^}]+)\}", lambda match: str(_lookup(match.group(1), root)), node)
    return node


def _lookup(key: str, root: dict[str, Any]) -> Any:
    node: Any = root
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if node is None or isinstance(node, dict | list):
        raise OpdError(f"${{{key}}}: no such value in the config; name a key that is set")
    return node


def _explain(error: ValidationError) -> str:
    """The first finding as one line: key, value, remedy."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {remedy}"
    if first["type"] == "missing":
        return f"{key}: required, but not set; add it to the config or give {key}=VALUE"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {message}, got {first['input']!r}"


def _known_keys(path: list[str]) -> list[str]:
    section: Any = Config
    for part in path:
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(section.model_fields)


def _check_combinations(config: Config) -> None:
    mixture, loss, parallel = config.mixture, config.loss, config.student.parallel
    if mixture.student + mixture.teacher + mixture.gold == 0:
        raise OpdError("mixture: student, teacher and gold are all 0; ask for at least one response for each prompt")
    for name, count, weight in (
        ("student", mixture.student, mixture.student_weight),
        ("teacher", mixture.teacher, mixture.teacher_weight),
        ("gold", mixture.gold, mixture.gold_weight),
    ):
        if count and weight == 0:
            raise OpdError(f"mixture.{name}_weight: 0, but mixture.{name} is {count}; set mixture.{name}=0 or a weight above 0")
    if config.teacher is not None and config.teachers:
        raise OpdError(f"teachers: {', '.join(config.teachers)}, but teacher is set as well; remove one of the two sections")
    if not config.all_teachers and mixture.student:
        raise OpdError("teacher: not set, but mixture.student > 0 needs its scores; set teacher.model or mixture.student=0")
    if not config.all_teachers and mixture.teacher:
        raise OpdError("teacher: not set, but mixture.teacher > 0 needs it to write; set teacher.model or mixture.teacher=0")
    if not config.all_teachers and config.objective.needs_teacher:
        raise OpdError("teacher: not set, but loss.off_policy=divergence needs its scores; set teacher.model")
    for name, teacher in config.all_teachers.items():
        key = teacher_key(name)
        if teacher.backend == "sglang":
            _check_served_teacher(config, key, teacher)
        elif teacher.urls:
            raise OpdError(f"{key}.urls: {', '.join(teacher.urls)}, but {key}.backend is megatron; set {key}.backend=sglang")
        if teacher.api_key_file and not teacher.urls:
            raise OpdError(f"{key}.api_key_file: {teacher.api_key_file}, but {key}.urls is empty; remove one or add the other")
    if config.reference is None and loss.reference_kl > 0 and mixture.student:
        raise OpdError(f"loss.reference_kl: {loss.reference_kl}, but reference is null; set loss.reference_kl=0 or a reference")
    _check_loss(config)
    _check_attached(config)
    if config.rollout.sglang and config.rollout.backend != "sglang" and not config.served_teachers:
        raise OpdError("rollout.sglang: set, but rollout.backend is embedded; set rollout.backend=sglang or remove it")
    _check_placement(config.rollout)
    _check_lag(config)
    if config.optimizer.warmup_steps >= config.run.steps:
        raise OpdError(
            f"optimizer.warmup_steps: {config.optimizer.warmup_steps} must be below run.steps={config.run.steps}; lower it"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        raise OpdError(f"optimizer.min_lr: {config.optimizer.min_lr} is above optimizer.lr {config.optimizer.lr}; lower it")
    if any(not 0 <= beta < 1 for beta in config.optimizer.betas):
        raise OpdError(f"optimizer.betas: {config.optimizer.betas}, but each must be at least 0 and below 1")
    for section, each in config.layouts.items():
        _check_layout(section, each)
    if config.optimizer.overlap_param_gather and not (config.optimizer.distributed and config.optimizer.overlap_grad_reduce):
        raise OpdError(
            "optimizer.overlap_param_gather: needs the distributed optimizer and overlapped gradients; "
            "set distributed=true and overlap_grad_reduce=true"
        )
    if parallel.cp > 1 and loss.position_weight > 0:
        raise OpdError(
            f"loss.position_weight: {loss.position_weight} needs whole responses, but student.parallel.cp={parallel.cp} slices "
            "them; set cp=1 or position_weight=0"
        )
    if config.student.init == "random" and config.student.load:
        raise OpdError(f"student.load: {config.student.load}, but student.init=random; remove one of the two")
    for name, teacher in config.all_teachers.items():
        if teacher.load and (mixture.teacher or (config.eval is not None and config.eval.teacher)):
            raise OpdError(
                f"{teacher_key(name)}.load: {teacher.load} only gives scores, but the teacher shall write too; "
                "set mixture.teacher=0 and eval.teacher=false, or convert it to a Hugging Face folder"
            )
    if config.student.init == "random" and (mixture.student or mixture.teacher):
        raise OpdError(
            "student.init: random weights cannot write useful rollouts; warm-start with mixture.student=0, teacher=0"
        )


def _check_attached(config: Config) -> None:
    """Servers that somebody else started leave some keys without a meaning."""
    rollout = config.rollout
    if not rollout.urls:
        if rollout.api_key_file is not None:
            raise OpdError(
                f"rollout.api_key_file: {rollout.api_key_file}, but rollout.urls is empty; remove one or add the other"
            )
        return
    listed = ", ".join(rollout.urls)
    if rollout.backend != "sglang":
        raise OpdError(f"rollout.urls: {listed}, but rollout.backend is embedded; set rollout.backend=sglang or remove them")
    if rollout.placement == "colocated":
        raise OpdError(
            f"rollout.placement: colocated, but the servers at {listed} were started elsewhere; set placement=disaggregated"
        )
    for url in rollout.urls:
        if not re.fullmatch(r"https?://[^/\s]+/?", url):
            raise OpdError(f"rollout.urls: {url!r} is no URL of a server; give one such as http://10.0.0.7:30000")
    if len({url.rstrip("/") for url in rollout.urls}) < len(rollout.urls):
        raise OpdError(f"rollout.urls: {listed} names a server twice; name each once")
    for key in ("engines",) if config.teacher_writes else ("engines", "python", "sglang"):
        if key in rollout.model_fields_set:
            raise OpdError(
                f"rollout.{key}: set, but the servers at rollout.urls run already; remove rollout.{key}, or rollout.urls for "
                "servers that the run starts"
            )
    if rollout.host in _LOOPBACK:
        for url in rollout.urls:
            if url.rpartition("://")[2].rpartition(":")[0] not in _LOOPBACK:
                raise OpdError(
                    f"rollout.host: {rollout.host}, but the server {url} on another machine receives its weights from there; "
                    "set rollout.host to this machine's address in the cluster"
                )


def _check_served_teacher(config: Config, key: str, teacher: TeacherConfig) -> None:
    """What SGLang cannot give of a teacher, or would ignore."""
    loss, remedy = config.loss, f"set {key}.backend=megatron"
    if config.rollout.placement == "colocated" and not teacher.urls:
        raise OpdError(
            f"{key}.backend: sglang, but rollout.placement is colocated, and the servers sleep while the teacher scores; "
            f"{remedy}, or start the servers elsewhere and set {key}.urls"
        )
    ignored = {"load": teacher.load is not None, "offload": teacher.offload}
    for name, used in ignored.items():
        if used:
            raise OpdError(f"{key}.{name}: set, but {key}.backend=sglang serves {key}.model as it is; remove it")
    for url in teacher.urls:
        if not url.startswith(("http://", "https://")):
            raise OpdError(f"{key}.urls: {url!r} is no URL; give such as http://10.0.0.7:30000")
    own = teacher.parallel
    if own is not None and own != ParallelConfig(tp=own.tp):
        raise OpdError(f"{key}.parallel: only tp says something about a server of {key}.backend=sglang; remove the rest")
    if not config.objective.needs_teacher:
        return
    if loss.opd == "topk_reverse_kl":
        raise OpdError(
            "loss.opd: topk_reverse_kl takes the student's likeliest tokens, other ones at each position, but "
            f"{key}.backend=sglang scores one list of ids for a whole response; {remedy} or loss.opd=topk_forward_kl"
        )
    if loss.opd not in SCORED_KINDS:
        raise OpdError(
            f"loss.opd: {loss.opd} needs the teacher's full vocabulary, but {key}.backend=sglang gives scores only; "
            f"{remedy} or loss.opd=sampled"
        )
    if loss.gated_forward_kl:
        raise OpdError(
            f"loss.gated_forward_kl: {loss.gated_forward_kl} needs the teacher's full vocabulary, but {key}.backend=sglang "
            f"gives scores only; {remedy} or loss.gated_forward_kl=0"
        )
    temperature = config.rollout.sampling.temperature
    if temperature != 1.0:
        raise OpdError(
            f"rollout.sampling.temperature: {temperature}, but {key}.backend=sglang scores at temperature 1 alone; "
            f"{remedy} or rollout.sampling.temperature=1"
        )


def _check_layout(section: str, parallel: ParallelConfig) -> None:
    key = f"{section}.parallel"
    if parallel.sequence_parallel and parallel.tp == 1:
        raise OpdError(f"{key}.sequence_parallel: true needs tp > 1; set tp=2 or more, or sequence_parallel=false")
    if parallel.vpp > 1 and section != "student":
        raise OpdError(f"{key}.vpp: {parallel.vpp}, but a frozen model has no backward to interleave with; set vpp=1")
    if parallel.vpp > 1 and parallel.pp == 1:
        raise OpdError(f"{key}.vpp: {parallel.vpp} virtual stages need pp > 1; set pp=2 or more, or vpp=1")


def _check_lag(config: Config) -> None:
    rollout, mixture = config.rollout, config.mixture
    if not rollout.lag:
        return
    if rollout.backend != "sglang":
        raise OpdError(
            "rollout.lag: 1, but the embedded engine has the training's own processors, so nothing would overlap; set "
            "rollout.lag=0 or rollout.backend=sglang"
        )
    if rollout.placement == "colocated":
        raise OpdError(
            "rollout.lag: 1, but rollout.placement=colocated gives the devices to rollouts and training by turns; set "
            "rollout.lag=0 or placement=disaggregated"
        )
    if not mixture.student and not mixture.teacher:
        raise OpdError(
            "rollout.lag: 1, but mixture.student and mixture.teacher are 0, so nothing is written; set rollout.lag=0"
        )


def _check_placement(rollout: RolloutConfig) -> None:
    if rollout.backend != "sglang" and (rollout.placement == "colocated" or rollout.weight_sync != "auto"):
        key = "placement" if rollout.placement == "colocated" else "weight_sync"
        raise OpdError(f"rollout.{key}: of SGLang's servers, but rollout.backend is embedded; set backend=sglang or remove it")
    if rollout.placement == "colocated" and rollout.transport in ("collective", "native"):
        raise OpdError(
            f"rollout.weight_sync: {rollout.transport}, but rollout.placement is colocated, and NCCL refuses two ranks on one "
            "GPU; set weight_sync=auto"
        )
    if rollout.placement == "disaggregated" and rollout.transport == "ipc":
        raise OpdError(
            "rollout.weight_sync: ipc, but rollout.placement is disaggregated: the servers share no device with the training; "
            "set placement=colocated or weight_sync=auto"
        )


def _check_loss(config: Config) -> None:
    """Options that the chosen OPD term would silently ignore."""
    loss = config.loss
    of_sampled = {
        "extrapolation": loss.extrapolation != 1.0,
        "teacher_mix": loss.teacher_mix != 1.0,
        "ratio_bounds": loss.ratio_bounds is not None,
        "position_weight": loss.position_weight > 0,
        "gated_forward_kl": loss.gated_forward_kl > 0,
    }
    for name, used in of_sampled.items():
        if used and loss.opd != "sampled":
            raise OpdError(f"loss.{name}: changes the sampled-token term, but loss.opd is {loss.opd}; set loss.opd=sampled")
    if loss.off_policy == "divergence" and loss.opd == "sampled":
        raise OpdError(
            "loss.off_policy: divergence needs one over the vocabulary, but loss.opd is sampled; set loss.opd=jsd, or "
            "loss.off_policy=cross_entropy"
        )
    if loss.extrapolation != 1.0 and config.reference is None:
        raise OpdError(f"loss.extrapolation: {loss.extrapolation}, but reference is null; set extrapolation=1 or a reference")
    if loss.ratio_bounds is not None and not 0 <= loss.ratio_bounds[0] < 1 < loss.ratio_bounds[1]:
        raise OpdError(f"loss.ratio_bounds: {loss.ratio_bounds}, but on-policy tokens have ratio 1; give low < 1 < high")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
