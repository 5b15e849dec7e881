"""Every noun that crosses a module boundary; those of the loss's objective are from ``objective.py``.

One training step moves these objects along:

    Prompt -> RolloutRequest -> Rollout -> PackedBatch -> FrozenScores -> LossOutput -> StepStats

Shapes: T is the number of input positions of a micro-batch, S the number of sequences packed into it, H a hidden size, V a
vocabulary size, tp the tensor-parallel size. Log-probabilities and divergences are in nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor

from megatron_opd.objective import SCORED_KINDS as SCORED_KINDS
from megatron_opd.objective import Aggregation as Aggregation
from megatron_opd.objective import FrozenScores as FrozenScores
from megatron_opd.objective import Objective as Objective
from megatron_opd.objective import OffPolicyTerm as OffPolicyTerm
from megatron_opd.objective import OpdKind as OpdKind
from megatron_opd.objective import TokenScores as TokenScores


class OpdError(Exception):
    """Bad input. The message is one line that names the key or file, the value and the remedy; the CLI exits with code 2."""


class UnexpectedError(OpdError):
    """What nobody foresaw on another rank, of which this one knows a line; the CLI treats it as any other such exception."""


class RunStopped(Exception):
    """The run cannot usefully go on: non-finite steps, an alarm that asks to stop, no engine left. One line; exit code 1."""


class RunInterrupted(Exception):
    """The run was asked to end, and has, after a checkpoint: the same command goes on. One line; exit code 75, EX_TEMPFAIL."""


class Source(StrEnum):
    """Who wrote a response; each source is normalised by its own global count."""

    STUDENT = "student"
    TEACHER = "teacher"
    GOLD = "gold"


@dataclass(frozen=True)
class Prompt:
    """One line of the prompts file, tokenised.

    Example: ``Prompt(uid="7", token_ids=(1, 52, 9), text="2+3=?", answer="5", solution_ids=(14, 2), solution="5")``
    """

    uid: str
    token_ids: tuple[int, ...]
    text: str
    answer: str | None = None
    solution_ids: tuple[int, ...] | None = None  # the gold response, end token included
    solution: str | None = None
    teacher: str = ""  # the one who scores and writes for it, where there are several
    tolerance: float | None = None  # how far a numeric answer may be off; None: not at all


@dataclass(frozen=True)
class SamplingParams:
    """How an engine samples. ``top_p`` cuts the sampling, never the reported log-probabilities."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    vocab_size: int | None = (
        None  # ids that student, teacher and reference share: a model's rows beyond do not exist; None: all
    )


@dataclass(frozen=True)
class RolloutRequest:
    """One response to obtain. ``seed`` alone decides its random draws, whatever it is batched with."""

    prompt: Prompt
    source: Source
    sample: int  # index among the responses of this source to this prompt
    seed: int  # 63 bits, a function of (run seed, step, prompt, source, sample)


FinishReason = Literal["stop", "length"]


class VersionSpan(NamedTuple):
    """Response tokens from ``start`` up to ``end``, not included, were sampled from the weights ``version``."""

    start: int
    end: int
    version: int


@dataclass(frozen=True)
class Rollout:
    """A response and what its writer knew about it."""

    prompt: Prompt
    source: Source
    response_ids: tuple[int, ...]  # [R], end token included when finish_reason is "stop"
    log_probs: tuple[float, ...]  # [R] nats, log pi_old at the sampling temperature, before top-p; empty for gold
    finish_reason: FinishReason
    policy_version: int  # the oldest weights that sampled a part of it; 0 for gold and for the frozen teacher
    text: str
    versions: tuple[VersionSpan, ...] = ()  # all R tokens, in their order; empty: policy_version throughout


