"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

import megatron_opd.mcore  # noqa: F401  # its CPU patches must stand before a worker's reply imports Megatron by name
from tests import runs
from tests.worker_pool import WorkerPool

torch.set_num_threads(1)  # the order of reductions, hence the last bits, depends on it
settings.register_profile("megatron_opd", deadline=None)  # a busy machine is no failure
settings.load_profile("megatron_opd")


class Table:
    """Measured figures, printed after the tests: what is claimed in the docs can be read off a run."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = {}

    def add(self, title: str, row: str, figure: str) -> None:
        self.rows.setdefault(title, {})[row] = figure


_TABLE = pytest.StashKey[Table]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = Table()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist, whose figures its parent prints
        session.config.workeroutput["table"] = session.config.stash[_TABLE].rows


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for title, rows in getattr(node, "workeroutput", {}).get("table", {}).items():
        node.config.stash[_TABLE].rows.setdefault(title, {}).update(rows)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, rows in config.stash[_TABLE].rows.items():
        terminalreporter.section(title)
        for row, figure in rows.items():
            terminalreporter.line(f"{row}  {figure}")


def pytest_report_header() -> str:
    return f"torch {version('torch')}, megatron-core {version('megatron-core')}"


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> Table:
    return pytestconfig.stash[_TABLE]


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("run")
    config = runs.make_inputs(folder)
    result = runs.run(folder, config)
    assert result.returncode == 0, result.stderr
    return folder, config, result.stdout
