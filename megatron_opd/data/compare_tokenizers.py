"""What two tokenizers have in common, for who chooses a teacher: ids, special and end tokens, chat template, sample texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from megatron_opd.data.raw_tokenizers import SAMPLES
from megatron_opd.data.tokenizers import differing_ids, load_tokenizer, stop_ids
from megatron_opd.types import OpdError, Tokenizer

_SHOWN = 10
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Comparison:
    """``compatible``: a run accepts them as student and teacher. ``lines`` are for a reader."""

    compatible: bool
    lines: tuple[str, ...]


def compare_tokenizers(student: Path, teacher: Path) -> Comparison:
    """Raises OpdError where a folder has no tokenizer that can be read."""
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    differing = differing_ids(ours, theirs)
    lines = [f"{student}: {len(ours)} tokens; {teacher}: {len(theirs)} tokens"]
    lines += [f"  id {index}: {one!r} / {other!r}" for index, one, other in differing[:_SHOWN]]
    if len(differing) > _SHOWN:
        lines.append(f"  and {len(differing) - _SHOWN} more ids")
    lines += _ends((student, ours), (teacher, theirs))
    lines += disagreements(ours, theirs)
    if not any(_stop_ids(*each) for each in ((student, ours), (teacher, theirs))):
        return Comparison(
            False, (*lines, "not compatible: neither has an end token; set eos_token_id in generation_config.json")
        )
    verdict = f"not compatible: {len(differing)} ids differ" if differing else "compatible: every id is the same token"
    return Comparison(not differing, (*lines, verdict))


def disagreements(student: Tokenizer, teacher: Tokenizer) -> list[str]:
    """Of two tokenizers whose ids are the same tokens: roles, which tokens are special, chat template, ids of sample texts."""
    lines = [*_roles(student, teacher), *_special(student, teacher)]
    if cast(Any, student).chat_template != cast(Any, teacher).chat_template:
        lines.append("chat template: differs; prompts take the student's, so both models see the same ids")
    return lines + [f"text {text[:30]!r}: other ids" for text in SAMPLES if _ids(student, text) != _ids(teacher, text)]


def _roles(ours: Tokenizer, theirs: Tokenizer) -> Iterator[str]:
    for role in _ROLES:
        one, other = (_token(each, role) for each in (ours, theirs))
        if one != other:
            yield f"{role}: {one} / {other}"


def _special(ours: Tokenizer, theirs: Tokenizer) -> Iterator[str]:
    """Tokens that only one of them takes out of a text before it is cut, and leaves out of what it shows."""
    one, other = (
        {index for index, token in cast(Any, each).added_tokens_decoder.items() if token.special} for each in (ours, theirs)
    )
    for whose, ids in (("student", one - other), ("teacher", other - one)):
        if ids:
            shown = ", ".join(f"{index} ({ours.decode([index])!r})" for index in sorted(ids)[:_SHOWN])
            yield f"special for the {whose} alone: {shown}" + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")


def _token(tokenizer: Tokenizer, role: str) -> str:
    """The token of a role and its id, as both are shown."""
    token = cast(Any, tokenizer).special_tokens_map.get(role)
    return "none" if token is None else f"{token!r} ({tokenizer.get_vocab().get(str(token))})"


def _ends(*models: tuple[Path, Tokenizer]) -> Iterator[str]:
    """Ids that end a response: they may differ, and count as one class then."""
    found = [_stop_ids(*each) for each in models]
    if found[0] != found[1]:
        one, other = (", ".join(map(str, ids)) or "none" for ids in found)
        yield f"end tokens: {one} / {other}; a run takes all of them as one stop class"


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    try:
        return stop_ids(folder, tokenizer)
    except OpdError:
        return ()


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
