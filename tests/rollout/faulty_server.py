"""A real HTTP server that answers ``/generate`` as SGLang does, or fails as it is told, as no healthy server does."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from megatron_opd.sglang.client import Endpoint

Fault = Callable[[dict[str, Any], int], str]  # the body of a request, how many came before → what to do


def next_token(ids: Sequence[int]) -> int:
    """The server's model: a function of all ids before."""
    return (31 * sum(ids) + 7 * len(ids)) % 97


def response_to(prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(next_token(ids))
    return tuple(ids[len(prompt) :])


class FaultyServer:
    """``fault`` says ok, hang, reset, half, garbage, no_logprobs, abort, abort_at_once, stop_at_once, or an HTTP status.

    For each request.
    """

    def __init__(
        self, fault: Fault = lambda body, number: "ok", *, healthy: bool = True, version: str = "1", seconds: float = 0.01
    ) -> None:
        """``seconds``: of each answer."""
        self.fault, self.healthy, self.version, self.seconds = fault, healthy, version, seconds
        self.asked: list[list[int]] = []  # input ids of each request
        self.answered: list[list[int]] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.endpoint = Endpoint(f"http://127.0.0.1:{self._server.server_port}", "key")
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


def _handler(server: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            self._send(200 if server.healthy else 503, b"")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = len(server.asked)
                server.asked.append(body["input_ids"])
            fault = server.fault(body, number)
            if fault.isdecimal():
                self._send(int(fault), b'{"error": "as it was told"}')
            elif fault == "hang":
                server.closing.wait(60)
            elif fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
            elif fault == "half":
                content = self._answer(body, "ok")
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif fault == "garbage":
                self._send(200, b"<html>a proxy's apology</html>")
            else:
                time.sleep(server.seconds)
                if fault in ("ok", "abort"):
                    with server.lock:
                        server.answered.append(body["input_ids"])
                self._send(200, self._answer(body, fault))

        def _answer(self, body: dict[str, Any], fault: str) -> bytes:
            sampling = body["sampling_params"]
            wanted = sampling["max_new_tokens"]
            tokens = response_to(
                body["input_ids"], {"abort": wanted // 2, "abort_at_once": 0, "stop_at_once": 0}.get(fault, wanted)
            )
            meta = {
                "finish_reason": {"type": fault.partition("_")[0] if fault.startswith(("abort", "stop")) else "length"},
                "output_token_logprobs": [[-float(token), token, None] for token in tokens],
                "weight_version": server.version,
                "weight_versions": [{"version": server.version, "start": 0, "end": len(tokens)}],
            }
            if fault == "no_logprobs":
                del meta["output_token_logprobs"]
            return json.dumps({"output_ids": list(tokens), "meta_info": meta}).encode()

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
