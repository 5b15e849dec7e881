"""examples/reproduction: what its conclusions rest on. The runs themselves are `make reproduce`."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from examples.reproduction import make_models
from examples.reproduction.arms import ARMS, CONFIG, EVERY, SEASONED, SLIPS, Arm, command_overrides
from examples.reproduction.final import Response
from examples.reproduction.make_models import (
    BOUNDED_TEACHER,
    CONTEXT,
    GOLD,
    SLIPPING_GOLD,
    TEACHER,
    UNSURE_STUDENT,
    alone,
    exchange_end,
    write_untrained,
)
from examples.reproduction.problems import EOS, LARGEST, NUMBERS, UNKNOWN, VOCABULARY, Style, make_tokenizer, problems
from examples.reproduction.table import above_half, difference
from megatron_opd.config_file import load_config
from megatron_opd.data.tokenizers import load_tokenizer, stop_ids
from megatron_opd.evaluation.verify import is_correct

LOSS_TERMS = {"mixture.student", "mixture.gold", "loss.reference_kl"}


def test_each_step_of_a_solution_is_right_and_goes_on_from_the_one_before() -> None:
    for problem in islice(problems("test"), 300):
        total = None
        for step in problem.steps:
            left, sign, by, _, result = step.rstrip(".").split()
            assert total in (None, left)
            signed = NUMBERS.index(by) if sign == "+" else -NUMBERS.index(by)
            assert NUMBERS.index(left) + signed == NUMBERS.index(result)
            total = result
        assert total == problem.answer


def test_the_tokenizer_knows_every_word_and_the_longest_solution_fits() -> None:
    tokenizer = make_tokenizer()
    for problem in islice(problems("test"), 300):
        solution = problem.solution(TEACHER.most)
        ids = tokenizer.encode(problem.question) + tokenizer.encode(solution)
        assert tokenizer.convert_tokens_to_ids(UNKNOWN) not in ids
        assert len(ids) < CONTEXT
        assert str(tokenizer.decode(tokenizer.encode(solution))).strip() == solution


def test_a_response_that_only_checks_is_not_right_however_often_it_names_the_result() -> None:
    for problem in islice(problems("test"), 100):
        whole = problem.solution(20)
        assert is_correct(whole, problem.answer)
        assert not is_correct(whole[: whole.index("So the answer")], problem.answer)


def test_a_teacher_with_another_end_token_is_the_same_teacher(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    write_untrained(tmp_path / "one", tokenizer, 16, 24, 1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "one"))
    model.save_pretrained(tmp_path / "one")
    exchange_end(tmp_path / "one", tmp_path / "other")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    ids = torch.tensor([tokenizer.encode(next(problems("test")).question)])
    end, unknown = VOCABULARY.index(EOS), VOCABULARY.index(UNKNOWN)
    exchanged = list(range(len(VOCABULARY)))
    exchanged[end], exchanged[unknown] = unknown, end
    assert torch.equal(other(ids).logits, model(ids).logits[..., exchanged])
    assert stop_ids(tmp_path / "other", load_tokenizer(tmp_path / "other")) == (unknown,)
    assert stop_ids(tmp_path / "one", load_tokenizer(tmp_path / "one")) == (end,)


def test_an_answer_is_said_again_as_often_as_the_style_says_and_is_right() -> None:
    rng = random.Random(0)
    counts = [UNSURE_STUDENT.answers(rng) for _ in range(20_000)]
    assert sum(counts) / len(counts) == pytest.approx(1 / 0.9, rel=0.03)
    for problem in islice(problems("test"), 100):
        solution = problem.solution(1, answers=3)
        assert solution.count(f"So the answer is {problem.answer}") == 3
        assert is_correct(solution, problem.answer)


def test_styles_that_say_it_once_draw_nothing_for_it() -> None:
    rng = random.Random(0)
    before = rng.getstate()
    assert TEACHER.answers(rng) == 1
    assert rng.getstate() == before  # the committed tables rest on these draws


def test_slips_are_as_many_as_the_style_says_and_the_steps_after_one_go_on_from_it() -> None:
    rng = random.Random(0)
    steps = slips = 0
    for problem in islice(problems("test"), 3000):
        slipped = problem.slipped(SLIPPING_GOLD.slips, rng)
        total = problem.steps[0].split()[0]
        assert [step.split()[1:3] for step in slipped.steps] == [step.split()[1:3] for step in problem.steps]
        for step in slipped.steps:
            left, sign, by, _, result = step.rstrip(".").split()
            assert left == total
            right = NUMBERS.index(left) + (NUMBERS.index(by) if sign == "+" else -NUMBERS.index(by))
            right = min(max(right, 0), LARGEST)
            assert abs(NUMBERS.index(result) - right) <= 1
            steps, slips, total = steps + 1, slips + (NUMBERS.index(result) != right), result
        assert slipped.answer == total
        assert is_correct(slipped.solution(1), total)
        assert is_correct(slipped.solution(1), problem.answer) == (total == problem.answer)
    assert slips / steps == pytest.approx(SLIPPING_GOLD.slips, abs=0.01)


def test_a_style_without_slips_draws_nothing_for_them() -> None:
    one, other = random.Random(0), random.Random(0)
    problem = next(problems("test"))
    assert GOLD.solution(problem, one) == problem.solution(GOLD.checks(other), GOLD.answers(other))
    assert one.getstate() == other.getstate()


@pytest.mark.parametrize(("style", "mean"), [(Style(again=0.0), 1.0), (Style(again=0.8, most=1000), 5.0)])
def test_a_style_checks_as_often_as_it_says(style: Style, mean: float) -> None:
    rng = random.Random(0)
    counts = [style.checks(rng) for _ in range(20_000)]
    assert sum(counts) / len(counts) == pytest.approx(mean, rel=0.03)
    assert min(counts) >= 1


def test_the_endless_share_of_the_teachers_documents_is_the_only_difference_to_the_bounded_teacher() -> None:
    rng = random.Random(0)
    endless = sum(TEACHER.checks(rng) == TEACHER.most for _ in range(20_000)) / 20_000
    assert endless == pytest.approx(0.08, abs=0.01)
    assert (TEACHER.again, TEACHER.most) == (BOUNDED_TEACHER.again, BOUNDED_TEACHER.most)


@pytest.mark.parametrize(("whole", "arms"), [("stableopd", ARMS), ("slips_stableopd", SLIPS), ("seasoned_stableopd", SEASONED)])
def test_the_arms_differ_in_loss_terms_alone(whole: str, arms: dict[str, Arm]) -> None:
    recipe = _leaves(load_config(CONFIG, command_overrides(whole, 0)).model_dump())
    for name in arms:
        arm = _leaves(load_config(CONFIG, command_overrides(name, 0)).model_dump())
        differing = {key for key in recipe if arm[key] != recipe[key]}
        assert differing <= LOSS_TERMS | {"run.name", "run.dir"}, name


def test_every_run_has_a_config_that_is_accepted() -> None:
    for name, arm in EVERY.items():
        for pair in arm.pairs:
            load_config(CONFIG, command_overrides(name, pair))


def test_the_interval_of_a_difference_holds_it_and_is_as_wide_as_the_pairs_are_different() -> None:
    def responses(right: int) -> list[Response]:
        return [Response(index < right, False, 1, 0.0) for index in range(100)]

    alike = difference([responses(60)] * 3, [responses(40)] * 3)
    assert alike["mean"] == pytest.approx(0.2)
    assert 0.1 < alike["low"] < 0.2 < alike["high"] < 0.3
    unlike = difference([responses(50), responses(60), responses(70)], [responses(40)] * 3)
    assert unlike["mean"] == pytest.approx(0.2)
    assert unlike["high"] - unlike["low"] > alike["high"] - alike["low"]


def test_held_out_problems_are_no_prompts_and_each_pair_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_models, "WORK", tmp_path)
    make_models.make_data(0)
    make_models.make_data(1)

    def questions(file: str) -> set[str]:
        return {json.loads(line)["prompt"] for line in (tmp_path / file).read_text().splitlines()}

    shared, first, second = (questions(file) for file in ("heldout.jsonl", "pair-0/heldout.jsonl", "pair-1/heldout.jsonl"))
    assert len(shared) == len(first) == len(second) == make_models.HELDOUT
    assert not (first | shared) & questions("pair-0/train.jsonl") and not first & shared
    assert len(first & second) < 10  # drawn from the same problems by other seeds


def test_what_several_want_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make(number: int) -> None:
        with alone(tmp_path / "run"):
            if not made:
                time.sleep(0.05)  # the others come to look
                made.append(number)

    with ThreadPoolExecutor(4) as workers:
        list(workers.map(make, range(4)))
    assert len(made) == 1


def test_truncation_counts_once_the_mean_of_five_steps_is_above_one_half() -> None:
    def records(rates: list[float]) -> list[dict[str, Any]]:
        return [{"step": 0}, *({"step": step, "rollout/truncation_rate": rate} for step, rate in enumerate(rates, 1))]

    assert above_half(records([0.0] * 5 + [1.0] * 5)) == 8
    assert above_half(records([0.5] * 20)) is None


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
