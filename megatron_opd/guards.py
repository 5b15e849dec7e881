"""What would spoil a run without an error, found from files alone: refused, or a line for the user to judge.

What only the models themselves can show is in ``scoring/informed.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_opd.config import Config, teacher_key
from megatron_opd.data.compare_tokenizers import disagreements
from megatron_opd.data.prompts import count_faults
from megatron_opd.evaluation.tasks import Task
from megatron_opd.hf_folder import HFFolder
from megatron_opd.types import OpdError, Prompt, Tokenizer


def check_not_student(
    config: Config, student: HFFolder, teachers: Mapping[str, HFFolder], checkpoints: Mapping[str, Path]
) -> None:
    """Raises OpdError where a teacher has the weights that the student starts from, and the config does not ask for it.

    ``checkpoints``: of Megatron-LM, by section, whose weights are taken in place of a folder's.
    """
    for name, folder in teachers.items():
        key = teacher_key(name)
        if config.student.init == "random" or config.all_teachers[name].self_distillation:
            continue
        own, other = checkpoints.get("student"), checkpoints.get(key)
        if own is None and other is None:
            same, where = student.same_weights(folder), f"{key}.model: {folder.path}"
        else:  # a checkpoint is not compared with a folder
            same, where = own is not None and other is not None and own.resolve() == other.resolve(), f"{key}.load: {other}"
        if same:
            raise OpdError(
                f"{where} has the student's own weights, so it has nothing to teach; name another model, or set "
                f"{key}.self_distillation=true"
            )


def check_heldout(prompts: Sequence[Prompt], tasks: Sequence[Task]) -> None:
    """Raises OpdError where prompts that are evaluated are trained on."""
    seen = {prompt.token_ids for prompt in prompts}
    for task in tasks:
        if trained_on := sum(prompt.token_ids in seen for prompt in task.prompts):
            raise OpdError(f"{task.key}: {trained_on} prompts of {task.path} are trained on as well; remove them from one file")


def end_tokens(tokenizer: Tokenizer, own: tuple[int, ...], teachers: Mapping[str, tuple[int, ...]]) -> str:
    """``student 1 '<eos>'; teacher 1 '<eos>', 2 '<end>'``"""
    of = {"student": own, **{f"teacher {name}".strip(): ids for name, ids in teachers.items()}}
    return "; ".join(f"{who} {', '.join(f'{each} {tokenizer.decode([each])!r}' for each in ids)}" for who, ids in of.items())


def findings(
    config: Config,
    tokenizer: Tokenizer,
    teacher_tokenizers: Mapping[str, Tokenizer],
    own_ends: tuple[int, ...],
    teacher_ends: Mapping[str, tuple[int, ...]],
) -> tuple[str, ...]:
    """Of tokenizers and FP8, a line each. ``note``: taken care of; ``warning``: it goes on, maybe not where the user wants."""
    lines = []
    if any(ends != own_ends for ends in teacher_ends.values()):
        shown = end_tokens(tokenizer, own_ends, teacher_ends)
        if config.objective.merge_stop_class:
            lines.append(f"note: end tokens differ ({shown}); loss.stop_class=auto counts them as one in the OPD term")
        else:
            lines.append(
                f"warning: loss.stop_class: none, but end tokens differ ({shown}): OPD then pushes the student's own one down "
                "until responses no longer end, whatever else is wrong or right (arXiv 2609.20511); set loss.stop_class=auto"
            )
    for name, other in teacher_tokenizers.items():
        if differing := disagreements(tokenizer, other):
            lines.append(f"note: {teacher_key(name)}.model: tokenizer (student / teacher): {'; '.join(differing)}")
    if config.student.fp8 == "delayed":
        lines.append(
            "warning: student.fp8: delayed has no scales before the first training pass: the first step, and the probe of the "
            "first weights that engines get, are computed with scales of 1; set student.fp8=current"
        )
    return tuple(lines)


def prompt_findings(config: Config, prompts: Sequence[Prompt]) -> Iterator[str]:
    """Of the prompts to train on, likewise."""
    mixture, budget, file = config.mixture, config.rollout.sampling.max_new_tokens, config.data.prompts
    if not mixture.student:
        return
    longer = count_faults(prompts, lambda prompt: len(prompt.solution_ids or ()) > budget) if mixture.gold else ""
    if longer:
        yield (
            f"warning: data.prompts: {longer} of {file} have a solution longer than rollout.sampling.max_new_tokens={budget}, "
            "which a rollout could not end; raise it, or drop them"
        )
    if unanswered := count_faults(prompts, lambda prompt: prompt.answer is None):
        yield f"warning: data.prompts: {unanswered} of {file} have no 'answer', so rollout/accuracy is without them"
