"""Prompts from a JSONL file, and their seeded order with a serialisable cursor."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from megatron_opd.types import DataCursor, OpdError, Prompt, Tokenizer


def load_prompts(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    stop_id: int,
    max_prompt_tokens: int,
    require_solutions: bool,
    end_ids: Collection[int] = (),
    limit: int | None = None,
    max_sequence_tokens: int | None = None,
    teachers: Collection[str] = ("",),
) -> list[Prompt]:
    """Read and tokenise a UTF-8 JSONL file; with ``limit`` only its first lines.

    Each line is an object with ``prompt`` (str, encoded as it stands) or ``messages`` (a list of {role, content}, through the
    chat template), optionally ``answer`` (str), ``solution`` (str: a gold response; ``stop_id`` is appended) and ``id`` (str or
    int; default: the line number), and ``teacher`` where there are several. Other keys are ignored. An empty line is refused:
    it is most often a damaged file.

    Args:
        max_prompt_tokens: longest prompt allowed, tokens.
        require_solutions: every line must have ``solution``.
        end_ids: tokens that end a response; a solution holds none of them itself.
        max_sequence_tokens: longest prompt with its gold response allowed, tokens; None: any.
        teachers: names to choose from in ``teacher``; a single "" is given to every prompt.

    Raises OpdError with ``file:line``.
    """
    file = Path(path)
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise OpdError(f"prompts {file}: cannot be read ({error.strerror}); give the path of a JSONL file") from error
    if lines == [b""]:
        raise OpdError(f"prompts {file}: the file is empty; give one JSON object a line")
    prompts: list[Prompt] = []
    line_of_uid: dict[str, int] = {}
    for number, line in enumerate(lines[:limit], start=1):
        where = f"{file}:{number}"
        prompt = _parse(where, line, str(number), tokenizer, stop_id, {stop_id, *end_ids}, teachers)
        if len(prompt.token_ids) > max_prompt_tokens:
            raise OpdError(
                f"{where}: the prompt has {len(prompt.token_ids)} tokens, but the context leaves {max_prompt_tokens};"
                " shorten it, or lower max_new_tokens"
            )
        if require_solutions and prompt.solution_ids is None:
            raise OpdError(
                f"{where}: no 'solution', but mixture.gold asks for one for each prompt; add it or set mixture.gold=0"
            )
        total = len(prompt.token_ids) + len(prompt.solution_ids or ())
        if max_sequence_tokens is not None and total > max_sequence_tokens:
            raise OpdError(
                f"{where}: prompt and solution have {total} tokens, but the context holds {max_sequence_tokens}; drop the line"
            )
        if prompt.uid in line_of_uid:
            raise OpdError(f"{where}: id {prompt.uid!r} is taken by line {line_of_uid[prompt.uid]}; give each line its own id")
        line_of_uid[prompt.uid] = number
        prompts.append(prompt)
    return prompts


def count_faults(prompts: Sequence[Prompt], fault: Callable[[Prompt], bool]) -> str:
    """``3 of 60 prompts (the first in line 7, id 'x')``; empty where none has the fault."""
    lines = [number for number, prompt in enumerate(prompts, start=1) if fault(prompt)]  # a prompt is a line
    if not lines:
        return ""
    return f"{len(lines)} of {len(prompts)} prompts (the first in line {lines[0]}, id {prompts[lines[0] - 1].uid!r})"


class PromptDataset:
    """Prompts in a seeded order; where it stands is the caller's cursor."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise OpdError("data.prompts: no prompts; give a file with at least one line")
        self._prompts = prompts
        self._seed = seed
        self._order_epoch = -1
        self._order: list[int] = []

    def next(self, cursor: DataCursor, count: int) -> list[Prompt]:
        """The next ``count`` prompts; advances ``cursor`` in place.

        Each epoch is a permutation of its own, a function of (seed, epoch); a batch may straddle epochs, and then may hold a
        prompt twice. Raises OpdError for a cursor of a larger file.
        """
        if cursor.position >= len(self._prompts):
            raise OpdError(
                f"data.prompts: the checkpoint stands at prompt {cursor.position} of its epoch, but the file has"
                f" {len(self._prompts)}; resume with the file that the run began with"
            )
        batch = []
        for _ in range(count):
            batch.append(self._prompts[self._epoch_order(cursor.epoch)[cursor.position]])
            cursor.position += 1
            if cursor.position == len(self._prompts):
                cursor.epoch, cursor.position = cursor.epoch + 1, 0
        return batch

    def _epoch_order(self, epoch: int) -> list[int]:
        if epoch != self._order_epoch:
            self._order = list(range(len(self._prompts)))
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
            self._order_epoch = epoch
        return self._order


