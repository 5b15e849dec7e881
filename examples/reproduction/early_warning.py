"""How early the collapse monitor warns, and how often without need.

Its threshold was chosen on the first pair's runs of the five arms; all others had no part in that.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.reproduction.arms import GROUPS, run_folder
from examples.reproduction.make_models import HERE

# Not actions, which act on it.
_GROUPS = ("arms", "eager", "seasoned", "slips", "controls", "end_tokens", "unsure_ends", "options")
_CHOSEN_ON = 0  # the pair
_FALL = 0.15  # of held-out accuracy below its start, which errs by 0.06
# Responses that grow because working appears, and end: `make demo`.
_DEMO = HERE.parents[1] / "runs" / "demo" / "metrics.jsonl"

Row = dict[str, Any]
Records = Sequence[Mapping[str, Any]]


def early_warning() -> list[Row]:
    """A row for each run with rollouts that is there."""
    rows = []
    for group in _GROUPS:
        for name, arm in GROUPS[group].items():
            for pair in arm.pairs:
                folder = run_folder(name, pair)
                if (folder / "done.json").exists() and (records := _read(folder / "metrics.jsonl")):
                    chosen = group == "arms" and pair == _CHOSEN_ON
                    rows.append({"title": arm.title, "group": group, "pair": pair, "chosen_on": chosen, **_measure(records)})
    if _DEMO.exists():
        demo = {"title": "make demo", "group": "demo", "pair": None, "chosen_on": False}
        rows.append({**demo, **_measure(_read(_DEMO))})
    return rows


def by_group(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: [*_GROUPS, "demo"].index(row["group"]))


def early_warning_table(rows: Sequence[Row]) -> str:
    lines = [
        "| run | pair | accuracy, end less start | truncation at the end | warned at step | down by 0.15 at step | largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = ["" if row[key] is None else str(row[key]) for key in ("pair", "warned", "fallen")]
        mark = " (chosen on)" if row["chosen_on"] else ""
        title = row["title"] + (f" ({row['group']})" if row["group"] in ("eager", "seasoned", "slips") else "")
        pair, warned, fallen = cells[0], cells[1] or "never", cells[2] or "never"
        figures = f"{row['change']:+.2f} | {row['truncation']:.2f}"
        lines.append(f"| {title}{mark} | {pair} | {figures} | {warned} | {fallen} | {row['largest']:.2f} |")
    return "\n".join(lines)


def early_warning_summary(rows: Sequence[Row]) -> str:
    """Of the runs that had no part in the choice of the threshold, those on other models and seeds by themselves."""
    others = [row for row in rows if not row["chosen_on"]]
    elsewhere = [row for row in others if row["pair"] != _CHOSEN_ON]
    same = [row for row in others if row["pair"] == _CHOSEN_ON]
    return f"On other pairs and in `make demo`: {_counts(elsewhere)}\n\nOn the same pair under other recipes: {_counts(same)}"


def _counts(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row["change"] < -_FALL]
    sound = [row for row in rows if row["change"] >= -_FALL]
    warned = [row for row in failed if row["warned"] is not None]
    leads = [row["fallen"] - row["warned"] for row in warned if row["fallen"] is not None]
    false = [row for row in sound if row["warned"] is not None]
    lead = ""
    if leads:
        median, listed = statistics.median(leads), ", ".join(map(str, sorted(leads)))
        early = sum(each > 0 for each in leads)
        lead = (
            f", {early} before accuracy was down by that much; the median lead is {median:g} steps "
            f"({listed}; 0 or less: not before)"
        )
    return (
        f"of {len(failed)} that end more than {_FALL} below the accuracy of their start, {len(warned)} were warned of{lead}; "
        f"of {len(sound)} others, {len(false)}."
    )


def _measure(records: Records) -> Row:
    accuracies = [each["eval/accuracy"] for each in records if "eval/accuracy" in each]
    start = accuracies[0]
    steps = [each for each in records if each.get("rollout/truncation_rate") is not None]
    return {
        "warned": _first(records, lambda each: (each.get("monitors/collapse") or 0.0) >= 1.0),
        "fallen": _first(records, lambda each: each.get("eval/accuracy", start) < start - _FALL),
        "change": accuracies[-1] - start,
        "largest": max((each.get("monitors/collapse") or 0.0) for each in records),
        "truncation": statistics.fmean(each["rollout/truncation_rate"] for each in steps[-10:]),
    }


def _first(records: Records, condition: Callable[[Mapping[str, Any]], bool]) -> int | None:
    return next((int(each["step"]) for each in records if condition(each)), None)


def _read(file: Path) -> list[dict[str, Any]]:
    """Nothing where the student wrote nothing."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return records if any(each.get("rollout/truncation_rate") is not None for each in records) else []
