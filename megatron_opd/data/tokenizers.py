"""Tokenizers of local Hugging Face folders: load, find the stop tokens, compare student and teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer

from megatron_opd.data.raw_tokenizers import load_raw, raw_file
from megatron_opd.types import OpdError, Tokenizer

_DIFFERENCES_SHOWN = 3


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a local Hugging Face folder: its tokenizer.json, or what it was made of (see raw_tokenizers.py).

    Raises OpdError where there is none that can be read.
    """
    if not Path(folder).is_dir():
        raise OpdError(f"tokenizer {folder}: no such folder; give a Hugging Face folder with tokenizer.json")
    try:
        raw = raw_file(Path(folder))
        if raw is not None:
            return cast(Tokenizer, load_raw(raw))
        return cast(Tokenizer, AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
    except OpdError:
        raise
    except Exception as error:  # transformers lets through whatever the tokenizer's own format raises
        reason = " ".join(str(error).split())[:200]
        raise OpdError(
            f"tokenizer {folder}: cannot be loaded ({reason}); the folder needs a readable tokenizer.json"
        ) from error


def stop_ids(folder: str | Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The stop class, sorted: every eos_token_id of generation_config.json, config.json and the tokenizer.

    Student and teacher may end with different ids of it (Qwen2.5 base 151643, instruct 151645). Raises OpdError where none of
    the three names one.
    """
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        found.update(_declared_ids(Path(folder) / name))
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise OpdError(
            f"model {folder}: no end token; set eos_token_id in generation_config.json, config.json or the tokenizer"
        )
    return tuple(sorted(found))


def solution_end(tokenizer: Tokenizer, stops: tuple[int, ...]) -> int:
    """Of the end tokens ``stops`` that which gold solutions end with: the tokenizer's own, where it names one.

    The smallest is another one in many chat models: Llama-3's <|end_of_text|> instead of <|eot_id|>.
    """
    return stops[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def check_same_tokenizer(student: Tokenizer, teacher: Tokenizer, student_name: str, teacher_name: str) -> None:
    """Raises OpdError unless both give every id, special tokens included, to the same token.

    Padded embedding rows are no tokens, so models of different padded sizes pass. Which ids end a response is not compared:
    that is the stop class.
    """
    differing = differing_ids(student, teacher)
    if differing:
        shown = ", ".join(f"{index} ({one!r} / {other!r})" for index, one, other in differing[:_DIFFERENCES_SHOWN])
        raise OpdError(
            f"teacher.model {teacher_name}: its tokenizer differs from that of student.model {student_name} at"
            f" {len(differing)} ids (id (student / teacher)): {shown}; use a teacher with the student's tokenizer"
        )


def differing_ids(one: Tokenizer, other: Tokenizer) -> list[tuple[int, str | None, str | None]]:
    """Each id that is another token in ``other``, or none, with both tokens."""
    ours, theirs = ({index: token for token, index in each.get_vocab().items()} for each in (one, other))
    both = ((index, ours.get(index), theirs.get(index)) for index in sorted(ours.keys() | theirs.keys()))
    return [each for each in both if each[1] != each[2]]


def _declared_ids(file: Path) -> list[int]:
    """eos_token_id of a JSON file: an id, a list of ids, null or absent."""
    if not file.is_file():
        return []
    try:
        tree: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OpdError(f"{file}: not valid JSON ({error}); restore the file") from error
    value = tree.get("eos_token_id") if isinstance(tree, dict) else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(index) is int and index >= 0 for index in ids):
        raise OpdError(f"{file}: eos_token_id is {value!r}; it must be an id or a list of ids")
    return ids
