"""A server that somebody else started: checked before it is used, taken back when it is well again, never stopped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_opd.hf_folder import HFFolder
from megatron_opd.sglang.client import Client, Endpoint, EngineError, is_healthy
from megatron_opd.sglang.roster import Losses
from megatron_opd.sglang.server import LOADER
from megatron_opd.types import OpdError

_CALL_SECONDS = 30.0
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "tie_word_embeddings", "num_experts", "num_local_experts"),
)


@dataclass(frozen=True)
class Expected:
    """What a server must serve to be of use."""

    section: str  # of the config
    model: str  # whose weights, as messages name it
    folder: HFFolder
    tokens: int  # of the longest prompt and response together
    tp: int | None = None  # None: any
    dtype: str | None = None
    has_loader: bool = False  # ours, which the way of the weights needs


class Attached:
    """A place in a :class:`~megatron_opd.sglang.fleet.Fleet`."""

    def __init__(self, endpoint: Endpoint, expected: Expected, startup_timeout: float) -> None:
        """``startup_timeout``: seconds until it must be ready."""
        self.endpoint, self._expected, self._startup_timeout = endpoint, expected, startup_timeout
        self._given_up = False

    @property
    def model(self) -> str:
        return self._expected.model

    def wait_until_ready(self) -> None:
        """Raises OpdError: not there in time, or another model, layout or precision than the run's."""
        deadline = time.monotonic() + self._startup_timeout
        while not is_healthy(self.endpoint):
            if time.monotonic() > deadline:
                raise OpdError(
                    f"{self._expected.section}.urls: {self.endpoint.url} is not ready after {self._startup_timeout:.0f} s; "
                    "start it as `megatron-opd check` says, or raise rollout.startup_timeout"
                )
            time.sleep(0.5)
        self._check()

    def poll(self, roster: Losses) -> None:
        if self._given_up or not roster.is_lost(self.endpoint) or not is_healthy(self.endpoint):
            return
        try:
            self._check()
        except EngineError:
            return  # not yet well
        except OpdError as error:
            self._given_up = True
            roster.give_up(self.endpoint, str(error))
            return
        lost, self.endpoint = self.endpoint, replace(self.endpoint, life=self.endpoint.life + 1)
        roster.welcome(self.endpoint, instead_of=lost)

    def stop(self) -> None:
        """It is not ours."""

    def _check(self) -> None:
        client = Client(self.endpoint, _CALL_SECONDS)
        try:
            model, server, cards = client.get("/model_info"), client.get("/server_info"), client.get("/v1/models")
        except EngineError as error:
            if ": 401 " in str(error):
                raise OpdError(
                    f"{self._expected.section}.api_key_file: {self.endpoint.url} refuses the key; give the one it was started "
                    "with"
                ) from error
            raise
        finally:
            client.close()
        for finding in _differences(model, server, cards, self._expected):
            raise OpdError(f"{self._expected.section}.urls: {self.endpoint.url} {finding}")


def _differences(
    model: Mapping[str, Any], server: Mapping[str, Any], cards: Mapping[str, Any], expected: Expected
) -> list[str]:
    found = []
    architectures = model.get("architectures") or []
    if expected.folder.architecture not in architectures:
        found.append(
            f"serves {', '.join(architectures) or 'an unknown model'}, but the {expected.model} is a "
            f"{expected.folder.architecture}; start it with --model-path {expected.folder.path}"
        )
    served = Path(str(model.get("model_path")))
    if (served / "config.json").is_file():  # elsewhere the shapes show when the weights arrive
        theirs, ours = HFFolder(served).config.to_dict(), expected.folder.config.to_dict()
        found += [
            f"serves {served} with {name}={theirs.get(name)}, but the {expected.model} has {ours[name]}; start it with "
            f"--model-path {expected.folder.path}"
            for name in _SIZES
            if name in ours and theirs.get(name) != ours[name]
        ]
    if expected.tp is not None and server.get("tp_size") != expected.tp:
        found.append(
            f"has tp_size {server.get('tp_size')}, but rollout.tp is {expected.tp}; set rollout.tp={server.get('tp_size')}"
        )
    for name in ("pp_size", "dp_size"):
        if server.get(name, 1) != 1:
            found.append(f"has {name} {server[name]}; start one server for each replica, with tensor parallelism alone")
    if expected.dtype is not None and server.get("dtype") not in (expected.dtype, "auto"):
        found.append(
            f"has dtype {server.get('dtype')}, but student.dtype is {expected.dtype}; start it with --dtype {expected.dtype}"
        )
    if expected.has_loader and LOADER not in (server.get("custom_weight_loader") or []):
        found.append(
            f"cannot receive a rank's own weights; start it with --custom-weight-loader {LOADER}, as `megatron-opd check` "
            "says, or set rollout.weight_sync=native"
        )
    lengths = [card["max_model_len"] for card in cards.get("data", []) if card.get("max_model_len")]
    if lengths and max(lengths) < expected.tokens:
        found.append(
            f"takes {max(lengths)} tokens, but the longest prompt and response have {expected.tokens} together; start it with "
            f"--context-length {expected.tokens}, or lower rollout.sampling.max_new_tokens"
        )
    return found
