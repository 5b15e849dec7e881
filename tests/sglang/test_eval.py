"""``megatron-opd eval`` on a real SGLang server has the figures of the training on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_opd.evaluation.results import read_results
from tests import runs
from tests.sglang.conftest import PYTHON

pytestmark = pytest.mark.sglang


def test_a_checkpoint_is_evaluated_on_a_server_as_it_was_in_training(tmp_path: Path) -> None:
    config = runs.make_inputs(tmp_path)
    config["run"]["steps"], config["optimizer"]["warmup_steps"] = 1, 0
    config["student"]["parallel"] = {}
    config["rollout"] |= {"backend": "sglang", "python": str(PYTHON), "max_batch_size": 2}
    config["mixture"]["teacher"] = 0
    config["eval"] |= {"samples": 3, "teacher": False}
    assert runs.run(tmp_path, config).returncode == 0
    last = runs.metrics(tmp_path / "run")[-1]
    arguments = ["--model", str(tmp_path / "run" / "checkpoints" / "iter_0000001"), "--out", str(tmp_path / "out")]
    result = runs.run(tmp_path, config, *arguments, command="eval")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]["heldout"]
    assert found["estimates"]["avg@3"]["mean"] == pytest.approx(last["eval/accuracy"])
    assert found["length_mean"] == pytest.approx(last["eval/length_mean"])
    results = read_results(tmp_path / "out" / "heldout.jsonl")
    assert len(results) == 8 * 3 and len({each.seed for each in results}) == 24
