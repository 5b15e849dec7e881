"""The runs that are there → docs/reproduction/results.json, and the tables inside docs/reproduction.md.

Of runs that are not there, what an earlier call with the same recipe has left in results.json stays.

python -m examples.reproduction.table
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from examples.reproduction.arms import ARMS, CONFIG, EVERY, GROUPS, PAIRS, run_folder
from examples.reproduction.depth import DEPTHS, goes_on
from examples.reproduction.early_warning import by_group, early_warning, early_warning_summary, early_warning_table
from examples.reproduction.final import Response, read_responses
from examples.reproduction.make_models import HERE, WORK

DOCS = HERE.parents[1] / "docs"
PAGE = DOCS / "reproduction.md"
RESULTS = DOCS / "reproduction" / "results.json"
_WINDOW = 5  # steps: a step has 32 rollouts, so its truncation rate alone jumps
_RESAMPLES = 10_000
_REPEATED = ("repeated_weight", "advantage_repeated", "advantage_regular")
_SPANS = ((1, 10), (11, 20), (21, 40), (41, 120))  # steps

Row = dict[str, Any]


def main() -> None:
    earlier = earlier_results()
    groups = {name: rows_of(group, earlier.get(name, [])) for name, group in GROUPS.items()}
    results: dict[str, Any] = {
        "recipe": CONFIG.read_text(encoding="utf-8"),
        "models": updated(earlier.get("models", []), models(), "name"),
        **groups,
        "depth": updated(earlier.get("depth", []), depth(), "model"),
        "repeated": updated(earlier.get("repeated", []), repeated(), "title", "steps"),
        "early_warning": by_group(updated(earlier.get("early_warning", []), early_warning(), "group", "title", "pair")),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tables = {"models": models_table(results["models"]), "depth": depth_table(results["depth"])}
    tables["repeated"] = repeated_table(results["repeated"])
    tables["early_warning"] = early_warning_table(results["early_warning"])
    tables["early_warning_summary"] = early_warning_summary(results["early_warning"])
    tables |= {f"{name}_course": course_table(groups[name]) for name in ("seasoned", "slips")}
    tables |= {name: runs_table(rows) for name, rows in groups.items()}
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        page = put(page, name, table)
    PAGE.write_text(page, encoding="utf-8")
    print("\n\n".join(tables[name] for name in groups))


def earlier_results() -> dict[str, Any]:
    """Nothing where they are of another opd.yaml."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return found if found.get("recipe") == CONFIG.read_text(encoding="utf-8") else {}


def updated(earlier: Sequence[Row], rows: Sequence[Row], *keys: str) -> list[Row]:
    """Rows that agree in ``keys`` are of the same run."""
    return list({tuple(each[key] for key in keys): each for each in (*earlier, *rows)}.values())


def models() -> list[Row]:
    """What the runs begin with."""
    rows = []
    for name in ("teacher", "student"):
        files = [WORK / f"pair-{pair}" / f"{name}.responses.jsonl" for pair in PAIRS]
        if all(file.exists() for file in files):
            rows.append({"name": name, **figures([read_responses(file) for file in files])})
    return rows


def rows_of(names: Iterable[str], earlier: Sequence[Row]) -> list[Row]:
    """Of those whose runs are all done, here or when ``earlier`` was written."""
    kept = {each["name"]: each for each in earlier}
    rows = []
    for name in names:
        if all(done(name, pair) and done(EVERY[name].baseline, pair) for pair in EVERY[name].pairs):
            rows.append(row(name))
        elif name in kept and (kept[name]["recipe"], kept[name]["pairs"]) == (recipe(name), list(EVERY[name].pairs)):
            rows.append(kept[name])
    return rows


def recipe(name: str) -> list[str]:
    """What tells the arm's runs from others."""
    arm = EVERY[name]
    return [*arm.overrides, arm.student, arm.teacher, arm.prompts, *(["own heldout"] if arm.own_heldout else [])]


def done(name: str, pair: int) -> bool:
    return (run_folder(name, pair) / "done.json").exists()


def depth() -> list[Row]:
    """How likely one more check is: of every pair's models at the start, and of the first pair's student after each arm."""
    folders = {f"{name}, pair {pair}": WORK / f"pair-{pair}" / name for name in ("teacher", "student") for pair in PAIRS}
    folders |= {f"student, pair 0, after {EVERY[name].title}": run_folder(name, 0) / "hf" for name in ARMS}
    return [{"model": name, "goes_on": goes_on(folder)} for name, folder in folders.items() if folder.is_dir()]


def repeated() -> list[Row]:
    """Advantages on repeated and on other tokens of the first pair's rollouts, in means over some steps."""
    rows = []
    for name in ("opd", "stableopd"):
        if not done(name, 0):
            continue
        records = metrics(name, 0)
        for first, last in _SPANS:
            steps = [each for each in records if first <= each["step"] <= last]
            figures = {figure: statistics.fmean(each[f"policy/{figure}"] for each in steps) for figure in _REPEATED}
            rows.append({"title": EVERY[name].title, "steps": f"{first} to {last}", **figures})
    return rows


