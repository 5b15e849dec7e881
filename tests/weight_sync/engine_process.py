"""An engine's process with parameters named and fused as SGLang's, the product's loader, and the two calls that a push needs.

For machines where SGLang itself is not installed, above all to see CUDA IPC between two processes: ``python -m
tests.weight_sync.engine_process DEVICE SHAPES`` prints its port. SHAPES: {name: shape} as JSON; all parameters are fp32.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from megatron_opd.sglang.engine_side.opd_weights import receive

# Of what SGLang 0.5.21's unpickler lets pass; tests/sglang/test_sglang.py asks the real one.
LET_PASS = {
    ("torch", "ByteTensor"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch", "uint8"),
    ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
    ("torch.storage", "TypedStorage"),
    ("torch.storage", "UntypedStorage"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in LET_PASS, f"{module}.{name}"
        return super().find_class(module, name)


class _Model(nn.Module):
    def __init__(self, shapes: dict[str, list[int]], device: str) -> None:
        super().__init__()
        self.held = {name: nn.Parameter(torch.full(shape, torch.nan, device=device)) for name, shape in shapes.items()}

    def named_parameters(self, *_: Any, **__: Any) -> Any:  # names with dots are no attributes
        return iter(self.held.items())


def main() -> None:
    device, shapes = sys.argv[1:]
    model = _Model(json.loads(shapes), device)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # http.server's name
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/update_weights_from_tensor":
                (payload,) = body["serialized_named_tensors"]
                receive(model, _Unpickler(io.BytesIO(base64.b64decode(payload))).load())
            else:
                assert self.path == "/save"
                save_file({name: each.data.cpu() for name, each in model.held.items()}, Path(body["file"]))
            answer = b'{"success": true}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Nothing: the first line of the output is the port."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
