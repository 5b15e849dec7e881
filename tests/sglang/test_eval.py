"""``megatron-opd eval`` on a real SGLang server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_opd.evaluation.results import read_results
from tests import runs
from tests.sglang.conftest import PYTHON

pytestmark = pytest.mark.sglang


def test_a_server_gets_the_models_weights_and_writes_every_response(tmp_path: Path) -> None:
    """The probe of the push compares what both sides say of a sequence; the server's draws do not follow seeds."""
    config = runs.make_inputs(tmp_path)
    config["student"]["parallel"] = {}
    config["rollout"] |= {"backend": "sglang", "python": str(PYTHON), "max_batch_size": 2, "max_engine_gap": 1.0e-3}
    config["eval"] |= {"samples": 3, "teacher": False}
    result = runs.run(tmp_path, config, "--out", str(tmp_path / "out"), command="eval")
    assert result.returncode == 0, result.stderr
    results = read_results(tmp_path / "out" / "heldout.jsonl")
    assert len({(each.uid, each.sample, each.seed) for each in results}) == len(results) == 8 * 3
    assert all(0 < each.length <= 12 for each in results)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]["heldout"]
    assert summary["items"] == 8 and sum(summary["outcomes"].values()) == 24
