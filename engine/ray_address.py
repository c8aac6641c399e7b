"""Which Ray cluster a command means, said in the environment before Ray is imported. It imports no Ray."""

import os


def announce_address(address: str | None) -> None:
    """Set RAY_ADDRESS for `ray.address` (host:port, "auto" or "local"; None: a private Ray).

    The package actors looks there when it chooses how to authenticate, so call this before importing it.
    """
    if address == "auto":
        os.environ.setdefault("RAY_ADDRESS", "auto")
    elif address is not None:
        os.environ["RAY_ADDRESS"] = address
