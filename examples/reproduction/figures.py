"""The curves of the runs in the tables → docs/reproduction/*.png.

python -m examples.reproduction.figures
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from examples.reproduction.arms import EVERY, GROUPS
from examples.reproduction.table import RESULTS, done, metrics

_WINDOW = 5  # steps, of the running mean over rollouts
PANELS = {
    "rollout/truncation_rate": "truncation rate of the rollouts",
    "rollout/length_mean": "length of the rollouts, tokens",
    "rollout/repeated_ngrams": "repeated 4-grams of the rollouts",
    "eval/accuracy": "held-out accuracy",
}


def main() -> None:
    """A figure stays as it was where one of its table's runs is not there any more."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for group in GROUPS:
        names = [row["name"] for row in results[group]]
        if names and all(done(name, pair) for name in names for pair in EVERY[name].pairs):
            draw(names, RESULTS.with_name(f"{group}.png"))


def draw(names: Sequence[str], target: Path) -> None:
    """One colour an arm, one line a pair."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (metric, title) in zip(axes.flat, PANELS.items(), strict=True):
        for index, name in enumerate(names):
            for number, pair in enumerate(EVERY[name].pairs):
                steps, values = curve(metrics(name, pair), metric)
                label = EVERY[name].title if number == 0 else None
                axis.plot(steps, values, color=f"C{index}", linewidth=1.2, alpha=0.85, label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.2)
    figure.legend(*axes.flat[3].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(target, dpi=90)
    plt.close(figure)


def curve(records: Iterable[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    points = [(each["step"], each[metric]) for each in records if each.get(metric) is not None]
    values = [value for _, value in points]
    if metric.startswith("rollout/"):
        values = [statistics.fmean(values[max(0, end - _WINDOW) : end]) for end in range(1, len(values) + 1)]
    return [step for step, _ in points], values


if __name__ == "__main__":
    main()
