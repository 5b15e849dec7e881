from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.data import PromptDataset, load_prompts, load_tokenizer
from megatron_opd.types import DataCursor, OpdError, Prompt, Tokenizer
from tests.data.factories import make_prompt, save_character_tokenizer

DIGIT_0 = 3  # its id


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_character_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def load(tmp_path: Path, content: bytes | list[object], tokenizer: Tokenizer, **options: Any) -> list[Prompt]:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode())
    settings: dict[str, Any] = {"stop_id": 1, "max_prompt_tokens": 20, "require_solutions": False, **options}
    return load_prompts(file, tokenizer, **settings)


def test_a_plain_prompt_is_encoded_as_it_stands_and_the_solution_ends_with_the_stop_token(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    [prompt] = load(tmp_path, [{"prompt": "1+2=", "answer": "3", "solution": "03", "id": "x"}], tokenizer)
    plus, equals = DIGIT_0 + 10, DIGIT_0 + 12
    assert prompt == Prompt("x", (0, DIGIT_0 + 1, plus, DIGIT_0 + 2, equals), "1+2=", "3", (DIGIT_0, DIGIT_0 + 3, 1), "03")


def test_messages_go_through_the_chat_template_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    [prompt] = load(tmp_path, [{"messages": [{"role": "user", "content": "1+2"}]}], tokenizer)
    assert prompt.text == "u:1+2;a:"
    assert prompt.token_ids == tuple(tokenizer.encode("u:1+2;a:", add_special_tokens=False))
    assert prompt.uid == "1"
    assert prompt.solution_ids is None


def test_limit_reads_no_further(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompts = load(tmp_path, b'{"prompt": "1"}\n{"prompt": "2"}\nbroken', tokenizer, limit=2)
    assert [prompt.text for prompt in prompts] == ["1", "2"]


def test_windows_line_ends_and_byte_order_mark_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompts = load(tmp_path, b'\xef\xbb\xbf{"prompt": "1"}\r\n{"prompt": "2"}\r\n', tokenizer)
    assert [prompt.text for prompt in prompts] == ["1", "2"]


GOOD = b'{"prompt": "1"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (GOOD + b'{"prompt": "1', ":2: not valid JSON"),
        (GOOD + b"[" * 100_000, ":2: not valid JSON"),
        (GOOD + b"\n" + GOOD, ":2: empty line"),
        (GOOD + b"[1]", ":2: a JSON list"),
        (b'{"prompt": "\xff"}', ":1: not valid UTF-8"),
        (b'{"prompt": "\\ud800"}', ":1: 'prompt' has half a surrogate pair"),
        (b'{"answer": "1"}', "neither 'prompt' nor 'messages'"),
        (b'{"prompt": "1", "messages": []}', "both 'prompt' and 'messages'"),
        (b'{"prompt": 1}', "'prompt' is '1' (int); it must be a string"),
        (b'{"prompt": "1", "answer": 5}', "'answer' is '5' (int)"),
        (b'{"prompt": "1", "solution": ["a"]}', "'solution' is"),
        (b'{"prompt": "1", "solution": ""}', "'solution' is empty"),
        (b'{"prompt": "1", "id": 1.5}', "'id' is 1.5"),
        (b'{"messages": []}', "non-empty list"),
        (b'{"messages": ["hello"]}', "non-empty list"),
        (b'{"messages": [{"role": "user"}]}', "'content' is 'None'"),
        (b'{"prompt": "1", "id": "7"}\n{"prompt": "2", "id": 7}', ":2: id '7' is taken by line 1"),
        (b'{"prompt": "1111111111111111111111111"}', "has 26 tokens, but the context leaves 20"),
    ],
)
def test_bad_lines_are_named_with_file_and_line(tmp_path: Path, tokenizer: Tokenizer, content: bytes, message: str) -> None:
    with pytest.raises(OpdError) as caught:
        load(tmp_path, content, tokenizer)
    assert message in str(caught.value)
    assert "prompts.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(OpdError, match=r"absent\.jsonl: cannot be read"):
        load_prompts(tmp_path / "absent.jsonl", tokenizer, stop_id=1, max_prompt_tokens=9, require_solutions=False)


def test_gold_responses_need_a_solution_on_every_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines: list[object] = [{"prompt": "1", "solution": "1"}, {"prompt": "2"}]
    with pytest.raises(OpdError, match=":2: no 'solution'"):
        load(tmp_path, lines, tokenizer, require_solutions=True)


def test_a_gold_response_beyond_the_context_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    line = {"prompt": "1", "solution": "22"}  # <bos> 1 + 2 2 <eos>
    assert load(tmp_path, [line], tokenizer, max_sequence_tokens=5)
    with pytest.raises(OpdError, match="have 5 tokens, but the context holds 4"):
        load(tmp_path, [line], tokenizer, max_sequence_tokens=4)


def test_a_prompt_without_tokens_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert load(tmp_path, [{"prompt": ""}], tokenizer)[0].token_ids == (0,)  # this tokenizer writes <bos>
    silent = load_tokenizer(save_character_tokenizer(tmp_path / "silent", chat_template="{{ '' }}"))
    with pytest.raises(OpdError, match="the prompt has no tokens"):
        load(tmp_path, [{"messages": [{"role": "user", "content": "1"}]}], silent)


@pytest.mark.parametrize("template", [None, "{{ raise_exception('roles must\nalternate') }}", "{% for %}"])
def test_a_chat_template_that_is_missing_or_fails_is_named(tmp_path: Path, template: str | None) -> None:
    tokenizer = load_tokenizer(save_character_tokenizer(tmp_path / "model", chat_template=template))
    with pytest.raises(OpdError, match=":1: the chat template cannot render") as caught:
        load(tmp_path, [{"messages": [{"role": "user", "content": "1"}]}], tokenizer)
    assert "\n" not in str(caught.value)


def uids(prompts: list[Prompt]) -> list[str]:
    return [prompt.uid for prompt in prompts]


@given(size=st.integers(1, 12), seed=st.integers(0, 5), counts=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_every_epoch_is_a_permutation_however_it_is_cut_and_resumed(size: int, seed: int, counts: list[int]) -> None:
    prompts = [make_prompt(str(i)) for i in range(size)]
    whole = uids(PromptDataset(prompts, seed).next(DataCursor(), sum(counts)))
    cursor, pieces = DataCursor(), []
    for count in counts:
        cursor = DataCursor(cursor.epoch, cursor.position)  # a restarted process: new dataset, cursor from the checkpoint
        pieces += uids(PromptDataset(prompts, seed).next(cursor, count))
    assert pieces == whole
    assert (cursor.epoch, cursor.position) == divmod(sum(counts), size)
    for start in range(0, len(whole) - size + 1, size):
        assert Counter(whole[start : start + size]) == Counter(uids(prompts))


def test_epochs_and_seeds_differ_in_order() -> None:
    prompts = [make_prompt(str(i)) for i in range(50)]
    epochs = uids(PromptDataset(prompts, 1).next(DataCursor(), 100))
    assert epochs[:50] != epochs[50:]
    assert epochs[:50] != uids(PromptDataset(prompts, 2).next(DataCursor(), 50))
    assert epochs[:50] != uids(prompts)


def test_a_cursor_of_a_larger_file_is_refused() -> None:
    with pytest.raises(OpdError, match="stands at prompt 3"):
        PromptDataset([make_prompt(str(i)) for i in range(3)], 0).next(DataCursor(0, 3), 1)