def _parse(
    where: str,
    line: bytes,
    default_uid: str,
    tokenizer: Tokenizer,
    stop_id: int,
    end_ids: Collection[int],
    teachers: Collection[str],
) -> Prompt:
    record = _decode(where, line)
    if ("prompt" in record) == ("messages" in record):
        problem = "both 'prompt' and 'messages'" if "prompt" in record else "neither 'prompt' nor 'messages'"
        raise OpdError(f"{where}: {problem}; each line needs exactly one of them")
    if "prompt" in record:
        text = _string(where, record, "prompt")
        token_ids = tokenizer.encode(text)
    else:
        text = render(where, record["messages"], tokenizer)
        token_ids = tokenizer.encode(text, add_special_tokens=False)  # the template writes them itself
    if not token_ids:
        raise OpdError(f"{where}: the prompt has no tokens; a response needs at least one token to follow")
    solution, answer = (_string(where, record, key) if record.get(key) is not None else None for key in ("solution", "answer"))
    for key, value in (("solution", solution), ("answer", answer)):
        if value is not None and not value.strip():
            raise OpdError(f"{where}: {key!r} is empty; write one or drop the key")
    solution_ids = None if solution is None else (*_solution_ids(where, solution, tokenizer, end_ids), stop_id)
    uid = record.get("id", default_uid)
    if type(uid) not in (str, int):
        raise OpdError(f"{where}: 'id' is {uid!r}; it must be a string or an integer")
    teacher = "" if "" in teachers else record.get("teacher")
    if not isinstance(teacher, str) or teacher not in teachers:
        raise OpdError(f"{where}: 'teacher' is {teacher!r}; name one of the config's teachers: {', '.join(teachers)}")
    return Prompt(
        uid=str(uid),
        token_ids=tuple(token_ids),
        text=text,
        answer=answer,
        solution_ids=solution_ids,
        solution=solution,
        teacher=teacher,
    )


def _solution_ids(where: str, solution: str, tokenizer: Tokenizer, end_ids: Collection[int]) -> list[int]:
    """Without an end token: one within would teach to go on behind it, one at the end to end twice."""
    ids = tokenizer.encode(solution, add_special_tokens=False)
    within = next((index for index in ids if index in end_ids), None)
    if within is not None:
        raise OpdError(
            f"{where}: 'solution' holds end token {within} ({tokenizer.decode([within])!r}); the run appends it, so remove it"
        )
    return ids


def _decode(where: str, line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise OpdError(f"{where}: empty line; remove it")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise OpdError(f"{where}: not valid UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise OpdError(f"{where}: not valid JSON ({error}); each line is one complete JSON object") from error
    if not isinstance(record, dict):
        raise OpdError(f'{where}: a JSON {type(record).__name__}, not an object; write {{"prompt": ...}}')
    return record


def _string(where: str, record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise OpdError(f"{where}: {key!r} is {str(value)[:80]!r} ({type(value).__name__}); it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OpdError(f"{where}: {key!r} has half a surrogate pair at character {error.start}; remove it") from error
    return value


def render(where: str, messages: Any, tokenizer: Tokenizer) -> str:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise OpdError(f"{where}: 'messages' must be a non-empty list of objects with role and content")
    conversation = [{key: _string(where, message, key) for key in ("role", "content")} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of the model's authors; a missing one raises ValueError
        reason = " ".join(str(error).split())[:160]
        raise OpdError(
            f"{where}: the chat template cannot render 'messages' ({reason}); use 'prompt', or a tokenizer with a chat template"
        ) from error
