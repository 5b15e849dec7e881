from __future__ import annotations

import io
import math
from pathlib import Path

import pytest

from megatron_opd.monitoring import TrainingConsole, summary_table, write_samples
from megatron_opd.types import Source
from tests.data.factories import make_prompt, make_rollout

RECORD = {
    "loss": -0.25,
    "loss/reference_kl": 0.0125,
    "rollout/accuracy": 0.5,
    "rollout/length_mean": 41.4,
    "rollout/truncation_rate": 0.125,
    "tokens_per_second": 12345.6,
    "mixture/student_share_of_weight": 10 / 11,
    "mixture/gold_share_of_weight": 1 / 11,
    "grad_norm": 3.0,
}
NUMBERS = (
    "loss -0.2500  accuracy 50.0%  length 41  truncated 12%  rollout weight 90.9%  gold weight 9.1%  ref KL 0.0125  "
    "tokens/s 12,346"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, total: int, start: int = 0) -> str:
    with TrainingConsole(total, start, stream) as console:
        for done in range(start + 1, total + 1):
            console.update(done, RECORD)
            if done == start + 2:
                console.message("alarm [bold]x[/bold] \n" + "long " * 40)
    return stream.getvalue()


def test_a_pipe_gets_plain_lines_without_control_characters() -> None:
    output = run(io.StringIO(), 3)
    assert output.replace("\n", "").isprintable()
    lines = output.splitlines()
    assert lines[0].startswith(f"step 1/3  {NUMBERS}  time left 0:00:0")
    assert lines[-1] == f"step 3/3  {NUMBERS}  time left 0:00:00"


def test_a_long_run_prints_some_twenty_lines_with_the_first_and_the_last() -> None:
    lines = [line for line in run(io.StringIO(), 499, start=100).splitlines() if line.startswith("step")]
    assert 20 <= len(lines) <= 24
    assert lines[0].startswith("step 101/499")
    assert lines[-1].startswith("step 499/499")


def test_a_terminal_gets_a_bar_and_messages_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    output = run(Terminal(), 3)
    assert "3/3" in output
    assert "loss -0.2500" in output
    assert "alarm [bold]x[/bold]" in output


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in run(Terminal(), 3)


def test_what_a_step_has_not_measured_is_left_out_and_nan_is_shown() -> None:
    stream = io.StringIO()
    with TrainingConsole(1, 0, stream) as console:
        console.update(1, {"loss": math.nan, "rollout/accuracy": None})
    assert stream.getvalue() == "step 1/1  loss nan  time left 0:00:00\n"


def test_the_summary_is_aligned() -> None:
    assert summary_table("Done", [("step", "60"), ("checkpoint", "runs/a")]) == "Done\n  step        60\n  checkpoint  runs/a"
    assert summary_table("Done", []) == "Done"


def test_samples_show_prompts_and_responses_as_they_stand(tmp_path: Path) -> None:
    first, second, third = (make_prompt(uid, answer=a) for uid, a in (("a", "5"), ("b", None), ("c", None)))
    rollouts = [
        make_rollout(prompt=first, text="2 < 3 & *so* `5`\r\n", tokens=6),
        make_rollout(prompt=second, text="\ufffd \N{GRINNING FACE} \ud800 \u202e", finish_reason="length"),
        make_rollout(Source.GOLD, prompt=first, text="gold"),
        make_rollout(prompt=third, text="beyond the count"),
    ]
    file = write_samples(tmp_path, 10, rollouts, [True, None, None, False], count=2)
    assert file == tmp_path / "samples" / "step_000010.txt"
    text = file.read_bytes().decode("utf-8")
    assert "======== prompt a, answer: 5\ntext of a\n" in text
    assert "-------- student: 6 tokens, finish reason stop, right\n2 < 3 & *so* `5`\r\n\n" in text
    assert "-------- gold: 4 tokens, finish reason stop\ngold\n" in text
    assert "finish reason length\n\ufffd \N{GRINNING FACE} \\ud800 \u202e\n" in text
    assert text.index("gold") < text.index("prompt b")  # grouped by prompt
    assert "beyond the count" not in text


def test_samples_need_no_flags(tmp_path: Path) -> None:
    text = write_samples(tmp_path, 0, [make_rollout(text="x")], None, count=4).read_text()
    assert "right" not in text
    assert "wrong" not in text
