"""What a server's answer must be before anything is learnt from it; answers in the form that a real server gave."""

from __future__ import annotations

import base64
import copy
import math
from typing import Any

import pytest
import torch

from megatron_opd.sglang.client import Endpoint, EngineError
from megatron_opd.sglang.scores import Scored, check_informed, scoring

SERVER = "http://10.0.0.7:30000"
ANSWER: dict[
    str, Any
] = {  # of SGLang 0.5.21, to TOKENS[3:] with two ids and the two likeliest; 100 is the last id of the model
    "meta_info": {
        "finish_reason": {"type": "length", "length": 0},
        "input_token_logprobs": [[None, 99, None], [-5.65, 20, None], [-4.91, 31, None], [-11.59, 0, None], [-9.19, 7, None]],
        "input_top_logprobs": [
            None,
            [[-1.54, 50, None], [-1.66, 85, None]],
            [[-1.77, 51, None], [-1.94, 7, None]],
            [[-0.43, 85, None], [-2.59, 42, None]],
            [[-1.16, 63, None], [-2.0, 31, None]],
        ],
        "input_token_ids_logprobs": [
            None,
            [[-6.2, 1, None], [-7.81, 44, None]],
            [[-8.06, 1, None], [-8.32, 44, None]],
            [[-9.04, 1, None], [-5.65, 44, None]],
            [[-5.9, 1, None], [-5.77, 44, None]],
        ],
    }
}
TOKENS, FIRST, IDS = (5, 17, 99, 20, 31, 100, 7), 3, (1, 44)
ASK = scoring(TOKENS, FIRST, IDS, 2)


def changed(name: str, *place: int, value: Any) -> dict[str, Any]:
    answer = copy.deepcopy(ANSWER)
    *path, last = place
    entries = answer["meta_info"][name]
    for index in path:
        entries = entries[index]
    entries[last] = value
    return answer


def test_whole_answer_is_read_from_the_first_scored_token_on() -> None:
    assert ASK.body["logprob_start_len"] == 2 and ASK.body["sampling_params"]["max_new_tokens"] == 0
    scored = ASK.parse(ANSWER, Endpoint(SERVER))
    assert scored.server == SERVER and scored.tokens == 4
    assert scored.log_probs.tolist() == [-5.65, -4.91, -11.59, -9.19]
    assert scored.given.tolist() == [[-6.2, -7.81], [-8.06, -8.32], [-9.04, -5.65], [-5.9, -5.77]]
    assert scored.top_ids.tolist() == [[50, 85], [51, 7], [85, 42], [63, 31]]
    assert scored.top_log_probs[2].tolist() == [-0.43, -2.59]
    plain = scoring(TOKENS, FIRST, (), 0)
    assert "token_ids_logprob" not in plain.body
    alone = plain.parse(ANSWER, Endpoint(SERVER))
    assert alone.given.shape == alone.top_ids.shape == alone.top_log_probs.shape == (4, 0)


def test_likeliest_tokens_as_arrays_are_those_of_the_entries() -> None:
    scored = ASK.parse(ANSWER, Endpoint(SERVER))
    answer = copy.deepcopy(ANSWER)
    del answer["meta_info"]["input_top_logprobs"]
    answer["meta_info"] |= {
        "input_top_logprobs_val_flat_b64": base64.b64encode(scored.top_log_probs.float().numpy().tobytes()).decode(),
        "input_top_logprobs_idx_flat_b64": base64.b64encode(scored.top_ids.int().numpy().tobytes()).decode(),
        "input_top_logprobs_shape": [4, 2],
    }
    arrays = ASK.parse(answer, Endpoint(SERVER))
    assert torch.equal(arrays.top_ids, scored.top_ids)
    assert torch.allclose(arrays.top_log_probs, scored.top_log_probs)
    answer["meta_info"]["input_top_logprobs_shape"] = [3, 2]
    with pytest.raises(EngineError, match="without whole log-probabilities"):
        ASK.parse(answer, Endpoint(SERVER))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (changed("input_token_logprobs", 2, 1, value=32), "about other tokens than the 4"),
        (changed("input_token_ids_logprobs", 2, 1, 1, value=45), "about other tokens"),
        (changed("input_top_logprobs", 3, value=[[-0.43, 85, None]]), "without whole log-probabilities"),
        (changed("input_token_logprobs", 2, 0, value=None), "not finite"),
        (changed("input_token_logprobs", 2, 0, value=float("nan")), "not finite"),
        (changed("input_top_logprobs", 4, value=None), "without whole log-probabilities"),
        ({"meta_info": {"finish_reason": {"type": "abort", "message": "too long"}}}, "ended with .*too long"),
        ({"meta_info": {"finish_reason": {"type": "length"}}}, "KeyError: 'input_token_logprobs'"),
    ],
    ids=["other token", "other id", "too few likeliest", "no number", "NaN", "no likeliest", "abort", "no scores"],
)
def test_answer_that_is_not_whole_names_the_server(answer: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=f"{SERVER}: .*{message}"):
        ASK.parse(answer, Endpoint(SERVER))


def scored(server: str, log_probs: torch.Tensor) -> Scored:
    nothing = torch.zeros(len(log_probs), 0)
    return Scored(server, log_probs.double(), nothing.double(), nothing.long(), nothing.double())


LEARNT = -4 * torch.rand(40, generator=torch.Generator().manual_seed(1)) ** 3
VOCAB = 151_936
DUMMY = -math.log(VOCAB) + 0.04 * torch.randn(
    40, generator=torch.Generator().manual_seed(2)
)  # as SGLang's dummies at H = 4,096


@pytest.mark.parametrize(
    "values", [torch.full((40,), -math.log(VOCAB)), DUMMY, torch.full((40,), -3.0)], ids=["zeros", "dummies", "constant"]
)
def test_one_server_without_weights_among_others_is_named(values: torch.Tensor) -> None:
    check_informed([scored("http://a", LEARNT), scored("http://b", LEARNT)], VOCAB)
    with pytest.raises(EngineError, match=r"SGLang server http://b: .* it has no weights"):
        check_informed([scored("http://a", LEARNT), scored("http://b", values[:25]), scored("http://b", values[25:])], VOCAB)


def test_certain_teacher_and_few_tokens_are_no_sign_of_missing_weights() -> None:
    check_informed([scored("http://a", torch.zeros(40))], VOCAB)  # a repetitive response: every token is certain
    check_informed([scored("http://a", torch.full((15,), -math.log(VOCAB)))], VOCAB)
