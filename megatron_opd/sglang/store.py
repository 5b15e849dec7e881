"""A key-value store between processes that are in no group together."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore


def open_store(host: str, timeout: float) -> TCPStore:
    """A key-value store in this process that listens at ``host`` alone; ``timeout``: seconds of one wait in it."""
    listener = socket.create_server((host, 0), backlog=1024)
    port = int(listener.getsockname()[1])
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
