"""``--timeline``: the bars of the picture, read from the SVG's own elements, against the seconds in the table and the JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_opd import cli
from megatron_opd.planner.seconds import PHASES, StepSeconds
from megatron_opd.planner.timeline import write_timeline
from tests.planner.test_plan import write

SVG = "{http://www.w3.org/2000/svg}"
BESIDE = ("rollout.placement=disaggregated", "rollout.engines=2", "rollout.lag=1", "rollout.sglang.base_gpu_id=4")


@dataclass(frozen=True)
class Drawn:
    """A bar, in the picture's units."""

    phase: str
    part: str
    left: float
    right: float
    top: float
    color: str


def drawn(file: Path) -> list[Drawn]:
    """The bars in the order in which they are drawn."""
    found = []
    for group in ElementTree.parse(file).iter(f"{SVG}g"):
        phase, _, part = group.get("id", "").partition(": ")
        if phase not in PHASES:
            continue
        (path,) = group.iter(f"{SVG}path")
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", path.get("d", ""))]
        color = re.search(r"fill: (#\w+)", path.get("style", ""))
        assert color is not None
        found.append(Drawn(phase, part, min(numbers[::2]), max(numbers[::2]), min(numbers[1::2]), color[1]))
    return found


def seconds(file: Path, *options: str) -> tuple[dict[str, dict[str, float]], float]:
    """Plan, with a picture at ``file``: the seconds of each phase's parts and of the step."""
    out = file.with_suffix(".json")
    command = ["plan", str(write(file.parent)), *options, "--nodes", "2", "--gpus-per-node", "4", "--gpu", "cpu"]
    assert cli.main([*command, "--json", str(out), "--timeline", str(file)]) == 0
    found = json.loads(out.read_text())["seconds"]
    return found["phases"], found["step"]


def test_bars_are_the_seconds_one_after_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases, step = seconds(tmp_path / "step.svg")
    bars = drawn(tmp_path / "step.svg")
    expected = [(phase, part, value) for phase in PHASES for part, value in phases[phase].items() if value]
    assert [(bar.phase, bar.part) for bar in bars] == [(phase, part) for phase, part, _ in expected]
    scale = step / (bars[-1].right - bars[0].left)
    for bar, (_, _, value) in zip(bars, expected, strict=True):
        assert (bar.right - bar.left) * scale == pytest.approx(value, abs=1e-5 * step)
    assert all(after.left == pytest.approx(before.right, abs=1e-5) for before, after in pairwise(bars))
    assert {bar.top for bar in bars if bar.phase == "rollout"}.isdisjoint(bar.top for bar in bars if bar.phase != "rollout")
    assert len({bar.color for bar in bars}) == len({bar.phase for bar in bars}) == 4
    table = capsys.readouterr().out.split("seconds of a step\n")[1].splitlines()
    shown = {line[:11].strip(): line[11:].split()[0] for line in table[: table.index("")] if not line.startswith(" " * 11)}
    own = {phase.replace("_", " "): f"{sum(parts.values()):.1f}" for phase, parts in phases.items()}
    assert shown == {**own, "step": f"{step:.1f}"}
    assert sum(float(value) > 0 for value in own.values()) > 1


def test_rollouts_of_the_next_step_lie_over_the_training(tmp_path: Path) -> None:
    phases, step = seconds(tmp_path / "step.svg", *BESIDE)
    bars = drawn(tmp_path / "step.svg")
    rollout, training, sync = (
        [bar for bar in bars if bar.phase in names] for names in (("rollout",), ("score", "train"), ("weight_sync",))
    )
    assert rollout[0].left == pytest.approx(training[0].left, abs=1e-5)
    assert training[0].phase == "score" and training[-1].phase == "train"
    assert sync[0].left == pytest.approx(max(rollout[-1].right, training[-1].right), abs=1e-5)
    rollouts, others = (sum(sum(phases[name].values()) for name in names) for names in (("rollout",), ("score", "train")))
    assert step == pytest.approx(max(rollouts, others) + sum(phases["weight_sync"].values()))
    scale = step / (sync[-1].right - rollout[0].left)
    assert (rollout[-1].right - rollout[0].left) * scale == pytest.approx(rollouts, abs=1e-5 * step)
    assert (training[-1].right - training[0].left) * scale == pytest.approx(others, abs=1e-5 * step)


def test_png(tmp_path: Path) -> None:
    """1500 by 390 pixels, each phase's colour among them."""
    parts = {phase: {"part": 1.0} for phase in PHASES}
    write_timeline(StepSeconds(parts, overlapped=False), "title", tmp_path / "step.png")
    write_timeline(StepSeconds(parts, overlapped=False), "title", tmp_path / "step.svg")
    picture = imread(tmp_path / "step.png")
    assert picture.shape[:2] == (390, 1500)
    colors, counts = np.unique((picture[..., :3].reshape(-1, 3) * 255).round().astype(int), axis=0, return_counts=True)
    found = {tuple(color): count for color, count in zip(colors.tolist(), counts.tolist(), strict=True)}
    for number, bar in enumerate(drawn(tmp_path / "step.svg")):
        solid = (int(bar.color[place : place + 2], 16) for place in (1, 3, 5))
        shade = tuple(value if number % 2 else round(0.75 * value + 0.25 * 255) for value in solid)
        assert found.get(shade, 0) > 10_000, bar
