"""Who is answered: Host, Origin and token of a request, and the headers that bind a browser.

A page of another site must not read or start anything here, not even after its name was pointed at this machine (DNS
rebinding). It knows headers, not pictures. Sources: Fetch standard (Sec-Fetch-Site), CSP level 3, RFC 6265bis.
"""

import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from engine.viewer.config import is_loopback

COOKIE = "zoomldm_view"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
OSD_STYLE = "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='"
"""The one style that OpenSeadragon 6.1.1 adds by itself (an outline on touch screens)."""
NEVER_FRAMED = "'none'"
LOOPBACK_PAGES = "'self' http://127.0.0.1:* http://localhost:*"
"""Pages that may show the viewer in a frame: notebooks on this machine."""


@dataclass(frozen=True)
class Guard:
    """Judges requests of one viewer."""

    host: str
    """What it listens on."""
    token: str | None = None
    allow_write: bool = False

    def refusal(self, headers: Mapping[str, str], writes: bool, opens_page: bool) -> tuple[int, str] | None:
        """Return (status, reason) when a request must not be answered, whatever it carries; None when it may.

        `opens_page` is a page that a person opens, from wherever its link was.
        """
        host = headers.get("Host", "")
        if not self._is_ours(host):
            return 421, f"The Host header must name this machine; got {host[:80]!r}. Open the printed address."
        origin = headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            return 403, f"Requests must come from the viewer's own page; this came from {origin[:80]!r}."
        if writes and origin is None:
            return 403, "What starts work must say where it comes from (Origin). Use the viewer's own page."
        if not opens_page and headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            return 403, "Requests must come from the viewer's own page; this came from another site."
        return None

    def _is_ours(self, host: str) -> bool:
        """An address cannot be rebound, a name can: only names that are surely this machine's count."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].strip("[]").lower()
        if is_loopback(name):
            return True
        if is_loopback(self.host):
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in {self.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        return True

    def knows(self, headers: Mapping[str, str]) -> bool:
        """Say whether a request carries the token, as a cookie or as Authorization: Bearer."""
        if self.token is None:
            return True
        try:
            cookie = SimpleCookie(headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        kind, _, bearer = headers.get("Authorization", "").partition(" ")
        return (cookie is not None and _same(cookie.value, self._kept)) or (
            kind.lower() == "bearer" and self.is_token(bearer)
        )

    def is_token(self, given: str) -> bool:
        """Compare in constant time."""
        return self.token is not None and _same(given, self.token)

    @property
    def cookie(self) -> str:
        """The Set-Cookie header; it holds a digest, from which the token cannot be told."""
        return f"{COOKIE}={self._kept}; Path=/; HttpOnly; SameSite=Strict"

    @property
    def _kept(self) -> str:
        return hashlib.sha256(f"zoomldm view {self.token}".encode()).hexdigest()

    def headers(self, report: bool = False) -> dict[str, str]:
        """Return what every answer carries; a stored `report` may have styles, and no script at all."""
        frames = LOOPBACK_PAGES if is_loopback(self.host) and not self.allow_write else NEVER_FRAMED
        policy = (
            f"default-src 'none'; script-src 'self'; style-src 'self' {OSD_STYLE}; img-src 'self' data: blob:; "
            f"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors {frames}"
        )
        if report:
            policy = f"sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors {frames}"
        return {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
        }


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode(), b.encode())
