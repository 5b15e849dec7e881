"""What ``megatron-opd check`` says of a run: its inputs as they were resolved, one fact a line."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_opd.config import Config, ParallelConfig, teacher_key
from megatron_opd.guards import end_tokens
from megatron_opd.mcore.fast_paths import fast_paths, installed
from megatron_opd.mcore.platform import Platform
from megatron_opd.preflight import Inputs


def describe(config: Config, inputs: Inputs, platform: Platform, world_size: int) -> str:
    """All of it, with the fast paths that are on and off."""
    parallel, mixture, objective = config.student.parallel, config.mixture, config.objective

    def own_layout(section: str) -> str:
        if section not in config.layouts:
            return " (SGLang)"
        own = axes(config.layouts[section], world_size)
        return "" if own == axes(parallel.model_copy(update={"vpp": 1}), world_size) else f" ({own})"

    facts = {
        "run": f"{config.run.name}: {config.run.steps} steps into {config.run.dir}",
        "platform": f"{platform.device.type}, {platform.backend}, "
        + ("Transformer Engine spec" if platform.transformer_engine else "local layer spec"),
        "layout": f"{axes(parallel, world_size)} on {world_size} ranks",
        "student": f"{inputs.student.path} ({inputs.student_spec.architecture}, {config.student.init}, {config.student.dtype})",
        "teacher": ", ".join(
            f"{name} {folder.path}{own_layout(teacher_key(name))}".strip() for name, folder in inputs.teachers.items()
        )
        or "none",
        "reference": f"{inputs.reference.path}{own_layout('reference')}" if inputs.reference else "none",
        "vocabulary": f"{inputs.loss_vocab_size} shared ids, {inputs.student_spec.dims.padded_vocab_size} rows in the student",
        "engine": _engine(config),
        "end tokens": f"{end_tokens(inputs.tokenizer, inputs.own_stop_ids, inputs.teacher_stop_ids)}; "
        + ("one class" if objective.merge_stop_class and len(inputs.stop_class) > 1 else "each by itself"),
        "data": f"{len(inputs.prompts)} prompts" + "".join(f", {len(task.prompts)} of {task.name}" for task in inputs.tasks),
        "mixture": f"for each prompt {mixture.student} student, {mixture.teacher} teacher, {mixture.gold} gold",
        "objective": f"{objective.opd} x {objective.student_weight}, reference KL x {objective.reference_kl}, "
        f"gold x {objective.gold_weight}, aggregation {config.loss.aggregation}",
        "resume": f"{inputs.resume} (step {inputs.resume_step})" if inputs.resume else "from the start",
    }
    return "\n".join([*_columns(facts), "fast paths", *(f"  {line}" for line in _fast_paths(config, inputs, platform))])


def axes(parallel: ParallelConfig, world_size: int) -> str:
    """A layout as people read it."""
    sizes = {"tp": parallel.tp, "cp": parallel.cp, "pp": parallel.pp, "vpp": parallel.vpp, "ep": parallel.ep}
    sizes["dp"] = world_size // parallel.model_parallel_size
    shown = " ".join(f"{axis}={size}" for axis, size in sizes.items() if axis != "vpp" or size > 1)
    return shown + (" with sequence parallelism" if parallel.sequence_parallel else "")


def _fast_paths(config: Config, inputs: Inputs, platform: Platform) -> list[str]:
    found = fast_paths(config, inputs.student_config, platform, installed())
    return _columns({each.name: f"{'on' if each.on else 'off':<3}  {each.why}" for each in found})


def _columns(facts: Mapping[str, str]) -> list[str]:
    width = max(map(len, facts))
    return [f"{name:<{width}}  {fact}" for name, fact in facts.items()]


def _engine(config: Config) -> str:
    rollout = config.rollout
    if not config.samples:
        return "none"
    if rollout.backend == "embedded":
        return "embedded, one on each rank"
    servers = f"those at {', '.join(rollout.urls)}" if rollout.urls else f"{rollout.engines}, started by the run"
    return f"SGLang servers: {servers}; tp={rollout.tp}"