@dataclass(frozen=True)
class PackedBatch:
    """One THD micro-batch. Position i reads ``tokens[i]`` and predicts ``labels[i]``.

    The weight streams already carry the division by the *global* count of their own source (micro-batches x DP), so losses are
    plain weighted sums: no later division, no mean of means. A position has weight in at most one stream; prompt and padding
    positions have none. All its prompts have the same teacher.
    """

    tokens: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, restarts at 0 in each sequence
    labels: Tensor  # [T] int64, 0 where no stream has weight
    cu_seqlens: Tensor  # [S + 1] int32
    max_seqlen: int
    old_log_probs: Tensor  # [T] fp32 nats, the engine's log pi_old(label); 0 outside student rollouts
    rollout_weights: Tensor  # [T] fp32, sums to 1 over the global batch (or to 0 when no student rollout is there)
    teacher_weights: Tensor  # [T] fp32, likewise for teacher-written responses
    gold_weights: Tensor  # [T] fp32, likewise for gold solutions
    teacher: str = ""  # the name of the one who scores it
    repeated: Tensor | None = None  # [T] bool, the label ends an n-gram that its response had before; None: not looked at
    responses: tuple[int, ...] = ()  # of each sequence but padding, its place among the step's rollouts

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]


Value = TypeVar("Value")


class LossTerms(NamedTuple, Generic[Value]):
    """Weighted sums over tokens, which micro-batches and data-parallel ranks add up; each but weights before its coefficient.

    Divergences, entropies and log-probabilities in nats; from ``entropy`` to ``repeated_weight`` rollout-weighted means once
    summed.
    """

    loss: Value
    opd: Value
    reference_kl: Value
    teacher_written: Value  # cross-entropy, or the divergence, on teacher-written responses
    gold: Value  # likewise on gold solutions
    entropy: Value  # of the student
    teacher_entropy: Value  # 0 of a teacher that gives TokenScores, like the agreement below: unknown
    advantage: Value  # the policy gradient's A; with another OPD term log pi_T(label) - log pi_old(label)
    top1_agreement: Value  # share of positions where both models' likeliest token is the same
    stop_log_prob: Value  # log of the student's probability of any end token
    teacher_stop_log_prob: Value
    engine_gap: Value  # |log pi_theta - log pi_old|
    log_prob: Value  # log pi_theta(label)
    teacher_log_prob: Value  # log pi_T(label)
    engine_log_prob: Value  # log pi_old(label)
    repeated_weight: Value  # of the rollout weight, the share on repeated tokens
    repeated_advantage: Value  # the advantage's part on repeated tokens, not a mean
    overlap: Value  # summed over sampled rollout positions: share of the student's k likeliest tokens among the teacher's k
    overlap_positions: Value  # how many those are; 0: not measured
    student_weight: Value  # of rollouts in the OPD term, coefficient and token weights included; the reference term apart
    teacher_weight: Value  # likewise of teacher-written responses in theirs
    gold_weight: Value
    bad_student: Value  # tokens on which the model's logits hold NaN or infinity
    bad_teacher: Value
    bad_reference: Value


@dataclass(frozen=True)
class LossOutput:
    """One micro-batch's loss. Only ``loss`` carries a gradient."""

    loss: Tensor  # scalar
    terms: LossTerms[Tensor]  # scalars
    log_probs: Tensor  # [T] nats, log pi_theta(label)
    teacher_log_probs: Tensor  # [T] nats, log pi_T(label), on rollout positions
    advantages: Tensor  # [T] nats, on rollout positions
    engine_gap_max: Tensor  # scalar, nats


@dataclass(frozen=True)
class ResponseValues:
    """What the loss saw of each token of a response, in nats, [R] each; advantages and the teacher's of the student's alone."""

    log_probs: tuple[float, ...]  # log pi_theta
    teacher_log_probs: tuple[float, ...]
    advantages: tuple[float, ...]


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step reports; equal on all ranks."""

    terms: LossTerms[float]
    grad_norm: float
    learning_rate: float
    skipped: bool  # a non-finite loss or gradient: the weights did not move
    engine_gap_max: float  # nats, over rollout tokens
    tokens: int  # input positions of the global batch
    # Of the responses asked for, by their place among the step's rollouts; on the first rank alone.
    responses: Mapping[int, ResponseValues] = field(default_factory=dict)


@dataclass
class DataCursor:
    """Where the seeded order of prompts stands; JSON-serialisable."""

    epoch: int = 0
    position: int = 0  # prompts of this epoch already handed out


@dataclass
class TrainState:
    """Everything that a resumed run needs besides model, optimizer, learning-rate schedule and random states."""

    step: int = 0
    policy_version: int = 0
    skipped_steps: int = 0
    consecutive_skips: int = 0
    cursor: DataCursor = field(default_factory=DataCursor)
    monitors: dict[str, Any] = field(default_factory=dict)  # the monitors' own serialised windows
    healthy: bool = True  # the last step raised no alarm
    alarms: list[str] = field(default_factory=list)  # else the thresholds that were reached, as "truncation.warn"
    rollbacks: int = 0
    reference_factor: float = 1.0  # on the configured coefficients: what rollbacks and control made of them
    gold_factor: float = 1.0
    evaluations: dict[str, float] = field(default_factory=dict)  # held-out accuracy: "teacher", "before", "after"


AlarmLevel = Literal["warn", "rollback", "stop"]


@dataclass(frozen=True)
class Alarm:
    """A monitor's finding."""

    monitor: str
    level: AlarmLevel
    value: float
    threshold: float
    message: str


