"""Keys that contradict each other, or that a run would silently ignore: all that needs no file and no model."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from megatron_opd.config import HELDOUT, Config, ParallelConfig, RolloutConfig, TeacherConfig, teacher_key
from megatron_opd.types import SCORED_KINDS, OpdError

_LOOPBACK = ("127.0.0.1", "localhost", "lo", "[::1]", "::1")


def check_combinations(config: Config) -> None:
    """Raises OpdError."""
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
    frozen = {teacher_key(name): teacher for name, teacher in config.all_teachers.items()}
    for key, model in {**frozen, "reference": config.reference}.items():
        if model is not None and model.fp8 is not None and model.quantize is not None:
            raise OpdError(
                f"{key}.fp8: {model.fp8}, but {key}.quantize holds the weights for products in bf16; set one to null"
            )
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
    _check_fp8_param(config)
    _check_loss(config)
    _check_actions(config)
    _check_evaluation(config)
    _check_attached(config)
    _check_router(config.rollout)
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


def _check_fp8_param(config: Config) -> None:
    """What Megatron's distributed optimizer can keep in FP8, and what of it leaves the weights right at every moment."""
    student, optimizer = config.student, config.optimizer
    if not student.fp8_param:
        return
    key = "student.fp8_param: true"
    if student.fp8 is None:
        raise OpdError(f"{key}, but student.fp8 is null; set student.fp8=current or student.fp8_param=false")
    if student.fp8 == "delayed":
        raise OpdError(
            f"{key}, but with student.fp8=delayed weights are first held at a scale of 1, at which most of their digits are "
            "lost; set student.fp8=current or student.fp8_param=false"
        )
    if student.fp8 == "mxfp8":
        raise OpdError(
            f"{key}, but with student.fp8=mxfp8 Megatron gathers weights through its gradient buffers, which is not supported; "
            "set student.fp8=current or student.fp8_param=false"
        )
    if not optimizer.distributed:
        raise OpdError(f"{key} needs the distributed optimizer; set optimizer.distributed=true or student.fp8_param=false")
    if optimizer.overlap_param_gather:
        raise OpdError(
            f"{key}, but optimizer.overlap_param_gather leaves the transposed copies of FP8 weights as they were where weights "
            "are exported or saved; set one of the two to false"
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


def _check_actions(config: Config) -> None:
    """Alarms and controllers that could change nothing."""
    monitors, objective = config.monitors, config.objective
    thresholds = {
        "truncation": monitors.truncation,
        "repetition": monitors.repetition,
        "length_growth": monitors.length_growth,
        "collapse": monitors.collapse,
    }
    for name, threshold in thresholds.items():
        if threshold.rollback is not None and not (objective.reference_kl or objective.gold_weight):
            raise OpdError(
                f"monitors.{name}.rollback: {threshold.rollback}, but there is no coefficient to raise: loss.reference_kl and "
                "the gold weight are 0; set one above 0, or use stop"
            )
    control = monitors.control
    if control.reference_kl_target is not None and not objective.reference_kl:
        raise OpdError(
            f"monitors.control.reference_kl_target: {control.reference_kl_target}, but loss.reference_kl is 0, and a factor on "
            "it changes nothing; set loss.reference_kl above 0"
        )
    if control.truncation_target is not None and not objective.gold_weight:
        raise OpdError(
            f"monitors.control.truncation_target: {control.truncation_target}, but there is no gold term to raise; set "
            "mixture.gold=1 and mixture.gold_weight above 0"
        )
    budget, sampling = config.rollout.length_budget, config.rollout.sampling
    if budget is not None and budget.start > sampling.max_new_tokens:
        raise OpdError(
            f"rollout.length_budget.start: {budget.start} is above rollout.sampling.max_new_tokens="
            f"{sampling.max_new_tokens}, where it is to grow to; lower it"
        )


def _check_evaluation(config: Config) -> None:
    if config.eval is None:
        return
    if config.eval.prompts is None and not config.eval.tasks:
        raise OpdError("eval: neither prompts nor tasks; name a file of held-out prompts, or remove the section")
    names = [task.name for task in config.eval.tasks]
    for name in names:
        if names.count(name) > 1 or name == HELDOUT:
            raise OpdError(f"eval.tasks: the name {name!r} is taken{' by eval.prompts' * (name == HELDOUT)}; give each its own")


def _check_layout(section: str, parallel: ParallelConfig) -> None:
    key = f"{section}.parallel"
    if parallel.sequence_parallel and parallel.tp == 1:
        raise OpdError(f"{key}.sequence_parallel: true needs tp > 1; set tp=2 or more, or sequence_parallel=false")
    if parallel.vpp > 1 and section != "student":
        raise OpdError(f"{key}.vpp: {parallel.vpp}, but a frozen model has no backward to interleave with; set vpp=1")
    if parallel.vpp > 1 and parallel.pp == 1:
        raise OpdError(f"{key}.vpp: {parallel.vpp} virtual stages need pp > 1; set pp=2 or more, or vpp=1")


def _check_attached(config: Config) -> None:
    """Servers that somebody else started leave some keys without a meaning."""
    rollout = config.rollout
    if not rollout.urls:
        if rollout.api_key_file is not None and rollout.router is None:
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
    _check_urls("rollout.urls", rollout.urls)
    if "engines" in rollout.model_fields_set:
        raise OpdError(
            "rollout.engines: set, but the servers at rollout.urls run already; remove rollout.engines, or rollout.urls for "
            "servers that the run starts"
        )
    if rollout.host in _LOOPBACK:
        for url in rollout.urls:
            if url.rpartition("://")[2].rpartition(":")[0] not in _LOOPBACK:
                raise OpdError(
                    f"rollout.host: {rollout.host}, but the server {url} on another machine receives its weights from there; "
                    "set rollout.host to this machine's address in the cluster, or its interface's name"
                )


def _check_router(rollout: RolloutConfig) -> None:
    if rollout.router is None:
        return
    if rollout.backend != "sglang":
        raise OpdError(
            f"rollout.router: {rollout.router}, but rollout.backend is embedded; set rollout.backend=sglang or remove it"
        )
    _check_urls("rollout.router", [rollout.router])
    if rollout.router.rstrip("/") in {url.rstrip("/") for url in rollout.urls}:
        raise OpdError(f"rollout.router: {rollout.router} is one of rollout.urls; give the router's own URL, or remove it")
    if not rollout.urls and rollout.host in _LOOPBACK and urlsplit(rollout.router).hostname not in _LOOPBACK:
        raise OpdError(
            f"rollout.host: {rollout.host}, where the router {rollout.router} on another machine reaches none of the servers; "
            "set rollout.host to this machine's address in the cluster, or its interface's name"
        )


def _check_served_teacher(config: Config, key: str, teacher: TeacherConfig) -> None:
    """What SGLang cannot give of a teacher, or would ignore."""
    loss, remedy = config.loss, f"set {key}.backend=megatron"
    if config.rollout.placement == "colocated" and not teacher.urls:
        raise OpdError(
            f"{key}.backend: sglang, but rollout.placement is colocated, and the servers sleep while the teacher scores; "
            f"{remedy}, or start the servers elsewhere and set {key}.urls"
        )
    ignored = {"load": teacher.load is not None, "offload": teacher.offload, "quantize": teacher.quantize is not None}
    ignored["fp8"] = teacher.fp8 is not None
    for name, used in ignored.items():
        if used:
            raise OpdError(f"{key}.{name}: set, but {key}.backend=sglang serves {key}.model as it is; remove it")
    _check_urls(f"{key}.urls", teacher.urls)
    own = teacher.parallel
    if own is not None and own != ParallelConfig(tp=own.tp):
        raise OpdError(f"{key}.parallel: only tp says something about a server of {key}.backend=sglang; remove the rest")
    if not config.objective.needs_teacher:
        return
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


def _check_urls(key: str, urls: list[str]) -> None:
    for url in urls:
        if not re.fullmatch(r"https?://[^/\s]+/?", url):
            raise OpdError(f"{key}: {url!r} is no URL of a server; give one such as http://10.0.0.7:30000")
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise OpdError(f"{key}: {', '.join(urls)} names a server twice; name each once")


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


def _check_lag(config: Config) -> None:
    rollout = config.rollout
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
    if not config.mixture.student:
        raise OpdError("rollout.lag: 1, but mixture.student is 0, so the student writes nothing ahead; set rollout.lag=0")
