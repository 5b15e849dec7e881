"""What a report shows: one table of panels, which the page and the PNG files both draw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["lines", "fan", "heat", "stack"]
Unit = Literal["share", "nats", "tokens", "seconds", "tokens/s", "steps", ""]


@dataclass(frozen=True)
class Curve:
    """A name of metrics.jsonl. ``joined``: measured at some steps only, drawn as points with lines between them."""

    name: str
    label: str
    joined: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line: a value of config.yaml, by its dotted path, or the first value of a metric."""

    label: str
    config: str = ""
    metric: str = ""


@dataclass(frozen=True)
class Panel:
    """``lines``: all runs in one plot. One for each run: ``fan``, percentiles; ``heat``, a histogram; ``stack``, a sum."""

    key: str  # the name of its PNG file
    title: str
    unit: Unit
    look_for: str  # one sentence
    curves: tuple[Curve, ...]
    kind: Kind = "lines"
    log: bool = False
    low: float | None = None  # bounds of the y axis; None: the data's
    high: float | None = None
    levels: tuple[Level, ...] = ()


@dataclass(frozen=True)
class Section:
    title: str
    panels: tuple[Panel, ...]


# Percentiles of a fan, from the bottom; the page and the PNG files shade between the outer and the inner pairs.
FAN = ("rollout/length_p05", "rollout/length_p25", "rollout/length_p50", "rollout/length_p75", "rollout/length_p95")
HISTOGRAM = "rollout/length_histogram"
# A step's time and what of it has a name; the report adds the rest, evaluations and checkpoints above all, as a column.
STEP_TIME, PHASES, REST = "time/step", ("time/rollout", "time/score", "time/train", "time/weight_sync"), "time/rest"

_BUDGET = Level("length budget", config="rollout.sampling.max_new_tokens")


def _limits(monitor: str) -> tuple[Level, ...]:
    return tuple(Level(level, config=f"monitors.{monitor}.{level}") for level in ("warn", "rollback", "stop"))


