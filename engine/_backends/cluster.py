"""Which Ray cluster a command would find on this machine, without connecting to it."""

import os


def find_cluster(wait_s: float) -> str:
    """Say which cluster RAY_ADDRESS names, or `ray start` has left here, and whether it answers; imports no Ray."""
    from actors.environment import announcement, silence_of

    named = os.environ.get("RAY_ADDRESS")
    try:
        address = named if named not in (None, "auto", "local") else announcement().read_text().strip()
    except OSError:
        address = ""
    if named == "local" or not address:
        return "no cluster is announced here; a command starts a private Ray"
    whose = "RAY_ADDRESS names" if address == named else "`ray start` has left"
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return f"{whose} {address}, which is no host:port"
    silence = "nobody was asked" if not wait_s else silence_of(host.strip("[]"), int(port), wait_s)
    how = "" if address == named else "; --ray.address auto joins it, else a command starts a private Ray"
    return f"{whose} the cluster at {address}, " + (f"which answers{how}" if silence is None else f"silent: {silence}")
