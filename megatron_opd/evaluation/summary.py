"""What an evaluation found: for summary.json and for people."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO, get_args

from rich.console import Console
from rich.table import Table

from megatron_opd.config import MonitorsConfig
from megatron_opd.evaluation.estimates import Difference, Estimate, Item, bootstrap, majority, paired_difference, pass_at
from megatron_opd.evaluation.maths import Outcome
from megatron_opd.evaluation.results import Result, items, read_results
from megatron_opd.monitoring.repetition import repetition_rate
from megatron_opd.types import OpdError

_PLAIN_WIDTH = 150  # columns, where no terminal says how many there are


@dataclass(frozen=True)
class TaskSummary:
    """One task. A rate is None where there was nothing to measure."""

    items: int
    samples: int  # of each item
    estimates: dict[str, Estimate]  # pass@1, pass@2, pass@4, ..., avg@n, maj@n
    truncation_rate: float
    repetition_rate: float | None  # of the responses that are longer than monitors.repetition_tail_chars
    repeated_ngrams: float | None
    length_mean: float  # tokens
    outcomes: dict[Outcome, int]  # of the verification, in responses


def summarise(results: Sequence[Result], samples: int, monitors: MonitorsConfig, seed: int) -> TaskSummary:
    """Of at least one item, each with ``samples`` results."""
    of_items = items(results)
    counts = Counter(result.outcome for result in results)
    ngrams = [result.repeated_ngrams for result in results if result.repeated_ngrams is not None]
    texts = [result.text for result in results]
    return TaskSummary(
        items=len(of_items),
        samples=samples,
        estimates=_estimates(of_items, samples, seed),
        truncation_rate=statistics.fmean(result.finish_reason == "length" for result in results),
        repetition_rate=repetition_rate(texts, monitors.repetition_tail_chars, monitors.repetition_threshold),
        repeated_ngrams=statistics.fmean(ngrams) if ngrams else None,
        length_mean=statistics.fmean(result.length for result in results),
        outcomes={outcome: counts[outcome] for outcome in get_args(Outcome)},
    )


def _estimates(of_items: Sequence[Item], samples: int, seed: int) -> dict[str, Estimate]:
    """pass@1 is what avg@n is, by definition; both names are there to be looked for."""
    ks = [k for k in (2**power for power in range(samples.bit_length())) if k < samples] + [samples]
    found = {f"pass@{k}": bootstrap([pass_at(item, k) for item in of_items], seed) for k in ks}
    if samples > 1:
        found[f"avg@{samples}"] = bootstrap([item.accuracy for item in of_items], seed)
        found[f"maj@{samples}"] = bootstrap([majority(item) for item in of_items], seed)
    return found


def compare(ours: Sequence[Result], theirs: Path, seed: int) -> Difference | None:
    """With the same task in another evaluation's file; None where no item is in both. Raises OpdError where items differ."""
    other = read_results(theirs)
    answers = {result.uid: result.answer for result in other}
    for result in ours:
        if answers.get(result.uid, result.answer) != result.answer:
            raise OpdError(
                f"--against: item {result.uid} has the answer {answers[result.uid]!r} in {theirs}, {result.answer!r} here; "
                "compare evaluations of the same file"
            )
    mine, others = ({item.uid: item.accuracy for item in items(each)} for each in (ours, other))
    return paired_difference(mine, others, seed)


def as_json(
    summaries: Mapping[str, TaskSummary], against: str | None, differences: Mapping[str, Difference]
) -> dict[str, object]:
    tasks = {name: asdict(summary) for name, summary in summaries.items()}
    compared = {"path": against, "tasks": {name: asdict(each) for name, each in differences.items()}}
    return {"tasks": tasks, **({"against": compared} if against is not None else {})}


def print_summary(
    title: str, summaries: Mapping[str, TaskSummary], differences: Mapping[str, Difference], stream: TextIO
) -> None:
    """The tables as they stand, in colours on a terminal alone."""
    console = Console(file=stream, width=None if stream.isatty() else _PLAIN_WIDTH, highlight=False)
    console.print(title, markup=False)
    table = Table()
    for heading in ("task", "items", "figure", "value", "95 % interval"):
        table.add_column(heading, justify="left" if heading in ("task", "figure") else "right", no_wrap=True)
    for name, summary in summaries.items():
        rows = [(figure, f"{each.mean:.1%}", _interval(each)) for figure, each in summary.estimates.items()]
        rows += [("TruncRate", f"{summary.truncation_rate:.1%}", ""), ("RepRate", _share(summary.repetition_rate), "")]
        rows += [("repeated n-grams", _share(summary.repeated_ngrams), ""), ("mean length", f"{summary.length_mean:.1f}", "")]
        rows += [(outcome, str(count), "") for outcome, count in summary.outcomes.items() if outcome != "ok"]
        for number, row in enumerate(rows):
            table.add_row(*((name, str(summary.items)) if number == 0 else ("", "")), *row, end_section=number == len(rows) - 1)
    console.print(table)
    for name, difference in differences.items():
        console.print(
            f"{name}: {difference.estimate.mean:+.1%} {_interval(difference.estimate, '+')} against the other evaluation, over "
            f"{difference.items} items: {difference.won} won, {difference.lost} lost",
            markup=False,
        )


def _interval(estimate: Estimate, sign: str = "") -> str:
    return f"[{estimate.low:{sign}.1%}, {estimate.high:{sign}.1%}]"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
