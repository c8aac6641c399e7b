"""The environment variables Ray reads at import, and whether an address answers; knows no cluster and imports no Ray.

Invariant: what the user set stays as it is. Source: Ray 2.60, token authentication and usage statistics.
"""

import os
import secrets
import socket
import sys
from pathlib import Path

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What an HTTP/2 client says first (RFC 9113, 3.4), with an empty SETTINGS frame; Ray's head speaks gRPC over it."""
NICENESS_VARIABLE = "RAY_worker_niceness"
SETTINGS_FRAME = 4
"""Type of the frame that every HTTP/2 server answers with; the fourth byte of a frame is its type."""


def temporary_folder() -> Path:
    """Return the folder below which Ray keeps its sessions and sockets."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp"))


def announcement() -> Path:
    """Return the file in which `ray start` leaves the address of this machine's cluster; it need not be there."""
    return temporary_folder() / "ray" / "ray_current_cluster"


def prepare_environment() -> None:
    """Choose telemetry, niceness and authentication, unless the user has; call before Ray is imported.

    Ray starts its workers at niceness 15: on a busy machine everything else then comes before replicas, the driver that
    waits for them included. A cluster that is joined has chosen for itself.

    With a token on this machine, it is used. Without one, what a private Ray needs and what a cluster needs differ. A
    private Ray gets a random token, for this process and its children: other users of the machine cannot run code in
    it, and nothing is written to ~/.ray. A cluster to join (RAY_ADDRESS) then has no authentication, or would refuse
    any token made up here; its calls back to this process carry none, and a process that demands one loses its actors
    at birth ("all references to the actor were removed").
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(NICENESS_VARIABLE, "0")
    if "ray" in sys.modules or "RAY_AUTH_MODE" in os.environ:
        return
    known = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if known or (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_MODE"] = "token"
    elif os.environ.get("RAY_ADDRESS", "local") != "local":
        os.environ["RAY_AUTH_MODE"] = "disabled"
    else:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def silence_of(host: str, port: int, timeout_s: float) -> str | None:
    """Say why no Ray head answers at host:port, or None when one does.

    A TCP connection is not enough: a frozen head or a web server accepts it too, and Ray then waits two minutes.
    """
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            connection.sendall(HTTP2_PREFACE)
            answer = connection.recv(9)
    except OSError as error:
        return str(error)
    if len(answer) < 4 or answer[3] != SETTINGS_FRAME or answer.startswith(b"HTTP"):
        return "something answers there, but not a Ray head"
    return None