def row(name: str) -> Row:
    """One arm over its pairs."""
    pairs = EVERY[name].pairs
    final = [final_responses(name, pair) for pair in pairs]
    baseline = EVERY[name].baseline
    plain = [final_responses(baseline, pair) for pair in pairs]
    return {
        "name": name,
        "title": EVERY[name].title,
        "recipe": recipe(name),
        "pairs": list(pairs),
        **figures(final),
        "over_opd": None if name == baseline else difference(final, plain),
        "truncation_above_half": [above_half(metrics(name, pair)) for pair in pairs],
        "start_accuracy": [accuracies(name, pair)[0] for pair in pairs],
        "best_accuracy": [max(accuracies(name, pair)) for pair in pairs],
        "minutes": [
            json.loads((run_folder(name, pair) / "done.json").read_text(encoding="utf-8"))["seconds"] / 60 for pair in pairs
        ],
    }


def figures(final: Sequence[Sequence[Response]]) -> Row:
    """Of each pair, in their order."""
    return {
        figure: [statistics.fmean(getattr(each, field) for each in responses) for responses in final]
        for figure, field in (
            ("accuracy", "correct"),
            ("truncation", "truncated"),
            ("length", "length"),
            ("repeated_ngrams", "repeated"),
        )
    }


def difference(arm: Sequence[Sequence[Response]], plain: Sequence[Sequence[Response]]) -> dict[str, float]:
    """Of the accuracies, with a 95 % bootstrap interval: pairs are drawn, then problems, alike for both arms."""
    rng = np.random.default_rng(0)
    gains = np.array(
        [[int(a.correct) - int(b.correct) for a, b in zip(*both, strict=True)] for both in zip(arm, plain, strict=True)]
    )  # [pairs, problems]
    pairs, problems = gains.shape
    drawn = []
    for _ in range(_RESAMPLES):
        of_pairs = rng.integers(pairs, size=(pairs, 1))
        drawn.append(gains[of_pairs, rng.integers(problems, size=(pairs, problems))].mean())
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"mean": float(gains.mean()), "low": float(low), "high": float(high)}


def above_half(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The first step at which the mean truncation rate of the last steps' rollouts is above one half."""
    rates = [
        (each["step"], each["rollout/truncation_rate"]) for each in records if each.get("rollout/truncation_rate") is not None
    ]
    for end in range(_WINDOW, len(rates) + 1):
        if statistics.fmean(rate for _, rate in rates[end - _WINDOW : end]) > 0.5:
            return int(rates[end - 1][0])
    return None


def accuracies(name: str, pair: int) -> list[float]:
    """Of 64 held-out problems, in the course of the run."""
    return [each["eval/accuracy"] for each in metrics(name, pair) if "eval/accuracy" in each]


def metrics(name: str, pair: int) -> list[dict[str, Any]]:
    text = (run_folder(name, pair) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def final_responses(name: str, pair: int) -> list[Response]:
    return read_responses(run_folder(name, pair) / "responses.jsonl")


def models_table(rows: Sequence[Row]) -> str:
    lines = ["| model | accuracy | truncation | length | repeated 4-grams |", "|---|---|---|---|---|"]
    for each in rows:
        lines.append(f"| {each['name']} | {_cells(each)} |")
    return "\n".join(lines)


def course_table(rows: Sequence[Row]) -> str:
    """What was reached on the way, and what was kept."""
    lines = ["| run | start | best on the way | end |", "|---|---|---|---|"]
    for each in rows:
        cells = [_cell(each[figure], 2) for figure in ("start_accuracy", "best_accuracy", "accuracy")]
        lines.append(f"| {each['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def depth_table(rows: Sequence[Row]) -> str:
    lines = [f"| one more check after | {' | '.join(map(str, DEPTHS))} |", f"|---{'|---' * len(DEPTHS)}|"]
    lines += [f"| {each['model']} | {' | '.join(f'{value:.2f}' for value in each['goes_on'])} |" for each in rows]
    return "\n".join(lines)


def repeated_table(rows: Sequence[Row]) -> str:
    lines = ["| arm | steps | share of repeated tokens | advantage on them, nats | on the others |", "|---|---|---|---|---|"]
    for each in rows:
        share, on_them, on_others = (each[figure] for figure in _REPEATED)
        lines.append(f"| {each['title']} | {each['steps']} | {share:.2f} | {on_them:.3f} | {on_others:.3f} |")
    return "\n".join(lines)


def runs_table(rows: Sequence[Row]) -> str:
    lines = [
        "| run | accuracy | over OPD (95 %) | truncation | length | repeated 4-grams | truncation > 0.5 at step |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        accuracy, *others = _cells(each).split(" | ")
        gain = each["over_opd"]
        over = "" if gain is None else f"{gain['mean']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})"
        steps = ", ".join("never" if step is None else str(step) for step in each["truncation_above_half"])
        lines.append(f"| {each['title']} | {' | '.join([accuracy, over, *others, steps])} |")
    return "\n".join(lines)


def put(page: str, name: str, table: str) -> str:
    """The table between the page's marks of this name."""
    before, _, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    return f"{before}<!-- {name} -->\n{table}\n{end}{after}" if end else page


def _cells(each: Row) -> str:
    """Mean, and each pair's own value."""
    digits = {"accuracy": 2, "truncation": 2, "length": 0, "repeated_ngrams": 2}
    return " | ".join(_cell(each[figure], count) for figure, count in digits.items())


def _cell(values: Sequence[float], digits: int) -> str:
    own = " / ".join(f"{value:.{digits}f}" for value in values)
    return f"**{statistics.fmean(values):.{digits}f}** ({own})" if len(values) > 1 else own


if __name__ == "__main__":
    main()
