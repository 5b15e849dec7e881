"""What a run leaves for people: metrics, samples, messages, the final summary. Only rank 0 writes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Self

import yaml

from megatron_opd.config import Config
from megatron_opd.evaluation.evaluate import correctness
from megatron_opd.monitoring.alarms import AlarmLog
from megatron_opd.monitoring.console import TrainingConsole, summary_table
from megatron_opd.monitoring.metrics import open_sinks
from megatron_opd.monitoring.monitors import Monitors
from megatron_opd.monitoring.policy import policy_figures
from megatron_opd.monitoring.samples import places_of_prompts, write_samples, write_token_samples
from megatron_opd.types import Alarm, Histogram, LossTerms, Rollout, Source, StepStats, Tokenizer, TrainState, Validated

Record = Mapping[str, float | int | None]
_SAMPLES_EVERY = 10  # steps
_SAMPLED_PROMPTS = 4


class Reporter:
    """A context manager around the run. Every rank makes one, so that the loop has no rank in it; all but rank 0 are silent."""

    def __init__(self, config: Config, resume_step: int, tokenizer: Tokenizer, *, rank: int, rollbacks: int) -> None:
        """``rollbacks``: how often the run went back before the checkpoint that it resumes from."""
        self.config, self.tokenizer = config, tokenizer
        self.run_dir = Path(config.run.dir)
        self.active = rank == 0
        self.started = time.monotonic()
        if self.active:
            tree = config.model_dump(mode="json")
            (self.run_dir / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
            first_step = resume_step + 1 if resume_step else 0
            self.sinks = open_sinks(config.metrics, self.run_dir, config.run.name, tree, resume_step=first_step)
            self.alarms = AlarmLog(self.run_dir / "alarms.jsonl", first_step, rollbacks)
            self.console = TrainingConsole(config.run.steps, resume_step, sys.stdout)

    def __enter__(self) -> Self:
        if self.active:
            self.console.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.console.__exit__()
            for sink in self.sinks:
                sink.close()

    def start(self, state: TrainState, validated: Validated) -> None:
        """The held-out figures before the first step."""
        if self.active:
            self._write(state.step, validated.figures, validated.histograms)
            known = {"before": "student", "teacher": "teacher"}
            figures = [f"{known[name]} {value:.1%}" for name, value in state.evaluations.items() if name in known]
            if figures:
                self.console.message(f"held-out accuracy before training: {', '.join(figures)}")

    def samples(self, step: int, rollouts: Sequence[Rollout]) -> list[int]:
        """The places of the rollouts of ``step`` that are to be written out token by token; equal on all ranks."""
        due = step % _SAMPLES_EVERY == 0 or step in (1, self.config.run.steps)
        return places_of_prompts(rollouts, _SAMPLED_PROMPTS) if due else []

    def step(
        self,
        state: TrainState,
        stats: StepStats,
        record: Record,
        rollouts: Sequence[Rollout],
        monitors: Monitors,
        alarms: Sequence[Alarm],
        validated: Validated | None = None,
    ) -> None:
        """One optimizer step: the fixed names of metrics.jsonl, samples now and then, alarms and skips as messages.

        ``validated``: what the step's held-out responses gave, where it had some.
        """
        if not self.active:
            return
        objective, terms = self.config.objective, stats.terms
        off_policy = "sft" if objective.off_policy == "cross_entropy" else "divergence"
        on_policy = {
            "loss/opd": terms.opd,
            **policy_figures(terms, stats.engine_gap_max, "policy", logits=not self.config.served_teachers),
        }
        if record.get("policy/lag_max"):  # then the weights differ, not the engine
            on_policy = {name.replace("engine_gap", "staleness_gap"): value for name, value in on_policy.items()}
        whole: Record = {
            "loss": terms.loss,
            **(on_policy if objective.student_weight else dict.fromkeys(on_policy)),
            "loss/reference_kl": terms.reference_kl if objective.reference_kl else None,
            f"loss/gold_{off_policy}": terms.gold if objective.gold_weight else None,
            f"loss/teacher_{off_policy}": terms.teacher_written if objective.teacher_weight else None,
            **_weight_shares(terms),
            "grad_norm": stats.grad_norm,
            "learning_rate": stats.learning_rate,
            "policy_version": state.policy_version,
            "skipped_steps": state.skipped_steps,
            **record,
            **(validated.figures if validated else {}),
        }
        histograms = dict(validated.histograms) if validated else {}
        if monitors.histogram is not None:
            histograms["rollout/length_histogram"] = monitors.histogram
        self._write(state.step, whole, histograms)
        self.console.update(state.step, whole)
        if (accuracy := whole.get("eval/accuracy")) is not None:
            self.console.message(f"step {state.step}: held-out accuracy {accuracy:.1%}")
        if stats.skipped:
            self.console.message(
                f"step {state.step}: skipped, non-finite loss or gradient ({state.consecutive_skips} in a row"
                + (f"; the student's logits are not finite on {terms.bad_student:.0f} tokens)" if terms.bad_student else ")")
            )
        self.acted(state.step, [alarm for alarm in self.alarms.begun(alarms) if alarm.level == "warn"], "warned")
        if self.samples(state.step, rollouts):
            correct = correctness(rollouts)
            write_samples(self.run_dir, state.step, rollouts, correct, _SAMPLED_PROMPTS)
            write_token_samples(
                self.run_dir,
                state.step,
                rollouts,
                correct,
                monitors.repeated,
                stats.responses,
                lambda token: self.tokenizer.decode([token]),
                _SAMPLED_PROMPTS,
            )

    def acted(self, step: int, alarms: Sequence[Alarm], action: str) -> None:
        """Each alarm, as a message and in alarms.jsonl, with what came of it."""
        if self.active:
            for alarm in alarms:
                self.console.message(f"{alarm.level}: {alarm.message}" + ("" if action == "warned" else f"; {action}"))
                self.alarms.write(step, alarm, action)

    def rolled_back(self, state: TrainState, alarms: Sequence[Alarm], action: str) -> None:
        """Metrics go on from ``state``; what came after it is set apart."""
        if self.active:
            self.acted(self.last_step, alarms, action)
            self.alarms.rewind(state.step, state.rollbacks)
            for sink in self.sinks:
                sink.rewind(state.step, state.rollbacks)

    def warn(self, line: str) -> None:
        """Something went wrong that does not stop the run."""
        if self.active:
            self.console.message(f"warning: {line}")

    def finish(self, state: TrainState, checkpoint: Path | None, export: Path) -> None:
        """The summary: accuracies, where everything lies."""
        if not self.active:
            return
        names = {"before": "student before", "after": "student after", "teacher": "teacher"}
        rows = [
            (f"held-out accuracy, {names[name]}", f"{state.evaluations[name]:.1%}")
            for name in names
            if name in state.evaluations
        ]
        rows += [
            ("steps", f"{state.step}, {state.skipped_steps} skipped"),
            ("time of this process", f"{(time.monotonic() - self.started) / 60:.1f} min"),
            ("metrics", str(self.run_dir / "metrics.jsonl")),
            ("samples to read", str(self.run_dir / "samples")),
            ("checkpoint", str(checkpoint)),
            ("Hugging Face export", str(export)),
        ]
        self.console.message(summary_table(f"{self.config.run.name} is done", rows))

    def _write(self, step: int, record: Record, histograms: Mapping[str, Histogram] = MappingProxyType({})) -> None:
        self.last_step = step
        for sink in self.sinks:
            sink.write(step, record, histograms)


def _weight_shares(terms: LossTerms[float]) -> dict[str, float | None]:
    """What each source has of the step's weight in the loss; None where nothing has any."""
    weights = {
        Source.STUDENT: terms.student_weight,
        Source.TEACHER: terms.teacher_weight,
        Source.GOLD: terms.gold_weight,
    }
    total = sum(weights.values())
    return {f"mixture/{source}_share_of_weight": weight / total if total else None for source, weight in weights.items()}