NamedTensors = Iterable[tuple[str, Tensor]]  # HF name, full (unsharded, unpadded) tensor


class RolloutEngine(Protocol):
    """Writes responses. Every method is collective: all ranks call it with the same arguments and get the same results."""

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Rollout]:
        """One rollout for each request, in the order of the requests."""
        ...

    def sleep(self) -> None:
        """Give device memory to the training until the next :meth:`generate`, where the two share devices."""
        ...

    def figures(self) -> dict[str, float | None]:
        """Metrics of the last :meth:`generate`, on the first rank; not collective."""
        ...


class WeightReceiver(Protocol):
    """An engine in this process."""

    def load_weights(self, weights: NamedTensors, version: int) -> None:
        """Take new weights by HF name; later rollouts carry ``version``. A missing or unknown name is an OpdError."""
        ...


@dataclass(frozen=True)
class SyncStats:
    """One delivery of weights; equal on all ranks."""

    received_bytes: float  # by an engine rank, on average
    shard_bytes: float  # of the parameters that it keeps
    probe_gap: float | None  # nats a token: |log pi_trainer - log pi_engine| on a fixed sequence; None: not probed

    def figures(self) -> dict[str, float | None]:
        """As metrics.jsonl has them."""
        return {
            "weight_sync/received_mib": self.received_bytes / 2**20,
            "weight_sync/received_over_shard": self.received_bytes / self.shard_bytes,
            "weight_sync/probe_gap": self.probe_gap,
        }


class WeightSync(Protocol):
    """Brings the student's weights to its engine."""

    def push(self, version: int) -> SyncStats | None:
        """The student's current weights become the engine's; its later rollouts carry ``version``.

        Collective over the world; None in the same process, where nothing is sent. Raises OpdError or RunStopped where the
        engine does not have them all afterwards.
        """
        ...

    def leave(self) -> None:
        """The end of the run: give up what connects to engines. Not collective."""
        ...


class Scorer(Protocol):
    """A frozen model's opinion of the micro-batches."""

    def on_device(self) -> AbstractContextManager[None]:
        """Owns the phase in which the weights must be in device memory. Collective over the world."""
        ...

    def score(self, shares: Sequence[Sequence[PackedBatch]]) -> list[FrozenScores]:
        """One for each of this rank's micro-batches. Collective over the world.

        ``shares``: every data-parallel rank's micro-batches, not yet sliced for context parallelism; equal on all ranks.
        """
        ...

    def figures(self) -> dict[str, float | None]:
        """Metrics of the last :meth:`score`, on the first rank; not collective."""
        ...


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that pure layers use."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> object: ...  # None: there is none

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


@dataclass(frozen=True)
class Histogram:
    """Counts in equal bins from 0 to ``high``."""

    counts: tuple[int, ...]
    high: float


@dataclass(frozen=True)
class Validated:
    """What the held-out responses of one policy gave, by the names of metrics.jsonl."""

    figures: Mapping[str, float | None]
    histograms: Mapping[str, Histogram]


class MetricsSink(Protocol):
    """Takes one flat record a step, and histograms by name."""

    def write(self, step: int, record: Mapping[str, float | int | None], histograms: Mapping[str, Histogram] = ...) -> None: ...

    def rewind(self, step: int, rollback: int) -> None:
        """The run goes back to its state after ``step``: what was written of later steps is set apart."""
        ...

    def close(self) -> None: ...


MicrobatchIterator = Iterator[PackedBatch]
