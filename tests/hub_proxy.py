"""A proxy that tunnels: it answers CONNECT, and passes on what it cannot read."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler

from hub_server import Local


class Proxy(Local):
    """The proxy; use it as a context manager.

    Every name leads to the port `behind` of this machine. `requests` are the targets of all CONNECTs; with
    another `status` than 200 they are refused.
    """

    def __init__(self, behind: int) -> None:
        super().__init__(_Handler)
        self.behind, self.requests, self.status = behind, [], 200


class _Handler(BaseHTTPRequestHandler):
    owner: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.owner.requests.append(self.path)
        self.close_connection = True
        self.send_response(self.owner.status)
        self.end_headers()
        if self.owner.status == 200:
            with socket.create_connection(("127.0.0.1", self.owner.behind)) as server:
                back = threading.Thread(target=_pass_on, args=(server, self.connection), daemon=True)
                back.start()
                _pass_on(self.connection, server)
                back.join()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    """Copy until one side ends."""
    try:
        while block := source.recv(1 << 16):
            target.sendall(block)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass
