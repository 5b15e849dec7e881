"""Is a response's final answer right? Strings and numbers are compared at once, other maths by math-verify where installed."""

from __future__ import annotations

import re
from fractions import Fraction

# Bounded repetitions throughout: a runaway response must not meet quadratic backtracking.
_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?"  # 5; 1,234.5; .5; 1/2
_NUMBER = rf"[-+]?{_UNSIGNED}"
_ANY_NUMBER = re.compile(rf"(?:(?<![\w.)\]}}])[-+])?{_UNSIGNED}")  # in 12-5 the sign is a minus
_MARK = re.compile(r"answer\s{0,3}(?:is\b\s{0,3}:?|:|=)", re.IGNORECASE)
_LEADING_NUMBER = re.compile(rf"\\?\$?({_NUMBER})\$?(?=[.,;!?%]?(?:\s[A-Za-z]{{2}}|\s?$|(?<=[.,;!?%])\s))")
_SENTENCE_END = re.compile(r"[.;!?]\s")
_BRACES = re.compile(r"\\boxed\{|[{}]")
_FRACTION = re.compile(r"([-+]?)\\frac\{([0-9]+)\}\{([0-9]+)\}")
_LOOKS_LIKE_MATHS = re.compile(r"[0-9\\^*/+=<>()]")
_LONGEST_MATHS = 200  # characters; longer "answers" are runaway text, costly to parse
_MATHS_SECONDS = 2


def extract_answer(text: str) -> str | None:
    r"""The final answer that a response states, None where it states none.

    In this order: the last complete ``\boxed{...}``; the line after the last ``####``; what follows the last "answer is",
    "answer:" or "answer =" (its number where it starts with one, else up to the end of the sentence); the last number.
    """
    boxed = _last_boxed(text)
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


def is_correct(text: str, answer: str) -> bool:
    """Whether the response states ``answer``, or is nothing but it.

    Equal after normalisation (white space, ``$``, thousands separators, final period, LaTeX spacing), equal as numbers, or, if
    both look like maths, equal to math-verify (a timeout or a crash of which counts as wrong; it needs the main thread).
    """
    expected = _normalise(answer)
    if _normalise(text) == expected:
        return True
    stated = extract_answer(text)
    if stated is None:
        return False
    given = _normalise(stated)
    if given == expected:
        return True
    numbers = _number(given), _number(expected)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _looks_like_maths(given) and _looks_like_maths(expected) and _same_maths(given, expected)


def _last_boxed(text: str) -> str | None:
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
    """Exact, so 0.1 + 0.2 = 0.3; None for anything but a decimal or a fraction of integers."""
    text = _FRACTION.sub(r"\1\2/\3", text)
    if not re.fullmatch(_NUMBER, text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):  # 1.5/2; 1/0
        return None


def _looks_like_maths(text: str) -> bool:
    return len(text) <= _LONGEST_MATHS and _LOOKS_LIKE_MATHS.search(text) is not None


def _same_maths(given: str, expected: str) -> bool:
    try:
        from math_verify import parse, verify  # imports sympy: a second that plain answers never pay
    except ImportError:
        return False
    try:
        pair = [parse(f"${side}$", parsing_timeout=_MATHS_SECONDS) for side in (expected, given)]
        return bool(verify(*pair, timeout_seconds=_MATHS_SECONDS))
    except Exception:  # the text is a model's: whatever it makes the parser raise, the answer is wrong
        return False
