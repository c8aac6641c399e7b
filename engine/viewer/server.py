"""The viewer's HTTP server: sockets, threads and limits around `App`. The standard library is enough for one machine.

A thread per connection, at most MOST_CONNECTIONS; a slow or silent client costs one of them for IDLE_S at most.
"""

import errno
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from socket import AF_INET, AF_INET6
from typing import Any

from engine import __version__
from engine.core.errors import EngineError
from engine.viewer.app import Answer, App, Request
from engine.viewer.config import ViewConfig
from engine.viewer.guard import Guard
from engine.viewer.jobs import Jobs
from engine.viewer.library import Library

MOST_CONNECTIONS = 512
"""A browser opens six."""
IDLE_S = 60.0
PORTS_TRIED = 50


class ViewServer(ThreadingHTTPServer):
    """Answers until `stop`."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], app: App) -> None:
        """Raises: OSError if the address cannot be had."""
        self.app = app
        self.address_family = AF_INET6 if ":" in address[0] else AF_INET
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(address, Handler)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        """The address to open, without the token."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread; a connection too many is closed."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Do the work of one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is shown, as the base class does."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        """End a server that another thread runs."""
        self.app.stopping.set()
        self.shutdown()
        self.end()

    def end(self) -> None:
        """Answer no more, end streams and jobs; `serve_forever` has returned, or never began."""
        self.app.stopping.set()
        self.server_close()
        self.app.jobs.close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"zoomldm-engine/{__version__}", ""
    timeout = IDLE_S
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = do_GET

    def _serve(self) -> None:
        assert isinstance(self.server, ViewServer)
        app = self.server.app
        request = Request(self.command, self.path, _Headers(self.headers), self._body)
        length = self._length()
        if length is None or length > app.limit(request):
            self.close_connection = True
            self._send(app.too_long(request, length or 0))
            return
        answer = app.answer(request)
        if length and answer.status >= 400:
            self.close_connection = True  # what was sent may not have been read
        self._send(answer)

    def _length(self) -> int | None:
        """Return how many bytes the request brings; None for what cannot be counted."""
        if self.headers.get("Transfer-Encoding"):
            return None
        said = self.headers.get("Content-Length", "0")
        return int(said) if said.isascii() and said.isdigit() and len(said) < 20 else None

    def _body(self) -> bytes:
        return self.rfile.read(self._length() or 0)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.events is not None:
            self._stream(answer)
            return
        if answer.status != 304:
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD" and answer.status != 304:
            self.wfile.write(answer.body)

    def _stream(self, answer: Answer) -> None:
        """Send events until they end or the client is gone."""
        assert answer.events is not None
        self.close_connection = True
        events: Any = answer.events
        try:
            self.send_header("Content-Type", answer.kind)
            self.send_header("Connection", "close")
            self.end_headers()
            for part in chain((answer.body,), events) if self.command != "HEAD" else ():
                self.wfile.write(part)
                self.wfile.flush()
        finally:
            events.close()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal for what the user must know."""


class _Headers(dict[str, str]):
    """Headers by names in any case; of a repeated one all values, so that a second Host cannot hide."""

    def __init__(self, message: Any) -> None:
        super().__init__()
        for name in message:
            self[name.title()] = ", ".join(message.get_all(name))


def serve(config: ViewConfig, allow_write: bool = False) -> tuple[ViewServer, str | None]:
    """Return a server that listens, and a line where its port is not the one asked for; `run` or a thread starts it.

    Raises: EngineError when there is nothing to show or no port to be had.
    """
    guard = Guard(config.host, config.token, allow_write)
    app = App(Library(config), guard, Jobs())
    last = min(config.port + PORTS_TRIED, 65536) if config.port else 1
    for port in range(config.port, last):
        try:
            server = ViewServer((config.host.strip("[]"), port), app)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES) and config.port:
                continue
            raise EngineError(
                f"the viewer must listen on {config.host}, port {port}; {error.strerror}. Choose another --host."
            ) from error
        moved = f"Port {config.port} is busy; taking {server.port}." if config.port not in (0, server.port) else None
        return server, moved
    raise EngineError(f"ports {config.port}..{last - 1} of {config.host} are all busy. Choose another --port.")


@contextmanager
def running(config: ViewConfig, allow_write: bool = False) -> Iterator[ViewServer]:
    """Answer in a thread inside `with`. Raises: EngineError."""
    server, _ = serve(config, allow_write)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)
