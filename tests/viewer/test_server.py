"""The server on real sockets: busy ports, many clients, requests that are too long, and an end that leaves nothing."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import pytest

from engine.core.errors import EngineError
from engine.viewer.config import ViewConfig
from engine.viewer.server import ViewServer, running, serve
from tests.support.known_view import finished_run, previews_of, publish, run_at_work
from tests.test_architecture import ROOT

OPENSEADRAGON = "14d587cd3ee7c4861f1a41077ce642029364a21029956ba635bd8fb1202cf9ad"
"""Of build/openseadragon/openseadragon.min.js in the package openseadragon 6.1.1."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ViewServer]:
    with running(ViewConfig(str(finished_run(tmp_path / "run")), port=0)) as found:
        yield found


def ask(server: ViewServer, path: str, method: str = "GET", headers: dict[str, str] | None = None, body: bytes = b""
        ) -> tuple[int, bytes, http.client.HTTPMessage]:  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, body or None, headers or {})
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def item_of(server: ViewServer) -> str:
    return server.app.library.items[0].id


def test_the_vendored_file_is_the_published_one() -> None:
    static = files("engine.viewer").joinpath("static")
    assert sha256(static.joinpath("openseadragon.min.js").read_bytes()).hexdigest() == OPENSEADRAGON
    assert "Redistribution and use" in static.joinpath("openseadragon.LICENSE.txt").read_text()


def test_a_page_over_http(server: ViewServer) -> None:
    status, page, headers = ask(server, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"viewer.js" in page
    status, body, headers = ask(server, "/", "HEAD")
    assert (status, body, int(headers["Content-Length"])) == (200, b"", len(page))
    assert "Python" not in headers["Server"]


def test_a_name_that_was_pointed_here(server: ViewServer) -> None:
    assert ask(server, "/figures", headers={"Host": "evil.example"})[0] == 421
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    raw.sendall(f"GET /figures HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nHost: evil.example\r\n\r\n".encode())
    assert raw.recv(100).startswith(b"HTTP/1.1 421")
    raw.close()


def test_a_gigabyte_is_refused_before_it_comes(server: ViewServer) -> None:
    """The answer comes while nothing but the headers was sent."""
    origin = f"http://127.0.0.1:{server.port}"
    for path, length, reason in (("/geojson", 2**30, "at most 32 MiB"), ("/redo", 5000, "too long")):
        raw = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        raw.sendall(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: {origin}\r\n"
                    f"Content-Length: {length}\r\n\r\n".encode())  # fmt: skip
        answer = raw.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 413")
        assert reason.encode() in answer
        raw.close()


@pytest.mark.parametrize("lengths", ["Content-Length: -1", "Content-Length: ten", "Transfer-Encoding: chunked",
                                     "Content-Length: 1\r\nContent-Length: 2"])  # fmt: skip
def test_bodies_of_unknown_length(server: ViewServer, lengths: str) -> None:
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    raw.sendall(f"POST /geojson HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n{lengths}\r\n\r\n".encode())
    assert raw.makefile("rb").read().startswith((b"HTTP/1.1 413", b"HTTP/1.1 403", b"HTTP/1.1 400"))
    raw.close()


def test_fifty_clients_at_once(server: ViewServer) -> None:
    """Each follows nothing and asks for tiles; all get them, through four that work at a time."""
    item, got, lock = item_of(server), [], threading.Lock()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        for place in ("0_0", "1_0", "0_1", "1_1"):
            connection.request("GET", f"/dzi/{item}/picture/11/{place}.jpg")
            answer = connection.getresponse()
            data = answer.read()
            with lock:
                got.append((answer.status, data[:2]))
        connection.close()

    clients = [threading.Thread(target=client) for _ in range(50)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert got == [(200, b"\xff\xd8")] * 200


def test_a_run_that_is_deleted_while_it_is_followed(tmp_path: Path) -> None:
    run = run_at_work(tmp_path / "run")
    with running(ViewConfig(str(run), port=0)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", f"/state?item={item_of(server)}")
        stream = connection.getresponse()
        assert stream.readline() == b"retry: 2000\n"
        publish(previews_of(run), 0, 0.5)
        while b"live_20x" not in stream.readline():
            pass
        shutil.rmtree(run)
        rest = stream.read()  # until the stream ends by itself
        assert b'"gone": true' in rest
        assert ask(server, f"/item/{item_of(server)}")[0] == 410
        assert ask(server, "/")[0] == 200
        connection.close()


def test_streams_end_with_the_server(tmp_path: Path) -> None:
    run = run_at_work(tmp_path / "run")
    with running(ViewConfig(str(run), port=0)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", f"/state?item={item_of(server)}")
        stream = connection.getresponse()
        stream.readline()
    stream.read()
    assert stream.isclosed()
    connection.close()


def test_a_busy_port_is_said_and_the_next_one_taken(tmp_path: Path) -> None:
    run = run_at_work(tmp_path / "run")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        server, moved = serve(ViewConfig(str(run), port=port))
        server.server_close()
        assert server.port != port
        assert moved == f"Port {port} is busy; taking {server.port}."


def test_an_address_that_is_not_ours(tmp_path: Path) -> None:
    run = run_at_work(tmp_path / "run")
    with pytest.raises(EngineError, match="must listen on 192.0.2.1"):
        serve(ViewConfig(str(run), host="192.0.2.1", token="a-secret-of-30-letters-or-more"))


def test_the_command_until_ctrl_c(tmp_path: Path) -> None:
    name = "it's <b>mine</b>".replace("/", "")
    run = finished_run(tmp_path / name)
    command = [sys.executable, "-m", "engine.view", str(run), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(f"{run} is shown at http://127.0.0.1:")
    connection = http.client.HTTPConnection("127.0.0.1", int(line.split(":")[-1].split("/")[0]), timeout=60)
    connection.request("GET", "/figures")
    assert json.loads(connection.getresponse().read())["items"][0]["name"] == name
    connection.close()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["nowhere"], 1, "does not exist"),
        ([".", "--host", "0.0.0.0"], 2, "unless a --token is given"),
        (["--port", "8765"], 2, "path"),
    ],
)
def test_wrong_usage(words: list[str], code: int, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    from engine.view import main

    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    assert status == code
    assert reason in capsys.readouterr().err
