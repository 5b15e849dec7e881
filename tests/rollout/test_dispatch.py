"""No request is lost or answered twice, whatever the engines do; every failure is bounded and names its culprit."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from megatron_opd.rollout.responses import whole_response
from megatron_opd.sglang.client import Endpoint, EngineError, Generated, Span, generation
from megatron_opd.sglang.dispatch import Ask, dispatch
from megatron_opd.sglang.roster import Roster
from megatron_opd.types import RunStopped, SamplingParams
from tests.rollout.faulty_server import FaultyServer, response_to

NEW_TOKENS = 6
PROMPTS = [[number, number + 1, 3] for number in range(24)]


def ask(prompt: Sequence[int]) -> Ask[Generated]:
    return whole_response(generation(prompt, SamplingParams(1.0, 1.0, NEW_TOKENS, (1,)), NEW_TOKENS, seed=5), NEW_TOKENS)


def check_all_answered(responses: Sequence[Generated], prompts: Sequence[Sequence[int]] = PROMPTS) -> None:
    assert [response.token_ids for response in responses] == [response_to(prompt, NEW_TOKENS) for prompt in prompts]
    assert all(response.log_probs == tuple(-float(token) for token in response.token_ids) for response in responses)


def run(*servers: FaultyServer, timeout: float = 60.0, in_flight: int = 4) -> tuple[list[Generated], dict[str, str]]:
    return dispatch(
        [ask(prompt) for prompt in PROMPTS], [each.endpoint for each in servers], in_flight=in_flight, timeout=timeout
    )


@pytest.mark.parametrize("fault", ["500", "503", "429", "reset", "half", "garbage", "no_logprobs", "abort_at_once"])
def test_failure_now_and_then_costs_an_attempt_and_no_engine(fault: str) -> None:
    with FaultyServer(lambda _, number: fault if number % 5 == 4 else "ok") as faulty, FaultyServer() as good:
        responses, lost = run(faulty, good)
        check_all_answered(responses)
        assert not lost
        assert sorted(faulty.answered + good.answered) == PROMPTS


@pytest.mark.parametrize("fault", ["500", "503", "reset", "half", "garbage", "no_logprobs"])
def test_engine_that_always_fails_is_lost_although_it_says_that_it_is_well(fault: str) -> None:
    with FaultyServer(lambda *_: fault) as faulty, FaultyServer(seconds=0.5) as good:
        responses, lost = run(faulty, good)
        check_all_answered(responses)
        assert sorted(good.answered) == PROMPTS
        assert list(lost) == [faulty.endpoint.url] and "requests failed there in a row" in lost[faulty.endpoint.url]


def test_the_only_engine_outlives_a_network_that_drops_all_connections_at_once() -> None:
    with FaultyServer(lambda _, number: "reset" if number < 8 else "ok") as only:
        responses, lost = run(only, in_flight=8)
        check_all_answered(responses)
        assert not lost and sorted(only.answered) == PROMPTS


def test_engine_that_starts_anew_is_lost_at_its_first_failure() -> None:
    with FaultyServer(lambda *_: "503", healthy=False) as starting, FaultyServer() as good:
        responses, lost = run(starting, good)
        check_all_answered(responses)
        assert "503" in lost[starting.endpoint.url] and len(starting.asked) <= 4


def test_requests_at_a_hung_engine_move_together_after_one_time_out() -> None:
    with FaultyServer(lambda _, number: "hang" if number >= 4 else "ok") as hung, FaultyServer() as good:
        start = time.monotonic()
        responses, lost = run(hung, good, timeout=5.0)
        assert time.monotonic() - start < 9.0  # one time-out, not two
        assert len(hung.asked) <= 8  # four answered, four in flight, and none after these
        check_all_answered(responses)
        assert lost == {hung.endpoint.url: f"SGLang server {hung.endpoint.url}: /generate: no answer in 5 s"}


def test_response_that_is_broken_off_is_continued_from_its_tokens() -> None:
    with FaultyServer(lambda body, _: "abort" if body["sampling_params"]["max_new_tokens"] == NEW_TOKENS else "ok") as old:
        responses, lost = run(old)
        check_all_answered(responses)
        assert not lost and all(response.finish == "length" for response in responses)
        half = NEW_TOKENS // 2
        assert {len(ids) for ids in old.asked} == {3, 3 + half}
        assert responses[0].spans == (Span(0, half, "1"), Span(half, NEW_TOKENS, "1"))


def test_half_of_a_lost_engines_response_is_kept_with_its_version() -> None:
    def dies(body: dict[str, object], number: int) -> str:
        return "abort" if number == 0 else "reset"

    with FaultyServer(dies, version="1") as dying, FaultyServer(version="2") as good:
        dying.healthy = False
        (response,), lost = dispatch([ask(PROMPTS[0])], [dying.endpoint, good.endpoint], in_flight=1, timeout=60.0)
        check_all_answered([response], PROMPTS[:1])
        assert list(lost) == [dying.endpoint.url]
        assert response.spans == (Span(0, 3, "1"), Span(3, NEW_TOKENS, "2"))


def test_request_that_fails_everywhere_is_named_and_the_engines_stay() -> None:
    poison = PROMPTS[7]
    servers = [FaultyServer(lambda body, _: "500" if body["input_ids"] == poison else "ok") for _ in range(2)]
    with servers[0], servers[1], pytest.raises(EngineError, match=r"request 7 \(3 tokens\) failed 3 times, at .*500"):
        run(*servers)
    assert sum(each.asked.count(poison) for each in servers) == 3
    assert {each.asked.count(poison) > 0 for each in servers} == {True}  # not three times at the same one


def test_request_that_ends_every_engine_does_not_end_more_than_three() -> None:
    poison = PROMPTS[0]
    servers = [FaultyServer(lambda body, _: "hang" if body["input_ids"] == poison else "ok") for _ in range(5)]
    for server in servers:
        server.__enter__()
    try:
        with pytest.raises(EngineError, match=r"request 0 .* failed 3 times.*no answer in 3 s"):
            run(*servers, timeout=3.0)
    finally:
        for server in servers:
            server.__exit__()


def test_refused_request_is_an_error_at_once() -> None:
    with FaultyServer(lambda *_: "400") as strict, pytest.raises(EngineError, match=r"/generate: 400 .*as it was told"):
        run(strict)
    assert len(strict.asked) <= 4


def test_last_engine_is_named_with_its_reason() -> None:
    with FaultyServer(lambda *_: "500", healthy=False) as only:
        roster = Roster("student", [only.endpoint])
        with pytest.raises(RunStopped, match=rf"no engine of the student is left \({only.endpoint.url}: .*500"):
            dispatch([ask(PROMPTS[0])], roster.serving(), in_flight=1, timeout=60.0, roster=roster)
        assert roster.serving() == []
    with pytest.raises(RunStopped, match="no engine is left"):
        dispatch([ask(PROMPTS[0])], [], in_flight=1, timeout=60.0)


def test_lost_engine_of_a_frozen_model_takes_requests_again_as_soon_as_it_is_back() -> None:
    with FaultyServer(lambda *_: "reset", healthy=False) as dead, FaultyServer() as replacement:
        roster = Roster("teacher", [dead.endpoint], frozen=True, patience=60.0)

        def back() -> None:
            while not roster.is_lost(dead.endpoint):
                time.sleep(0.01)
            time.sleep(0.3)
            roster.welcome(replacement.endpoint, instead_of=dead.endpoint)

        threading.Thread(target=back, daemon=True).start()
        asks = [ask(prompt) for prompt in PROMPTS]
        responses, lost = dispatch(asks, roster.serving(), in_flight=4, timeout=60.0, roster=roster)
        check_all_answered(responses)
        assert list(lost) == [dead.endpoint.url] and roster.serving() == [replacement.endpoint]


def test_busy_engines_leave_requests_to_one_that_is_back() -> None:
    with FaultyServer(lambda *_: "reset", healthy=False) as dead, FaultyServer(seconds=0.1) as busy, FaultyServer() as back:
        roster = Roster("teacher", [dead.endpoint, busy.endpoint], frozen=True, patience=60.0)

        def welcome() -> None:
            while not roster.is_lost(dead.endpoint):
                time.sleep(0.01)
            roster.welcome(back.endpoint, instead_of=dead.endpoint)

        threading.Thread(target=welcome, daemon=True).start()
        prompts = [[number, number + 1, 3] for number in range(60)]  # 6 s of one engine, never a second without an answer
        asks = [ask(prompt) for prompt in prompts]
        responses, _ = dispatch(asks, roster.serving(), in_flight=1, timeout=60.0, roster=roster)
        check_all_answered(responses, prompts)
        assert len(back.answered) > len(busy.answered)


def test_roster_gives_weights_before_requests() -> None:
    first, second, third = (Endpoint(f"http://127.0.0.1:{port}") for port in (1, 2, 3))
    roster = Roster("student", [first, second], patience=60.0)
    roster.lose(second, "test")
    roster.lose(second, "again: nothing happens")
    assert roster.serving() == roster.candidates() == [first]
    roster.welcome(third, instead_of=second)
    assert roster.serving() == [first] and roster.candidates() == [first, third]
    roster.admit([first, third])
    assert roster.serving() == [first, third] == roster.candidates()
    roster.lose(first, "test")
    roster.admit([first])  # lost while the weights were sent
    assert roster.serving() == [third]
    fourth = Endpoint("http://127.0.0.1:4")
    roster.welcome(fourth, instead_of=first)
    roster.admit([first, third])  # lost and replaced while the weights were sent
    assert roster.serving() == [third] and roster.candidates() == [third, fourth]


def test_next_weights_wait_for_the_only_engine_while_it_starts_and_no_longer() -> None:
    only = Endpoint("http://127.0.0.1:1")
    roster = Roster("student", [only], patience=1.0)
    roster.lose(only, "test")
    start = time.monotonic()
    assert roster.candidates() == []
    assert 0.9 < time.monotonic() - start < 5
    roster = Roster("student", [only], patience=600.0)
    roster.lose(only, "test")
    roster.give_up(only, "test")
    assert roster.candidates() == []


def test_patience_counts_from_the_last_start() -> None:
    only = Endpoint("http://127.0.0.1:1")
    roster = Roster("student", [only], patience=1.0)
    roster.lose(only, "test")
    threading.Timer(0.7, lambda: roster.restarted(only)).start()
    start = time.monotonic()
    assert roster.candidates() == []
    assert time.monotonic() - start > 1.5
