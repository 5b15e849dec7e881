"""On-policy distillation, from prompts to weights: the loop reads as the algorithm (StableOPD, arXiv 2604.08527)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_opd.config import Config
from megatron_opd.data.packing import Multiples, context_slice, pack, padding_share
from megatron_opd.data.token_weights import token_shares
from megatron_opd.evaluation.evaluate import rollout_figures
from megatron_opd.hf_folder import write_hf_folder
from megatron_opd.mcore.checkpoint import check_checkpoint, load_checkpoint
from megatron_opd.mcore.checkpoint_files import latest_checkpoint, newest_verified, rollbacks_before
from megatron_opd.mcore.model import dtype_of
from megatron_opd.mcore.parallel import init_layout, init_process_group
from megatron_opd.mcore.platform import Platform
from megatron_opd.monitoring.control import coefficients, control
from megatron_opd.monitoring.lag import policy_lag
from megatron_opd.preflight import Inputs, prepare
from megatron_opd.recovery import Recovery
from megatron_opd.reporter import Reporter
from megatron_opd.rollout.versions import check_versions
from megatron_opd.saver import Saver
from megatron_opd.setup import System, build_system
from megatron_opd.stop_signal import StopSignal
from megatron_opd.types import Alarm, OpdError, RunInterrupted, RunStopped, StepStats, TrainState
from megatron_opd.validation import Validation, score


def train(config: Config, platform: Platform) -> None:
    """Run ``config`` on the ranks that torch.distributed's environment describes; every rank calls it.

    Raises OpdError for bad input, RunStopped when the run cannot usefully go on, RunInterrupted when a signal has ended it.
    """
    init_process_group(platform)
    try:
        inputs = _verify_resume(config, prepare(config, platform, dist.get_world_size()))
        layout = init_layout(config.student.parallel, config.run.seed)
        system = build_system(config, inputs, platform, layout)
        rank, rollbacks = dist.get_rank(), rollbacks_before(inputs.resume) if inputs.resume else 0
        with (
            closing(system),
            Reporter(config, inputs.resume_step, inputs.tokenizer, rank=rank, rollbacks=rollbacks) as reporter,
        ):
            with StopSignal() as stop, Saver(config, system.trainer, reporter) as saver:  # the last checkpoint is written, too
                recovery = Recovery(config, system, saver, reporter)
                state = _run(config, inputs, system, reporter, saver, recovery, stop)
            _finish(config, inputs, system, state, reporter)
    finally:
        dist.destroy_process_group()


def _run(
    config: Config,
    inputs: Inputs,
    system: System,
    reporter: Reporter,
    saver: Saver,
    recovery: Recovery,
    stop: StopSignal,
) -> TrainState:
    trainer, layout = system.trainer, system.trainer.layout
    state = TrainState()
    if inputs.resume:
        state = load_checkpoint(inputs.resume, trainer)
        system.monitors.load_state_dict(state.monitors)
    validation = Validation(config, inputs, system)
    if state.step == 0 and config.eval:
        reporter.start(state, validation.start(state))
    multiples = Multiples.of(config.layouts.values(), config.row_multiple)
    clock = Clock()

    while state.step < config.run.steps:
        with trainer.off_device():  # engines and frozen models have the memory
            with clock.phase("weight_sync"):
                sync = system.push(state.policy_version) if config.mixture.student else None  # else evaluations push
            with clock.phase("rollout"):
                rollouts = system.rollouts.take(state)  # the next prompts, each response from the one who is to write it
                if config.rollout.lag and state.step + 1 < config.run.steps:
                    system.rollouts.begin_next(state)  # with the weights of now, while this step is scored and trained
                system.sleep_engines()
            check_versions(rollouts, state.policy_version, config.rollout.lag)
            lag = policy_lag(rollouts, state.policy_version)
            alarms = system.monitors.observe(state.step + 1, rollouts)
            repeated = system.monitors.repeated
            shares = pack(
                rollouts,
                dp_size=layout.dp_size,
                max_tokens=config.packing.max_tokens_per_microbatch,
                aggregation=config.loss.aggregation,
                multiples=multiples,
                shares=token_shares(rollouts, repeated, config.loss.truncated_weight, config.loss.repeated_tail_weight),
                repeated=repeated,
            )
            batches = [context_slice(batch, layout.cp_rank, layout.cp_size) for batch in shares[layout.dp_rank]]
            with clock.phase("score"):
                teacher_scores = score(system.teacher, shares)
                reference_scores = score(system.reference, shares)
        with clock.phase("train"):
            objective = coefficients(config.objective, state)
            keep = reporter.samples(state.step + 1, rollouts)
            stats = trainer.step(batches, teacher_scores, reference_scores, objective=objective, rollouts=rollouts, keep=keep)
        state.step += 1
        state.policy_version += not stats.skipped
        state.healthy, state.alarms = not alarms, [f"{alarm.monitor}.{alarm.level}" for alarm in alarms]
        _count_skips(state, stats)
        control(state, config.monitors.control, stats.terms.reference_kl, system.monitors.summary()["rollout/truncation_rate"])
        with clock.phase("rollout"):
            system.rollouts.settle()

        record = {**rollout_figures(rollouts, dist.group.WORLD), "packing/padding": padding_share(shares, rollouts)}
        record |= {"mixture/reference_kl": objective.reference_kl, "mixture/gold_weight": objective.gold_weight}
        record |= {**system.monitors.summary(), **lag, **clock.record(stats.tokens), "ranks": dist.get_world_size()}
        record |= system.engine.figures() if system.engine else {}
        record |= system.teacher.figures() if system.teacher else {}
        record |= sync.figures() if sync else {}
        validated = None
        if config.eval and (state.step % config.eval.every == 0 or state.step == config.run.steps):
            with clock.paused():
                validated = validation.run(state)
        reporter.step(state, stats, record, rollouts, system.monitors, alarms, validated)
        state.monitors = system.monitors.state_dict()
        saver.poll()
        _stop_if_needed(config, state, stats, alarms, saver, reporter, on_policy=not lag["policy/lag_max"])
        if turning_back := [alarm for alarm in alarms if alarm.level == "rollback"]:
            state = recovery.roll_back(state, turning_back)
            continue
        asked = stop.received()
        if asked or state.step % config.checkpoint.every == 0 or state.step == config.run.steps:
            saver.save(state)
        if asked and state.step < config.run.steps:
            saver.finish()
            raise RunInterrupted(f"step {state.step}: {asked}; the last checkpoint is {latest_checkpoint(saver.folder)}")
    return state


def _count_skips(state: TrainState, stats: StepStats) -> None:
    state.skipped_steps += stats.skipped
    state.consecutive_skips = state.consecutive_skips + 1 if stats.skipped else 0


def _stop_if_needed(
    config: Config,
    state: TrainState,
    stats: StepStats,
    alarms: Sequence[Alarm],
    saver: Saver,
    reporter: Reporter,
    *,
    on_policy: bool,
) -> None:
    """Raises RunStopped, after a checkpoint where the weights are still good.

    Alarms that ask for it, or for a rollback, are on record then.
    """
    acting = [alarm for alarm in alarms if alarm.level != "warn"]
    if state.consecutive_skips >= config.run.max_skipped_steps:
        reporter.acted(state.step, acting, "stopped")
        raise RunStopped(
            f"step {state.step}: {state.consecutive_skips} steps in a row had a non-finite loss or gradient; the checkpoints "
            f"in {saver.folder} are intact; lower optimizer.lr, or look at the last samples"
        )
    gap, bound = stats.terms.engine_gap, config.rollout.max_engine_gap
    if on_policy and bound is not None and gap > bound:  # what older weights wrote differs, as it should
        reporter.acted(state.step, acting, "stopped")
        raise RunStopped(
            f"step {state.step}: the engine's log-probabilities differ from the trainer's by {gap:.3g} nats a token, more than "
            f"rollout.max_engine_gap={bound}: it has other weights or computes otherwise; the checkpoints in {saver.folder} "
            "are from before"
        )
    stops = [alarm for alarm in alarms if alarm.level == "stop"]
    if stops:
        saver.save(state)
        saver.finish()
        reporter.acted(state.step, acting, "stopped")
        raise RunStopped(f"{stops[0].message}; the last checkpoint is {latest_checkpoint(saver.folder)}")


def _verify_resume(config: Config, inputs: Inputs) -> Inputs:
    """The newest checkpoint with the right content instead of the newest of the right size. Raises OpdError where none is."""
    if inputs.resume is None:
        return inputs
    folder = Path(config.run.dir) / "checkpoints"
    path, skipped = newest_verified(folder)
    if path is None:
        raise OpdError(
            f"checkpoint.resume: none in {folder} is whole ({skipped[0]}); restore one, or delete them to start anew"
        )
    if skipped and dist.get_rank() == 0:
        print("\n".join(f"megatron-opd: {line}" for line in skipped), file=sys.stderr)
    return replace(inputs, resume=path, resume_step=check_checkpoint(path, inputs.student_spec, config.run.seed))


def _finish(config: Config, inputs: Inputs, system: System, state: TrainState, reporter: Reporter) -> None:
    """The HF export, which transformers and SGLang load, and the summary."""
    target = Path(config.run.dir) / "hf"
    weights = system.trainer.export().whole()
    if dist.get_rank() == 0:
        write_hf_folder(weights, inputs.student.path, target, dtype_of(config))
    else:
        for _ in weights:  # the stream is collective
            pass
    dist.barrier()
    reporter.finish(state, latest_checkpoint(Path(config.run.dir) / "checkpoints"), target)


class Clock:
    """Seconds spent in each phase of the current step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[f"time/{name}"] = self.seconds.get(f"time/{name}", 0.0) + time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile belongs to no step."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def record(self, tokens: int) -> dict[str, float | None]:
        """This step's phases, its whole time and its input tokens per second; starts the next step."""
        now = time.perf_counter()
        elapsed, self.started = now - self.started, now
        seconds, self.seconds = self.seconds, {}
        return {**seconds, "time/step": elapsed, "tokens_per_second": tokens / elapsed}
