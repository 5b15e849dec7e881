"""The calls of one SGLang server that we use; every one has a timeout, and every failure names the server and the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from megatron_opd.types import OpdError, SamplingParams


class EngineError(OpdError):
    """A server did not do what it was asked."""


@dataclass(frozen=True)
class Endpoint:
    url: str
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


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
class Generated:
    """One response."""

    token_ids: tuple[int, ...]  # [R]
    log_probs: tuple[float, ...]  # [R] nats
    stopped: bool
    versions: tuple[str, ...]  # of the weights that wrote it, in their order

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


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


def parse_generated(body: dict[str, Any], endpoint: Endpoint) -> Generated:
    """Raises EngineError for an answer that is not a whole response."""
    try:
        meta = body["meta_info"]
        reason = meta["finish_reason"]["type"]
        entries = meta["output_token_logprobs"]
        versions = tuple(str(span["version"]) for span in meta.get("weight_versions") or ()) or (str(meta["weight_version"]),)
    except (KeyError, TypeError) as error:
        raise EngineError(f"SGLang server {endpoint.url}: /generate answered without {error}") from error
    if reason not in ("stop", "length"):
        raise EngineError(f"SGLang server {endpoint.url}: /generate ended with {meta['finish_reason']}")
    return Generated(
        token_ids=tuple(int(entry[1]) for entry in entries),
        log_probs=tuple(float(entry[0]) for entry in entries),
        stopped=reason == "stop",
        versions=versions,
    )


class Client:
    """Control calls to one server, one after another."""

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self.endpoint = endpoint
        self._http = httpx.Client(base_url=endpoint.url, headers=endpoint.headers, timeout=timeout)

    def get(self, path: str) -> dict[str, Any]:
        return self._call("GET", path, None)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer as an object. Raises EngineError: no connection or no answer in time, an error, ``success: false``."""
        return self._call("POST", path, body)

    def supports(self, path: str) -> bool:
        """Whether the server has an endpoint: another method than its own is an answer too."""
        try:
            return self._http.get(path).status_code != httpx.codes.NOT_FOUND
        except httpx.HTTPError as error:
            raise EngineError(f"SGLang server {self.endpoint.url}: no answer ({type(error).__name__})") from error

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        name = f"SGLang server {self.endpoint.url}: {path}"
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise EngineError(f"{name}: no answer in {self._http.timeout.read:.0f} s") from error
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
