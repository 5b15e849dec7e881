"""A server's log-probabilities of tokens that it is given, instead of tokens that it writes.

SGLang gives them of softmax(logits), whatever the sampling temperature, over all rows of its model. Ids to be scored beside the
tokens themselves are one list for a whole request, not a list for each position. Logits are formed for the scored positions
alone, SGLANG_LOGPROB_CHUNK_SIZE of them (2,048 unless set) at once, and never for more than a chunk of the prefill.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_opd.sglang.client import Endpoint, EngineError
from megatron_opd.sglang.dispatch import Ask

# Nats. A model without weights, zeros or SGLang's dummies, is on average within this of -ln V; one with weights is off by some.
_NOTHING_LEARNT = 0.1
_CONSTANT = 1e-4  # nats between the largest and the smallest
_FEWEST_VALUES = 16  # from which to judge


@dataclass(frozen=True)
class Scored:
    """Of R tokens; all in nats, fp64, over the rows of the server's model."""

    server: str  # its URL
    log_probs: Tensor  # [R]
    given: Tensor  # [R, G] of the ids that were asked for
    top_ids: Tensor  # [R, K] int64, the likeliest first, or those that were asked for by position
    top_log_probs: Tensor  # [R, K]; -inf where none was asked for

    @property
    def tokens(self) -> int:
        return len(self.log_probs)


def scoring(token_ids: Sequence[int], first: int, ids: Sequence[int], top: int) -> Ask[Scored]:
    """Ask for the log-probabilities of ``token_ids[first:]``, of ``ids`` there, and of the ``top`` likeliest.

    What precedes is prefilled without logits, or found in the server's cache; ``first`` is at least 1.
    """
    body = {
        "input_ids": list(token_ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": first - 1,  # its own entry is empty
        "top_logprobs_num": top,
        # As two arrays: a third of the bytes that JSON's numbers take.
        "return_flat_raw_top_logprobs": top > 0,
        "return_flat_raw_top_logprobs_b64": top > 0,
        **({"token_ids_logprob": list(ids)} if ids else {}),
    }
    return Ask(body, len(token_ids), partial(_parse, labels=list(token_ids[first:]), ids=list(ids), top=top))


def _parse(body: dict[str, Any], endpoint: Endpoint, *, labels: list[int], ids: list[int], top: int) -> Scored:
    """Raises EngineError for an answer that is not about exactly these tokens and ids."""
    where = f"SGLang server {endpoint.url}: /generate"
    try:
        meta = body["meta_info"]
        reason = meta["finish_reason"]
        if reason["type"] == "abort":
            raise EngineError(f"{where} ended with {reason}")
        entries = [[entry] for entry in meta["input_token_logprobs"][1:]]
        given = meta["input_token_ids_logprobs"][1:] if ids else [[] for _ in labels]
        log_probs = _column(entries, 0, torch.float64).squeeze(1)
        scored = Scored(endpoint.url, log_probs, _column(given, 0, torch.float64), *_likeliest(meta, len(labels), top))
        reported = [entry[0][1] for entry in entries]
        asked = _column(given, 1, torch.int64).tolist()
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise EngineError(f"{where} answered without whole log-probabilities ({type(error).__name__}: {error})") from error
    # SGLang reports the last id of a vocabulary as 0.
    same = len(reported) == len(labels) and all(got in (label, 0) for got, label in zip(reported, labels, strict=True))
    if not same or any(row != ids for row in asked) or len(asked) != len(labels) or scored.top_ids.shape != (len(labels), top):
        raise EngineError(f"{where} answered about other tokens than the {len(labels)} that it was asked for")
    if not all(bool(each.isfinite().all()) for each in (scored.log_probs, scored.given, scored.top_log_probs)):
        raise EngineError(f"{where} gave log-probabilities that are not finite; check the weights of its model")
    return scored


def _likeliest(meta: dict[str, Any], rows: int, top: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [R, top], from arrays, or from entries where a server knows no arrays."""
    if not top:
        return torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, 0, dtype=torch.float64)
    if "input_top_logprobs_val_flat_b64" not in meta:
        entries = meta["input_top_logprobs"][1:]
        return _column(entries, 1, torch.int64), _column(entries, 0, torch.float64)
    shape = meta["input_top_logprobs_shape"]
    ids = np.frombuffer(base64.b64decode(meta["input_top_logprobs_idx_flat_b64"]), np.int32).reshape(shape)
    log_probs = np.frombuffer(base64.b64decode(meta["input_top_logprobs_val_flat_b64"]), np.float32).reshape(shape)
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(log_probs.astype(np.float64))


def _column(rows: list[Any], column: int, dtype: torch.dtype) -> Tensor:
    """[R, N] of R rows of N entries ``[log-probability, id, text]``."""
    width = len(rows[0]) if rows else 0
    if any(len(row) != width for row in rows):
        raise ValueError("rows of unequal length")
    values = np.fromiter((entry[column] for row in rows for entry in row), np.float64, len(rows) * width)
    return torch.from_numpy(values).to(dtype).view(len(rows), width)


def check_informed(answers: Sequence[Scored], vocab_size: int) -> None:
    """Raises EngineError where a server gives all tokens of ``answers`` the same log-probability, or about -ln ``vocab_size``.

    A server without weights does so while its health checks are green.
    """
    for server in sorted({answer.server for answer in answers}):
        own = [answer for answer in answers if answer.server == server]
        values = torch.cat([part.flatten() for answer in own for part in (answer.log_probs, answer.given)])
        if len(values) < _FEWEST_VALUES:
            continue
        if learnt_nothing(values, vocab_size):
            raise EngineError(
                f"SGLang server {server}: {len(values)} log-probabilities are all about {values.mean():.3f} nats, and -ln V is "
                f"{-math.log(vocab_size):.3f}: it has no weights; check teacher.model, the server's log and its load_format"
            )


def learnt_nothing(log_probs: Tensor, vocab_size: int) -> bool:
    """Whether [N] log-probabilities of text, nats, are all the same, or all about -ln ``vocab_size``."""
    constant = log_probs.max() - log_probs.min() < _CONSTANT and log_probs.mean() < -_NOTHING_LEARNT
    return bool(constant or (log_probs + math.log(vocab_size)).abs().mean() < _NOTHING_LEARNT)
