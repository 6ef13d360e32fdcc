"""A file server on the loopback interface that can be told to misbehave."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Server(ThreadingHTTPServer):
    """Serve `content`; `cut` ends a response after so many bytes, `shift` moves where one that continues begins."""

    daemon_threads = True

    def __init__(self, content: bytes, name: str = "file.bin") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.name = name
        self.cut: int | None = None
        self.refusal: int | None = None
        self.ranges = True
        self.shift = 0
        self.ranges_asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content, asked = self.server.content, self.headers["Range"]
        self.server.ranges_asked.append(asked)
        if self.server.refusal:
            return self.send_error(self.server.refusal)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start and start >= len(content):
            return self.send_error(416)
        start += self.server.shift if start else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.cut])

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(content: bytes, name: str = "file.bin") -> Iterator[Server]:
    """Serve on the loopback interface, which no proxy may get between."""
    with pytest.MonkeyPatch.context() as patch, Server(content, name) as server:
        patch.setenv("no_proxy", "*")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
