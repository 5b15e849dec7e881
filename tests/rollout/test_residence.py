"""Memory by turns: an engine that fails is lost and the others go on; servers of somebody else are left alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_opd.config import Config
from megatron_opd.engines import build_engines
from megatron_opd.rollout.routed import RoutedEngine
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.sglang import residence
from megatron_opd.sglang.client import Endpoint, EngineError
from megatron_opd.sglang.residence import Residence
from megatron_opd.sglang.roster import Roster

FIRST, SECOND = Endpoint("http://127.0.0.1:1"), Endpoint("http://127.0.0.1:2")


class _Server:
    """In place of a client: what it was asked, by URL; those at the URLs in ``broken`` do it and do not answer."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, tuple[str, ...]]] = []
        self.broken: set[str] = set()
        self.closed = 0

    def connect(self, endpoint: Endpoint, timeout: float) -> Any:
        def post(path: str, *, tags: tuple[str, ...] = ()) -> None:
            self.asked.append((endpoint.url, path, tuple(tags)))
            if endpoint.url in self.broken and path.endswith("memory_occupation"):
                raise EngineError(f"SGLang server {endpoint.url}: {path}: no answer in {timeout:.0f} s")

        def close() -> None:
            self.closed += 1

        return SimpleNamespace(endpoint=endpoint, post=post, close=close)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> _Server:
    server = _Server()
    monkeypatch.setattr(residence, "Client", server.connect)
    return server


def test_engine_that_fails_to_sleep_or_wake_is_lost_and_forgotten_and_the_others_go_on(server: _Server) -> None:
    roster = Roster("student", [FIRST, SECOND])
    memory = Residence(5.0, roster)
    memory.release([FIRST, SECOND])
    server.broken.add(FIRST.url)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:1: /resume_memory_occupation: no answer in 5 s$"):
        memory.resume([FIRST, SECOND])
    assert roster.serving() == [SECOND] and server.closed == 4
    server.broken.clear()
    server.asked.clear()
    memory.resume([FIRST, SECOND])  # neither has anything to get back
    assert server.asked == []
    server.broken.add(SECOND.url)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:2: /release_memory_occupation"):
        memory.release([SECOND])
    assert roster.serving() == []


@pytest.mark.parametrize("urls", [[], [FIRST.url]])
def test_only_servers_that_the_run_started_sleep(urls: list[str]) -> None:
    config = Config.model_validate(
        {
            "run": {"name": "test", "dir": "nowhere"},
            "student": {"model": "student"},
            "teacher": {"model": "teacher", "backend": "sglang", "urls": urls},
            "rollout": {"backend": "sglang", "placement": "colocated"},
            "data": {"prompts": "nowhere"},
            "mixture": {"student": 0, "teacher": 1},
        }
    )
    folder = SimpleNamespace(path=Path("teacher"), config=SimpleNamespace(max_position_embeddings=8, vocab_size=9))
    inputs = SimpleNamespace(teachers={"": folder}, teacher_stop_ids={"": (1,)}, tokenizer=None)
    servers = SimpleNamespace(wait_until_ready=lambda: None, roster=lambda name: Roster(name, []), first_rank=None)
    parts: list[Any] = [inputs, None, None, servers]
    built = build_engines(config, *parts)
    assert isinstance(built.teacher, RoutedEngine)
    engine = built.teacher.engines[""]
    assert isinstance(engine, SGLangEngine) and (engine.residence is None) == bool(urls)
