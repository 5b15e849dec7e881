from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.evaluation import extract_answer, is_correct, judge
from megatron_opd.evaluation.maths import MathsProcess, Outcome
from megatron_opd.evaluation.verify import canonical
from tests.evaluation.long_numbers import LONG_NUMBERS


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{3} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7} but I go on \boxed{8 + ", "7"),  # truncated: the last complete one
        (r"the answer is 3, that is \boxed{4}", "4"),
        ("9 - 4 = 5\n#### 5\n", "5"),
        ("The answer is 12. I used 3 steps.", "12"),
        ("The answer is 12 apples", "12"),
        ("the answer is: $1,250.50.", "1,250.50"),
        ("Answer: Paris. It has 20 districts.", "Paris"),
        ("answer = -7", "-7"),
        ("the answer is 2x+1", "2x+1"),
        ("first the answer is 3\nno, the answer is 4", "4"),
        ("the answer is 3, no, the answer is 4.", "4"),
        ("the answer is 7\nAnd the answer is ", "7"),
        ("the answer is\n8", "8"),
        ("the answer is $9$, clearly", "9"),
        ("the answer is 5%", "5"),
        (r"{ \boxed{f{6}} and {a}", "f{6}"),
        ("7-12=-5", "-5"),
        ("so 12-5", "5"),
        ("3 + 4 = 7.", "7"),
        ("it is 1/2", "1/2"),
        ("1,234 and 5,678", "5,678"),
        ("it costs 0.75", "0.75"),
        ("x2", "2"),
        ("no idea", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_answer_is_found_in_the_documented_order(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2+3=5", "5"),
        ("it is 5.0", "5"),
        ("it is 1,234", "1234"),
        (r"\boxed{\$18}", "18"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{\dfrac{1}{2}}", "0.5"),
        (r"\boxed{-\frac{3}{4}}", "-3/4"),
        (r"\boxed{\text{north}}", "north"),
        (r"\boxed{\left( 1, 2 \right)}", "( 1, 2 )"),
        ("\\boxed{\N{MINUS SIGN}3}", "-3"),
        ("north", "north"),
        (" yes.\n", "yes"),
        ("The answer is (B).", "(B)"),
    ],
)
def test_equal_answers_in_other_dress_are_right(text: str, answer: str) -> None:
    assert is_correct(text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2+3=6", "5"),
        ("it is -5", "5"),
        ("it is 5", "-5"),
        ("it is 15", "5"),
        ("it is 5.01", "5"),
        ("5 is what I would say, or 6", "5"),
        (r"\boxed{1/0}", "0"),
        ("south", "north"),
        ("", "5"),
        (r"\boxed{(1, 2)}", "(2, 1)"),
    ],
)
def test_other_answers_are_wrong(text: str, answer: str) -> None:
    assert not is_correct(text, answer)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"\boxed{x^2 + 1}", "1+x^2", True),
        (r"\boxed{(1,2)}", "(1, 2)", True),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True),
        (r"\boxed{\sqrt{8}}", r"3\sqrt{2}", False),
    ],
)
def test_maths_is_compared_by_math_verify(text: str, answer: str, right: bool) -> None:
    assert is_correct(text, answer) is right


class NeverAsked(MathsProcess):
    def compare(self, expected: str, given: str, tolerance: float | None = None) -> tuple[bool, Outcome]:
        raise AssertionError((expected, given))


def test_plain_answers_never_reach_math_verify() -> None:
    cases = (("2+3=5", "5", True), ("it is 6", "5", False), ("south", "north", False), (r"\boxed{\frac{1}{2}}", "0.5", True))
    for text, answer, right in cases:
        assert judge(text, answer, maths=NeverAsked()).correct is right


@given(number=st.integers(-(10**9), 10**9), before=st.sampled_from(["", "so ", "x=", "is "]))
def test_any_integer_is_read_back(number: int, before: str) -> None:
    assert is_correct(f"{before}{number}", str(number))
    assert is_correct(f"{before}{number:,}.", str(number))
    assert not is_correct(f"{before}{number + 1}", str(number))


@given(text=st.text(st.sampled_from(list("0123456789.,/-+=${}\\ boxedanswer is:\n#%é")), max_size=60))
def test_no_text_crashes_it(text: str) -> None:
    extract_answer(text)
    is_correct(text, "north")


def test_runaway_responses_are_quick() -> None:
    start = time.monotonic()
    pieces = (
        "1",
        "1,",
        "111,",
        "\\boxed{",
        "{",
        "}",
        "answer is ",
        "answer is\n",
        "-",
        "1/",
        ".",
        " ",
        "\n",
        "\\text{",
        "####",
        "a",
    )
    for before in ("", "answer is ", "the answer is 5"):
        for piece in pieces:
            is_correct(before + piece * (50_000 // len(piece)), "5")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("number", LONG_NUMBERS)
def test_numbers_longer_than_python_writes_in_decimal_are_judged_and_counted(number: str) -> None:
    assert judge(rf"\boxed{{{number}}}", "5").outcome == "ok"
    assert judge(rf"\boxed{{{number}}}", f"+{number}").correct
    assert canonical(number) == canonical(f"+{number}")
    assert canonical(number) != canonical(f"-{number}")
