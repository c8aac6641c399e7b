"""What the viewer is asked for, and who may reach it."""

import ipaddress
from dataclasses import dataclass

PORT = 8765
SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class ViewConfig:
    """What is shown, where, and what the browser may do."""

    path: str
    """A run folder, a slide or picture, or a folder of them; may be given first, without --path."""
    port: int = PORT
    """Port to listen on; when it is busy the next free one is taken and named. 0 takes any."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but this machine's loopback needs --token."""
    token: str | None = None
    """Secret (16 letters or more) that the first address in the browser must carry; kept as a cookie then."""
    features: str | None = None
    """Output folder of engine.extract_features: tiles, tissue and report of slides of the same names."""
    mil: str | None = None
    """Run folder of mil.train: its stored attention becomes a layer over slides of the same names."""
    mpp: float | None = None
    """µm/px of pictures that state none (PNG, JPEG); without it they have no scale bar."""
    model: str | None = None
    """Model (demo, a folder, a Hub id) to decode true px of regions with, while a run is at work; None: not at all."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must lie in 0..65535; got {self.port}.")
        if self.mpp is not None and not 0 < self.mpp < 1e9:
            raise ValueError(f"mpp must be positive (µm/px); got {self.mpp}. 20x is 0.5.")
        if self.token is not None and (len(self.token) < SHORTEST_TOKEN or not self.token.isascii()):
            raise ValueError(
                f"token must have at least {SHORTEST_TOKEN} ASCII letters, so that nobody guesses it; got "
                f"{len(self.token)}. `python -c 'import secrets; print(secrets.token_urlsafe())'` makes one."
            )
        if not self.is_local and self.token is None:
            raise ValueError(
                f"host must be 127.0.0.1, ::1 or localhost unless a --token is given; got {self.host!r}. Pass "
                "--token, or reach this machine through `ssh -L`."
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Say whether a name or address is this machine's own, whoever resolves it."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
