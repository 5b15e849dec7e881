"""The calls of one SGLang server that we use; every one has a timeout, and every failure names the server and the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx

from megatron_opd.types import OpdError, SamplingParams


class EngineError(OpdError):
    """A server did not do what it was asked."""


def read_key(section: str, path: str) -> str:
    """The API key in a text file, named by ``section`` of the config. Raises OpdError."""
    try:
        key = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OpdError(f"{section}: {path} cannot be read ({type(error).__name__}); give a text file with the key") from error
    if not key:
        raise OpdError(f"{section}: {path} is empty; write the servers' key into it, or remove {section}")
    return key


@dataclass(frozen=True)
class Endpoint:
    url: str
    api_key: str | None = field(default=None, repr=False)
    life: int = 0  # how often a server that is not ours came back there: it has nothing of what the one before was given

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


class Span(NamedTuple):
    """Response tokens from ``start`` up to ``end`` were written by the weights ``version``."""

    start: int
    end: int
    version: str


@dataclass(frozen=True)
class Generated:
    """One response, or the beginning of one that the server broke off."""

    token_ids: tuple[int, ...]  # [R]
    log_probs: tuple[float, ...]  # [R] nats
    finish: Literal["stop", "length", "abort"]
    spans: tuple[Span, ...]  # in their order; together all R tokens

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def stopped(self) -> bool:
        return self.finish == "stop"

    def then(self, rest: Generated) -> Generated:
        """Both as one response."""
        first = len(self.token_ids)
        return Generated(
            self.token_ids + rest.token_ids,
            self.log_probs + rest.log_probs,
            rest.finish,
            self.spans + tuple(Span(span.start + first, span.end + first, span.version) for span in rest.spans),
        )


def generation(prompt: Sequence[int], sampling: SamplingParams, new_tokens: int, seed: int) -> dict[str, Any]:
    """The body of ``/generate`` for one response."""
    return {
        "input_ids": list(prompt),
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "max_new_tokens": new_tokens,
            "stop_token_ids": list(sampling.stop_ids),
            "sampling_seed": seed,
            "skip_special_tokens": False,
        },
        "return_logprob": True,
    }


def continuation(body: dict[str, Any], written: Generated) -> dict[str, Any]:
    """The body that asks for what is left of a response that was broken off."""
    sampling = body["sampling_params"]
    left = sampling["max_new_tokens"] - len(written.token_ids)
    return {
        **body,
        "input_ids": [*body["input_ids"], *written.token_ids],
        "sampling_params": {**sampling, "max_new_tokens": left},
    }


def parse_part(body: dict[str, Any], endpoint: Endpoint) -> Generated:
    """A response, or the beginning of one. Raises EngineError for an answer that is neither."""
    try:
        meta = body["meta_info"]
        reason = meta["finish_reason"]["type"]
        entries = meta.get("output_token_logprobs") or [] if reason == "abort" else meta["output_token_logprobs"]
        token_ids = tuple(int(entry[1]) for entry in entries)
        log_probs = tuple(float(entry[0]) for entry in entries)
        whole = [{"version": meta["weight_version"], "start": 0, "end": len(token_ids)}]
        spans = tuple(
            Span(int(span["start"]), int(span["end"]), str(span["version"])) for span in meta.get("weight_versions") or whole
        )
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise EngineError(
            f"SGLang server {endpoint.url}: /generate answered something else than a response ({type(error).__name__}: {error})"
        ) from error
    if reason not in ("stop", "length", "abort"):
        raise EngineError(f"SGLang server {endpoint.url}: /generate ended with {meta['finish_reason']}")
    return Generated(token_ids, log_probs, reason, spans)


def is_healthy(endpoint: Endpoint, timeout: float = 5.0) -> bool:
    """Whether the server says so within ``timeout`` seconds."""
    try:
        answer = httpx.get(f"{endpoint.url}/health", headers=endpoint.headers, timeout=timeout, trust_env=False)
    except httpx.HTTPError:
        return False
    return answer.status_code == httpx.codes.OK


class Client:
    """Control calls to one server, one after another."""

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self.endpoint, self._timeout = endpoint, timeout
        # Servers are reached directly: a proxy of the environment would see the key.
        self._http = httpx.Client(base_url=endpoint.url, headers=endpoint.headers, timeout=timeout, trust_env=False)

    def get(self, path: str) -> dict[str, Any]:
        return self._call("GET", path, None)

    def post(self, path: str, *, timeout: float | None = None, **body: Any) -> dict[str, Any]:
        """The answer as an object. Raises EngineError: no connection or no answer in time, an error, ``success: false``.

        ``timeout``: seconds, in place of the client's own.
        """
        return self._call("POST", path, body, timeout)

    def delete(self, path: str) -> dict[str, Any]:
        return self._call("DELETE", path, None)

    def supports(self, path: str) -> bool:
        """Whether the server has an endpoint: another method than its own is an answer too."""
        try:
            return self._http.get(path).status_code != httpx.codes.NOT_FOUND
        except httpx.HTTPError as error:
            raise EngineError(f"SGLang server {self.endpoint.url}: no answer ({type(error).__name__})") from error

    def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout: float | None = None) -> dict[str, Any]:
        name, limit = f"SGLang server {self.endpoint.url}: {path}", timeout or self._timeout
        try:
            answer = self._http.request(method, path, json=body, timeout=limit)
        except httpx.TimeoutException as error:
            raise EngineError(f"{name}: no answer in {limit:.0f} s") from error
        except httpx.HTTPError as error:
            raise EngineError(f"{name}: {error}") from error
        if answer.is_error:
            raise EngineError(f"{name}: {answer.status_code} {' '.join(answer.text.split())[:300]}")
        try:
            content = answer.json()
        except ValueError:
            content = {}
        content = content if isinstance(content, dict) else {}
        if content.get("success") is False:
            raise EngineError(f"{name}: {content.get('message') or content}")
        return content

    def close(self) -> None:
        self._http.close()
