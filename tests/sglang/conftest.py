"""The real SGLang on CPU, started once for the whole session. `make test-sglang` makes its environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_opd.sglang.server import Server, ServerSpec
from tests.tiny_models import make_model

PYTHON = Path(__file__).parents[2] / ".venv-sglang" / "bin" / "python"
START_UP_SECONDS = 600.0


def spec(model: Path, log: Path, tp: int = 1, **arguments: object) -> ServerSpec:
    return ServerSpec(
        name="student",
        python=str(PYTHON),
        model=model,
        tp=tp,
        dtype="float32",
        device="cpu",
        host="127.0.0.1",
        seed=1,
        arguments={"load_format": "dummy", **arguments},
        log=log,
    )


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sglang") / "model"
    make_model(folder, "qwen3", layers=4, hidden=128, seed=3, max_positions=256)
    return folder


@pytest.fixture(scope="session")
def servers(model: Path) -> Iterator[list[Server]]:
    """One of a single rank, one of two."""
    running = [Server(spec(model, model.parent / f"tp{tp}.log", tp)) for tp in (1, 2)]
    try:
        for server in running:
            server.wait_until_ready(START_UP_SECONDS)
        yield running
    finally:
        for server in running:
            server.stop()
