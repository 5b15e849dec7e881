"""Is a response's final answer right? Strings and numbers are compared here, other maths by math-verify in its own process."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from megatron_opd.evaluation.estimates import Vote
from megatron_opd.evaluation.maths import MathsProcess, Outcome

# Bounded repetitions throughout: a runaway response must not meet quadratic backtracking.
_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?"  # 5; 1,234.5; .5; 1/2
_NUMBER = rf"[-+]?{_UNSIGNED}"
_ANY_NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])[-+])?{_UNSIGNED}")  # in 12-5 the sign is a minus
_MARK = re.compile(r"answer\s{0,3}(?:is\b\s{0,3}:?|:|=)", re.IGNORECASE)
_LEADING_NUMBER = re.compile(rf"\\?\$?({_NUMBER})\$?(?=[.,;!?%]?(?:\s[A-Za-z]{{2}}|\s?$|(?<=[.,;!?%])\s))")
_SENTENCE_END = re.compile(r"[.;!?]\s")
_BRACES = re.compile(r"\\boxed\{|[{}]")
_FRACTION = re.compile(r"([-+]?)\\frac\{([0-9]+)\}\{([0-9]+)\}")
# 4.5e33; 4.5 \times 10^{33}
_POWER_OF_TEN = re.compile(r"(?<=[0-9])(?:e|E|\s?(?:\\times|\\cdot)\s?10\^)\{?([-+]?[0-9]{1,3})\}?$")
_LOOKS_LIKE_MATHS = re.compile(r"[0-9\\^*/+=<>()]")
_LONGEST_MATHS = 200  # characters; longer "answers" are runaway text, costly to parse


@dataclass(frozen=True)
class Verdict:
    """What became of one response."""

    correct: bool
    stated: str | None  # the final answer as the response has it; None: it states none
    outcome: Outcome


def extract_answer(text: str) -> str | None:
    r"""The final answer that a response states, None where it states none.

    In this order: the last complete ``\boxed{...}``; the line after the last ``####``; what follows the last "answer is",
    "answer:" or "answer =" (its number where it starts with one, else up to the end of the sentence); the last number.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    _, mark, rest = text.rpartition("####")
    if mark and rest.strip():
        return rest.strip().splitlines()[0].strip()
    marks = [mark.end() for mark in _MARK.finditer(text) if text[mark.end() : mark.end() + 3].strip()]
    if marks:
        clause = text[marks[-1] :].strip().splitlines()[0].strip()
        number = _LEADING_NUMBER.match(clause)
        return number.group(1) if number else _SENTENCE_END.split(clause)[0].rstrip(".")
    numbers = _ANY_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def judge(text: str, answer: str, tolerance: float | None = None, maths: MathsProcess | None = None) -> Verdict:
    """Whether the response states ``answer``, or is nothing but it; never raises, whatever the text.

    Equal after normalisation (white space, ``$``, thousands separators, final period, LaTeX spacing), equal as numbers or at
    most ``tolerance`` apart, or, if both look like maths, equal to math-verify.

    Args:
        maths: the process to ask; None: the one that this process shares.
    """
    expected = _normalise(answer)
    if _normalise(text) == expected:
        return Verdict(True, text.strip(), "ok")
    stated = extract_answer(text)
    if stated is None:
        return Verdict(False, None, "unparsable")
    given = _normalise(stated)
    if given == expected:
        return Verdict(True, stated, "ok")
    one, other = _number(given), _number(expected)
    if one is not None and other is not None:
        return Verdict(abs(one - other) <= Fraction(tolerance or 0), stated, "ok")
    if not (_LOOKS_LIKE_MATHS.search(given) and _LOOKS_LIKE_MATHS.search(expected)):
        return Verdict(False, stated, "ok")
    if max(len(given), len(expected)) > _LONGEST_MATHS:
        return Verdict(False, stated, "unparsable")
    correct, outcome = (maths or shared_maths()).compare(expected, given, tolerance)
    return Verdict(correct, stated, outcome)


@cache
def shared_maths() -> MathsProcess:
    """One for this process, started by the first answer that needs it. Not for two threads at once."""
    return MathsProcess()


def is_correct(text: str, answer: str) -> bool:
    """:func:`judge`, without the reasons."""
    return judge(text, answer).correct


def canonical(stated: str) -> Vote:
    """Equal for answers that are equal strings or numbers: what a majority is counted by; never raises, whatever the text."""
    normal = _normalise(stated)
    number = _number(normal)
    return normal if number is None else number  # not as text: Python writes no integer of more than 4,300 digits


def last_boxed(text: str) -> str | None:
    last = None
    opened: list[int | None] = []  # for each open brace the start of the box that it opens, None where it opens none
    for brace in _BRACES.finditer(text):
        if brace.group() != "}":
            opened.append(brace.end() if brace.group() != "{" else None)
        elif opened and (start := opened.pop()) is not None:
            last = text[start : brace.start()].strip()
    return last


def _normalise(answer: str) -> str:
    answer = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[!,;: ()\[\]]|[$]|\\(?=[%$])", "", answer)
    answer = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", answer).replace("\N{MINUS SIGN}", "-")
    return " ".join(answer.split()).rstrip(".").removesuffix("%").strip()


def _number(text: str) -> Fraction | None:
    """Exact, so 0.1 + 0.2 = 0.3; None for anything but a decimal, in powers of ten or not, or a fraction of integers."""
    text = _FRACTION.sub(r"\1\2/\3", text)
    power = _POWER_OF_TEN.search(text)
    text, exponent = (text[: power.start()], int(power.group(1))) if power else (text, 0)
    if not re.fullmatch(_NUMBER, text):
        return None
    try:
        return Fraction(text.replace(",", "")) * Fraction(10) ** exponent
    except (ValueError, ZeroDivisionError):  # 1.5/2; 1/0
        return None
