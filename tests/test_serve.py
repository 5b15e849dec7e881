"""`megatron-opd serve` refuses what it cannot be, before it starts anything. tests/sglang/test_serve.py starts servers."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_opd import cli
from megatron_opd.config_file import validate_config
from megatron_opd.mcore.platform import Platform
from megatron_opd.serve import serve
from megatron_opd.types import OpdError
from tests import runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("serve")
    config = runs.make_inputs(folder)
    (folder / "key").write_text("a key of ours\n")
    (folder / "empty").write_text("\n")
    config["mixture"]["teacher"] = 0
    config["eval"]["teacher"] = False
    config["rollout"] |= {"backend": "sglang", "host": "10.0.0.6", "api_key_file": str(folder / "key")}
    config["rollout"]["urls"] = ["http://127.0.0.1:30000", "http://192.0.2.1:30000"]
    (folder / "served.yaml").write_text(yaml.safe_dump(config))
    return folder, config


@pytest.mark.parametrize(
    ("number", "override", "expected"),
    [
        (2, "", ["--number: 2", "from 0 to 1"]),
        (-1, "", ["--number: -1", "from 0 to 1"]),
        (0, "rollout={backend: sglang}", ["rollout.urls: empty", "give the URLs"]),
        (0, "rollout.api_key_file=null", ["rollout.api_key_file: not set", "give a text file"]),
        (0, "rollout.api_key_file=/nowhere/key", ["rollout.api_key_file: /nowhere/key cannot be read"]),
        (0, "rollout.api_key_file=FOLDER/empty", ["rollout.api_key_file: ", "is empty"]),
        (0, "rollout.urls=[https://127.0.0.1:30000]", ["rollout.urls: https://127.0.0.1:30000", "no certificate", "http://"]),
        (0, "rollout.urls=[http://no.such.host.invalid:30000]", ["rollout.urls: http://no.such", "IPv4", "give the address"]),
        (0, "rollout.urls=[http://127.0.0.2:30000]", ["rollout.urls: http://127.0.0.2:30000", "no other machine", "network"]),
        (1, "", ["rollout.urls: http://192.0.2.1:30000", "cannot listen at 192.0.2.1:30000", "on the machine that it names"]),
        (0, "rollout.urls=[http://127.0.0.1:TAKEN]", ["rollout.urls: http://127.0.0.1:", "cannot listen at", "has the port"]),
        (0, "student.model=/nowhere", ["/nowhere"]),
        (0, "rollout.python=/nowhere/python", ["rollout.python: /nowhere/python cannot be run"]),
        (0, "", ["rollout.python", "no package sglang", "install sglang==0.5.21"]),
    ],
)
def test_bad_input_is_one_line_with_key_value_and_remedy(
    inputs: tuple[Path, dict[str, Any]], number: int, override: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = inputs
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        override = override.replace("FOLDER", str(folder)).replace("TAKEN", str(taken.getsockname()[1]))
        code = cli.main(["serve", str(folder / "served.yaml"), f"--number={number}", *([override] if override else [])])
    stderr = capsys.readouterr().err
    assert code == 2
    assert stderr.count("\n") == 1, stderr
    assert not [fragment for fragment in expected if fragment not in stderr], stderr


def test_a_machine_with_too_few_gpus_is_named(inputs: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = inputs
    config = {**config, "rollout": {**config["rollout"], "tp": 2}}
    config["rollout"]["urls"] = [f"http://127.0.0.1:{port}" for port in (30000, 30001, 30002)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    with pytest.raises(OpdError, match=r"http://127.0.0.1:30002 would have the GPUs 4 to 5 of \S+, where 5 are visible"):
        serve(validate_config(config), Platform(torch.device("cuda"), "nccl", False), 2)