_OF_TRAINING = (
    Section(
        "Outcome",
        (
            Panel(
                "heldout_accuracy",
                "Held-out accuracy",
                "share",
                "Should rise towards the teacher's; a fall in the steps where truncation rises is the collapse.",
                (Curve("eval/accuracy", "student", joined=True),),
                low=0.0,
                levels=(Level("teacher", metric="eval/teacher_accuracy"),),
            ),
            Panel(
                "rollout_accuracy",
                "Accuracy of the rollouts",
                "share",
                "On the training prompts, at the sampling temperature: noisier than held-out accuracy, but of every step.",
                (Curve("rollout/accuracy", "rollouts"),),
                low=0.0,
            ),
            Panel(
                "unverified",
                "Held-out responses that no verifier could judge",
                "share",
                "No answer, none that can be read, a timeout: they count as wrong, so accuracy falls with them.",
                (Curve("eval/unverified", "held-out", joined=True),),
                low=0.0,
                high=1.0,
            ),
            Panel(
                "truncation",
                "Truncation",
                "share",
                "Responses that ran out of tokens without an end token; beyond 50% they dominate the gradient.",
                (
                    Curve("rollout/truncation_rate", "rollouts"),
                    Curve("eval/truncation_rate", "held-out", joined=True),
                ),
                low=0.0,
                high=1.0,
                levels=_limits("truncation"),
            ),
        ),
    ),
    Section(
        "Length",
        (
            Panel(
                "length_mean",
                "Mean length",
                "tokens",
                "Growth by working that appears levels off; inflation goes on to the budget.",
                (
                    Curve("rollout/length_mean", "rollouts"),
                    Curve("eval/length_mean", "held-out", joined=True),
                ),
                low=0.0,
            ),
            Panel(
                "heldout_length",
                "Length on held-out prompts",
                "tokens",
                "The same at the evaluation's temperature; greedy answers inflate later than sampled ones.",
                (
                    Curve("eval/length_p05", "p05", joined=True),
                    Curve("eval/length_p25", "p25", joined=True),
                    Curve("eval/length_p50", "p50", joined=True),
                    Curve("eval/length_p75", "p75", joined=True),
                    Curve("eval/length_p95", "p95", joined=True),
                    Curve("eval/length_max", "max", joined=True),
                ),
                low=0.0,
            ),
            Panel(
                "length_fan",
                "Response length",
                "tokens",
                "A p95 that reaches the budget while the median still rests is how the inflation begins.",
                (
                    *(Curve(name, name.removeprefix("rollout/length_")) for name in FAN),
                    Curve("rollout/length_max", "max"),
                ),
                kind="fan",
                low=0.0,
                levels=(_BUDGET,),
            ),
            Panel(
                "length_histogram",
                "Response length, every bin",
                "tokens",
                "A second band at the top edge is truncation: responses that end on the budget, not on an end token.",
                (Curve(HISTOGRAM, "share of the responses"),),
                kind="heat",
                low=0.0,
            ),
        ),
    ),
    Section(
        "Repetition",
        (
            Panel(
                "repetition_rate",
                "Repetition rate",
                "share",
                "Long responses whose tail compresses too well; a gap in the curve means that none was long enough to tell.",
                (
                    Curve("rollout/repetition_rate", "rollouts"),
                    Curve("eval/repetition_rate", "held-out", joined=True),
                ),
                low=0.0,
                high=1.0,
                levels=_limits("repetition"),
            ),
            Panel(
                "repeated_ngrams",
                "Repeated n-grams",
                "share",
                "Moves before the repetition rate does, and on short responses too.",
                (
                    Curve("rollout/repeated_ngrams", "rollouts"),
                    Curve("eval/repeated_ngrams", "held-out", joined=True),
                ),
                low=0.0,
                high=1.0,
            ),
            Panel(
                "repeated_weight",
                "Loss weight on repeated tokens",
                "share",
                "The share of the on-policy term that repetition decides: frequency, before the advantage comes in.",
                (
                    Curve("policy/repeated_weight", "rollouts"),
                    Curve("eval/repeated_weight", "held-out", joined=True),
                ),
                low=0.0,
                high=1.0,
            ),
            Panel(
                "collapse",
                "Collapse detector",
                "",
                "Its statistic against its limits; it should cross before held-out accuracy falls.",
                (Curve("monitors/collapse", "statistic"),),
                levels=_limits("collapse"),
            ),
        ),
    ),
    Section(
        "What the teacher says",
        (
            Panel(
                "advantage",
                "Advantage",
                "nats",
                "Repeated tokens far less negative than others: the loss rewards repetition. A jump upwards is the collapse.",
                (
                    Curve("policy/advantage", "all tokens"),
                    Curve("policy/advantage_regular", "regular"),
                    Curve("policy/advantage_repeated", "repeated"),
                ),
            ),
            Panel(
                "log_probs",
                "Log-probability of the sampled tokens",
                "nats",
                "Student and engine must lie on each other; the distance to the teacher is the advantage.",
                (
                    Curve("policy/log_prob", "student"),
                    Curve("policy/teacher_log_prob", "teacher"),
                    Curve("policy/engine_log_prob", "engine"),
                ),
            ),
            Panel(
                "stop_log_prob",
                "Log-probability of ending",
                "nats",
                "A student whose curve sinks away from the teacher's forgets how to end.",
                (
                    Curve("policy/stop_log_prob", "student"),
                    Curve("policy/teacher_stop_log_prob", "teacher"),
                ),
            ),
            Panel(
                "entropy",
                "Entropy",
                "nats",
                "Of the next token. A fall of both towards 0 is a loop: neither is in doubt about what comes.",
                (
                    Curve("policy/entropy", "student"),
                    Curve("policy/teacher_entropy", "teacher"),
                ),
                low=0.0,
            ),
            Panel(
                "agreement",
                "Agreement with the teacher",
                "share",
                "Top-1 and top-k overlap should rise; high overlap with falling accuracy is agreement about loops.",
                (
                    Curve("policy/top1_agreement", "top-1"),
                    Curve("policy/top_k_overlap", "top-k"),
                ),
                low=0.0,
                high=1.0,
            ),
        ),
    ),
    Section(
        "Objective",
        (
            Panel(
                "loss_opd",
                "On-policy term",
                "nats",
                "Divergence from the teacher on the student's own text; with loss.opd: sampled it is minus the advantage.",
                (Curve("loss/opd", "on-policy term"),),
            ),
            Panel(
                "reference_kl",
                "Divergence from the reference",
                "nats",
                "How far the student has gone from where it began; a steady climb asks for a larger loss.reference_kl.",
                (
                    Curve("loss/reference_kl", "rollouts"),
                    Curve("eval/reference_kl", "held-out", joined=True),
                ),
                low=0.0,
            ),
            Panel(
                "off_policy_loss",
                "Loss on texts of others",
                "nats",
                "Should fall and stay down; a rise means that the on-policy term wins over the mixture.",
                (
                    Curve("loss/gold_sft", "gold, cross-entropy"),
                    Curve("loss/teacher_sft", "teacher-written, cross-entropy"),
                    Curve("loss/gold_divergence", "gold, divergence"),
                    Curve("loss/teacher_divergence", "teacher-written, divergence"),
                ),
            ),
            Panel(
                "mixture",
                "Mixture",
                "share",
                "Shares of the response tokens. Gold fades when rollouts inflate; its weight in the loss does not.",
                (
                    Curve("mixture/student_tokens", "student"),
                    Curve("mixture/teacher_tokens", "teacher"),
                    Curve("mixture/gold_tokens", "gold"),
                ),
                low=0.0,
                high=1.0,
            ),
            Panel(
                "weights",
                "Weight in the loss",
                "share",
                "What the sources have of the loss's weight. No response length moves it; a step without one of them does.",
                (
                    Curve("mixture/student_share_of_weight", "student"),
                    Curve("mixture/teacher_share_of_weight", "teacher"),
                    Curve("mixture/gold_share_of_weight", "gold"),
                ),
                low=0.0,
                high=1.0,
            ),
            Panel(
                "coefficients",
                "Coefficients in force",
                "",
                "What a rollback or the controller changed.",
                (
                    Curve("mixture/reference_kl", "reference KL"),
                    Curve("mixture/gold_weight", "gold weight"),
                ),
                low=0.0,
            ),
            Panel(
                "loss",
                "Loss",
                "",
                "The sum of the terms; a policy gradient's value says little alone.",
                (Curve("loss", "loss"),),
            ),
            Panel(
                "grad_norm",
                "Gradient norm",
                "",
                "Before clipping. Spikes are single batches; a slow climb over decades is not.",
                (Curve("grad_norm", "norm"),),
                log=True,
            ),
            Panel("learning_rate", "Learning rate", "", "The schedule as it ran.", (Curve("learning_rate", "rate"),), low=0.0),
        ),
    ),
    Section(
        "Machine",
        (
            Panel(
                "time",
                "Time of a step by phase",
                "seconds",
                "Rollouts that inflate make their phase grow first. The rest is evaluation and checkpoints above all.",
                (
                    *(Curve(name, name.removeprefix("time/").replace("_", " ")) for name in PHASES),
                    Curve(REST, "rest"),
                ),
                kind="stack",
                low=0.0,
            ),
            Panel(
                "throughput",
                "Throughput",
                "tokens/s",
                "Input tokens trained on, over the whole step; and tokens written, where servers count them.",
                (
                    Curve("tokens_per_second", "trained"),
                    Curve("rollout/tokens_per_second", "written"),
                ),
                low=0.0,
            ),
            Panel(
                "engine_gap",
                "Engine against trainer",
                "nats",
                "Difference of their log-probabilities of the same tokens: rounding, and flat. A jump is wrong weights.",
                (
                    Curve("policy/engine_gap_mean", "mean"),
                    Curve("policy/engine_gap_max", "max"),
                    Curve("policy/staleness_gap_mean", "mean, older weights"),
                    Curve("policy/staleness_gap_max", "max, older weights"),
                ),
                log=True,
            ),
            Panel(
                "lag",
                "Age of the weights that wrote",
                "steps",
                "0 is strictly on-policy.",
                (
                    Curve("policy/lag_mean", "mean"),
                    Curve("policy/lag_max", "max"),
                ),
                low=0.0,
            ),
            Panel(
                "skipped",
                "Skipped steps so far",
                "steps",
                "Steps with a non-finite loss or gradient, which changed nothing.",
                (Curve("skipped_steps", "skipped"),),
                low=0.0,
            ),
        ),
    ),
)


def _on_heldout(panel: Panel) -> Panel:
    """The same of the held-out responses."""
    names = [(curve.name.removeprefix("policy/"), curve.label) for curve in panel.curves if "staleness" not in curve.name]
    curves = tuple(Curve(f"eval/{name}", label, joined=True) for name, label in names)
    look_for = "As of the rollouts, at the evaluation's temperature, on prompts that are not trained on."
    return replace(panel, key=f"heldout_{panel.key}", title=f"{panel.title}, held-out", look_for=look_for, curves=curves)


_SCORED = ("advantage", "log_probs", "stop_log_prob", "entropy", "agreement", "engine_gap")
_HELDOUT = tuple(_on_heldout(panel) for section in _OF_TRAINING for panel in section.panels if panel.key in _SCORED)
_AFTER = 1 + [section.title for section in _OF_TRAINING].index("What the teacher says")
SECTIONS = (*_OF_TRAINING[:_AFTER], Section("Of held-out responses", _HELDOUT), *_OF_TRAINING[_AFTER:])
PANELS = tuple(panel for section in SECTIONS for panel in section.panels)
