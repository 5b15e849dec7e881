"""What is evaluated: held-out prompts and benchmarks, as prompts of the student's tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_opd.config import HELDOUT, EvalConfig, EvalTaskConfig
from megatron_opd.data.prompts import count_faults, load_prompts, render
from megatron_opd.evaluation.readers import Question, read_questions
from megatron_opd.types import OpdError, Prompt, Tokenizer


@dataclass(frozen=True)
class Task:
    """Prompts with answers, and how many responses of which length each gets."""

    name: str  # HELDOUT: those of eval.prompts
    path: str
    prompts: list[Prompt]
    samples: int
    max_new_tokens: int

    @property
    def key(self) -> str:
        """Where the config names it."""
        return _key(self.name)

    @property
    def prefix(self) -> str:
        """Of its metrics."""
        return "eval" if self.name == HELDOUT else f"eval/{self.name}"


def load_tasks(
    config: EvalConfig,
    tokenizer: Tokenizer,
    *,
    stop_id: int,
    positions: int,
    max_new_tokens: int,
    teachers: Collection[str] = ("",),
) -> list[Task]:
    """``eval.prompts``, if there are any, then ``eval.tasks``.

    Args:
        positions: tokens of prompt and response together.
        max_new_tokens: where ``config`` says nothing.
        teachers: as ``load_prompts`` has it.

    Raises OpdError for a file that cannot be read, a prompt without an answer, or one that leaves no room for a response.
    """
    listed = list(config.tasks)
    if config.prompts is not None:
        listed.insert(0, EvalTaskConfig(name=HELDOUT, path=config.prompts, limit=config.limit))
    tasks = []
    for each in listed:
        key = _key(each.name)
        new_tokens = each.max_new_tokens or config.max_new_tokens or max_new_tokens
        room = positions - new_tokens
        if room < 1:
            raise OpdError(f"{key}: {new_tokens} new tokens leave no room for a prompt in {positions} positions; lower them")
        if each.format == "prompts":
            prompts = load_prompts(
                each.path,
                tokenizer,
                stop_id=stop_id,
                max_prompt_tokens=room,
                require_solutions=False,
                limit=each.limit,
                teachers=teachers,
            )
        else:
            questions = read_questions(each.path, each.format, each.limit)
            prompts = _ask(questions, config.instruction, tokenizer, room, each.path)
        if unanswered := count_faults(prompts, lambda prompt: prompt.answer is None):
            raise OpdError(f"{key}: {unanswered} of {each.path} have no 'answer'; add it, or remove it from the config")
        tasks.append(Task(each.name, each.path, prompts, each.samples or config.samples, new_tokens))
    return tasks


def _key(name: str) -> str:
    return "eval.prompts" if name == HELDOUT else f"eval.tasks ({name})"


def _ask(questions: Sequence[Question], instruction: str, tokenizer: Tokenizer, room: int, path: str) -> list[Prompt]:
    """Through the chat template where there is one; else problem and instruction as they stand."""
    prompts = []
    for number, question in enumerate(questions, start=1):
        where, text = f"{path}:{number}", f"{question.text}\n\n{instruction}"
        if tokenizer.chat_template is None:
            text += "\n"
            token_ids = tokenizer.encode(text)
        else:
            text = render(where, [{"role": "user", "content": text}], tokenizer)
            token_ids = tokenizer.encode(text, add_special_tokens=False)  # the template writes them itself
        if len(token_ids) > room:
            raise OpdError(
                f"{where}: the prompt has {len(token_ids)} tokens, but the context leaves {room}; lower max_new_tokens"
            )
        prompts.append(Prompt(question.uid, tuple(token_ids), text, question.answer, tolerance=question.tolerance))
    return prompts
