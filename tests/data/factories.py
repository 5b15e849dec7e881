"""Prompts, rollouts and tokenizers to test with."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_opd.types import FinishReason, Prompt, Rollout, Source

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def make_prompt(uid: str = "p", tokens: int = 3, answer: str | None = None, solution: str | None = None) -> Prompt:
    solution_ids = None if solution is None else (*(ord(letter) for letter in solution), 1)
    return Prompt(uid, tuple(range(10, 10 + tokens)), f"text of {uid}", answer, solution_ids, solution)


def make_rollout(
    source: Source = Source.STUDENT,
    *,
    tokens: int = 4,
    prompt: Prompt | None = None,
    text: str = "",
    finish_reason: FinishReason = "stop",
    response_ids: tuple[int, ...] | None = None,
) -> Rollout:
    ids = tuple(range(100, 100 + tokens)) if response_ids is None else response_ids
    log_probs = tuple(-0.1 * (i + 1) for i in range(len(ids))) if source is Source.STUDENT else ()
    return Rollout(prompt or make_prompt(), source, ids, log_probs, finish_reason, 0, text)


def rollout_lists(max_prompt: int = 6, max_response: int = 30) -> st.SearchStrategy[list[Rollout]]:
    """Rollouts of unequal lengths from all sources, empty responses among them."""
    one = st.builds(
        lambda source, prompt, tokens: make_rollout(source, tokens=tokens, prompt=make_prompt(tokens=prompt)),
        st.sampled_from(Source),
        st.integers(1, max_prompt),
        st.integers(0, max_response),
    )
    return st.lists(one, max_size=25)


def save_character_tokenizer(
    folder: Path, letters: str = "0123456789+-= abc:;", *, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """A tokenizer with ids <bos> 0, <eos> 1, <unk> 2, then the letters; it writes <bos> as a special token."""
    vocabulary = {token: index for index, token in enumerate(["<bos>", "<eos>", "<unk>", *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", chat_template=chat_template
    )
    tokenizer.save_pretrained(folder)
    return folder
