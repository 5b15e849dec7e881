"""Scores from a teacher behind SGLang servers: the first rank asks, all ranks get the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor

from megatron_opd.data.packing import context_positions
from megatron_opd.losses import TOP_K_KINDS
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.scoring.student import StudentSupport, scored_positions
from megatron_opd.sglang.dispatch import AnswerT, Ask, dispatch
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.scores import Scored, check_informed, scoring
from megatron_opd.sglang.windows import cut, scoring_by_position
from megatron_opd.types import FrozenScores, Objective, PackedBatch, TokenScores

_NEGLIGIBLE = 1e-6  # mass that changes log-probabilities by less than fp32 shows


@dataclass(frozen=True)
class _Response:
    """Tokens of one sequence of a micro-batch whose labels are scored."""

    batch: int  # the micro-batch's number
    first: int  # position of the micro-batch that predicts the first of them
    token_ids: list[int]  # the prompt, and the response to its end
    prompt: int  # tokens


class SGLangScorer:
    """A :class:`~megatron_opd.types.Scorer` that gives :class:`~megatron_opd.types.TokenScores`.

    For "topk_reverse_kl" they are asked about the student's likeliest tokens, window by window (``sglang/windows.py``).

    Over the ids that all models have. The teacher's rows beyond belong to no token, so training leaves them next to no mass:
    only where :meth:`verify` sees some are they asked for with every token, and their mass taken out.

    Args:
        roster: of the teacher's servers, on the first rank.
        layout: the student's.
        stop_ids: the end tokens of student and teacher.
        vocab_size: ids that student, teacher and reference share.
        teacher_vocab_size: rows of the teacher.
        in_flight: requests at each server at once.
        timeout: seconds for one request.
        student: whose likeliest tokens "topk_reverse_kl" asks about.
    """

    def __init__(
        self,
        first_rank: FirstRank,
        roster: Roster,
        layout: ParallelLayout,
        objective: Objective,
        *,
        stop_ids: tuple[int, ...],
        vocab_size: int,
        teacher_vocab_size: int,
        in_flight: int,
        timeout: float,
        student: StudentSupport | None = None,
    ) -> None:
        assert objective.temperature == 1.0  # the config refuses others
        assert (student is not None) == (objective.opd == "topk_reverse_kl")
        self._first_rank, self.roster, self.layout, self.objective = first_rank, roster, layout, objective
        self._stop_ids, self._vocab_size, self._rows = stop_ids, vocab_size, teacher_vocab_size
        self._in_flight, self._timeout = in_flight, timeout
        self._unshared = tuple(range(vocab_size, teacher_vocab_size))
        self._student = student
        # A merged stop class stands aside from the k, and so do ids that the student lacks: that many more are asked for.
        self._top = objective.k + len(stop_ids) if objective.opd in TOP_K_KINDS and student is None else 0
        self._width = self._top if student is None else objective.k  # of the scores
        self._figures: dict[str, float | None] = {}

    def on_device(self) -> AbstractContextManager[None]:
        return nullcontext()

    def verify(self, sequences: Sequence[Sequence[int]]) -> None:
        """Every server answers, and not as one without weights; ``sequences`` are of two tokens or more.

        Collective over the world. Raises, with the server's name, RunStopped where one is lost, OpdError where one has no
        weights.
        """

        def probe() -> float:
            mass = 0.0  # the largest, of all rows that the student lacks
            for endpoint in self.roster.serving():
                asks = [self._ask(list(sequence), 1) for sequence in sequences]
                answers, _ = dispatch(asks, [endpoint], in_flight=self._in_flight, timeout=self._timeout)
                check_informed(answers, self._rows)
                for answer in answers:
                    mass = max(mass, float(answer.given[:, len(self._stop_ids) :].exp().sum(1).max()))
            return mass

        if self._first_rank.run(probe) < _NEGLIGIBLE and sequences:  # unmeasured, the mass is asked for
            self._unshared = ()

    def score(self, shares: Sequence[Sequence[PackedBatch]]) -> list[FrozenScores]:
        """Raises, on every rank, RunStopped where no server is left, OpdError where one answers as without weights."""
        batches = list(chain.from_iterable(shares))
        responses = [response for number, batch in enumerate(batches) for response in self._responses(number, batch)]
        support = [] if self._student is None else self._student.ids(shares)
        scored = self._first_rank.run(lambda: self._request(responses, support))
        layout, per_rank = self.layout, len(shares[0])
        if not layout.is_last_stage:
            return [FrozenScores() for _ in range(per_rank)]
        first = layout.dp_rank * per_rank
        return [
            FrozenScores(tokens=self._place(batches[number], number, responses, scored))
            for number in range(first, first + per_rank)
        ]

    def figures(self) -> dict[str, float | None]:
        """Of the last :meth:`score`: requests, and log-probabilities that were asked for over those needed, where there are
        windows. On the first rank, empty elsewhere."""
        return dict(self._figures)

    def _responses(self, number: int, batch: PackedBatch) -> Iterator[_Response]:
        """Those with an OPD term."""
        scored = scored_positions(batch, self.objective)
        for start, end in pairwise(batch.cu_seqlens.tolist()):
            places = scored[(scored >= start) & (scored < end)]
            if not len(places):
                continue
            first, last = int(places[0]), int(places[-1])
            token_ids = [*batch.tokens[start : last + 1].tolist(), int(batch.labels[last])]
            yield _Response(number, first, token_ids, first + 1 - start)

    def _ask(self, token_ids: list[int], first: int) -> Ask[Scored]:
        top = min(self._top + len(self._unshared), self._rows) if self._top else 0
        return scoring(token_ids, first, (*self._stop_ids, *self._unshared), top)

    def _request(self, responses: Sequence[_Response], support: Sequence[Tensor]) -> list[TokenScores]:
        """For each of the responses; on the first rank. ``support``: the student's ids, [T, k] of each micro-batch."""
        self._figures = {}
        if not responses:
            return []
        if self._student is None:
            answers = self._dispatch([self._ask(response.token_ids, response.prompt) for response in responses])
        else:
            answers = self._dispatch_windows(responses, support)
        check_informed(answers, self._rows)
        return [self._shared(answer) for answer in answers]

    def _dispatch(self, asks: Sequence[Ask[AnswerT]]) -> list[AnswerT]:
        serving = self.roster.serving()
        return dispatch(asks, serving, in_flight=self._in_flight, timeout=self._timeout, roster=self.roster)[0]

    def _dispatch_windows(self, responses: Sequence[_Response], support: Sequence[Tensor]) -> list[Scored]:
        fixed = (*self._stop_ids, *self._unshared)
        asks, requests, asked, needed = [], 0, 0, 0
        for response in responses:
            end = response.first + len(response.token_ids) - response.prompt
            ids = support[response.batch][response.first : end].long()  # [R, k]
            windows = cut(ids, len(fixed))
            asks.append(scoring_by_position(response.token_ids, response.prompt, fixed, ids, windows))
            requests += len(windows)
            asked += sum((window.end - window.start) * (len(window.ids) + len(fixed)) for window in windows)
            needed += int((ids >= 0).sum()) + len(ids) * len(fixed)
        self._figures = {"score/requests": requests, "score/asked_over_needed": asked / needed}
        return [answer.whole() for answer in self._dispatch(asks)]

    def _shared(self, answer: Scored) -> TokenScores:
        """[R] and [R, width]: over the ids that all models have."""
        stop, unshared = answer.given.split([len(self._stop_ids), len(self._unshared)], 1)
        log_mass = torch.log1p(-unshared.exp().sum(1))  # [R], 0 where there are none
        scores = TokenScores(
            log_probs=(answer.log_probs - log_mass).float(),
            stop_log_probs=(stop.logsumexp(1) - log_mass if self._stop_ids else torch.zeros_like(log_mass)).float(),
        )
        if self._student is not None:
            top_log_probs = (answer.top_log_probs - log_mass[:, None]).float()
            return TokenScores(scores.log_probs, scores.stop_log_probs, answer.top_ids, top_log_probs)
        if not self._width:
            return scores
        known = (answer.top_log_probs - log_mass[:, None]).masked_fill(answer.top_ids >= self._vocab_size, -torch.inf)
        top = known.topk(min(self._width, known.shape[1]), 1)  # [R, <= width]
        missing = self._width - top.values.shape[1]
        top_log_probs = torch.nn.functional.pad(top.values, (0, missing), value=-torch.inf).float()
        ids = answer.top_ids.gather(1, top.indices)
        top_ids = torch.nn.functional.pad(ids.where(ids < self._vocab_size, 0), (0, missing))
        return TokenScores(scores.log_probs, scores.stop_log_probs, top_ids, top_log_probs)

    def _place(
        self, batch: PackedBatch, number: int, responses: Sequence[_Response], scored: Sequence[TokenScores]
    ) -> TokenScores:
        """[T/cp] and [T/cp, width]: one micro-batch's, cut as the student's context parallelism cuts it."""
        total, width = batch.num_tokens, self._width
        log_probs, stop_log_probs = torch.zeros(total), torch.zeros(total)
        top_ids = torch.zeros(total, width, dtype=torch.int64) if width else None
        top_log_probs = torch.full((total, width), -torch.inf) if width else None
        for response, scores in zip(responses, scored, strict=True):
            if response.batch == number:
                places = slice(response.first, response.first + len(scores.log_probs))
                log_probs[places], stop_log_probs[places] = scores.log_probs, scores.stop_log_probs
                _put(top_ids, places, scores.top_ids)
                _put(top_log_probs, places, scores.top_log_probs)
        whole = TokenScores(log_probs, stop_log_probs, top_ids, top_log_probs)
        return whole.at(context_positions(batch.cu_seqlens, self.layout.cp_rank, self.layout.cp_size))


def _put(whole: Tensor | None, places: slice, part: Tensor | None) -> None:
    if whole is not None and part is not None:
        whole[places] = part
