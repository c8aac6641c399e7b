"""What a run knows about itself: state.json, its keys, and which runs may go on.

It knows nothing of arrays, levels, pixels or buckets.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from engine.core.errors import CanvasError
from engine.core.files import check_keys, disk_error, write_atomically

STATE_VERSION = 1
"""Raise it when what lies in a run folder changes its meaning."""


SINCE: dict[str, object] = {
    "sampling.from_guide": 0,
    "sampling.solver": "ddim",
    "sampling.weight_from": 1000,
    "sampling.weight_to": 1,
    "guidance.cell": 1,
    "guidance.back_projection": 255,
}
"""Keys that runs of earlier releases lack, and what those did."""
SAID_NOTHING: dict[str, object] = {"sampling.from_guide": 600}
"""What None was in a key that new runs settle."""
GONE = ("guidance.iterations",)
"""Keys of earlier releases that decide nothing any more."""


@dataclass(frozen=True)
class Progress:
    """How far a run is; everything it names is on disk."""

    pass_index: int = 0
    """Which pass of the plan."""
    steps: int = 0
    """Steps of that pass that are committed."""
    decoded_px: int = 0
    """Image rows of the finest level that are decoded and written."""
    finished: bool = False
    """All exports are done."""


@dataclass(frozen=True)
class RunState:
    """The content of state.json."""

    keys: dict[str, object]
    """Everything that decides the bytes of the picture, flat."""
    progress: Progress
    buffers: dict[str, int | None]
    """Level → which of its two arrays is committed; None = neither yet."""
    commits: int = 0
    writer: int = 0
    """Which opening of the run wrote this; counted in object storage only."""
    store: str | None = None
    """Where the latents and their own state lie, when that is not the folder of this file."""

    @property
    def digest(self) -> str:
        """Return the sha256 of the keys: equal digests make equal pictures."""
        return _sha256(self.keys)


def _sha256(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def load_state(path: Path) -> RunState:
    """Read state.json. Raises CanvasError when it is garbled, edited or of another version of the engine."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise disk_error(error, f"{path} cannot be read") from error
    return decode_state(data, str(path))


def save_state(path: Path, state: RunState) -> None:
    """Replace state.json. When this returns, the new state survives a power cut. Raises CanvasError."""
    write_atomically(path, encode_state(state))


def decode_state(data: bytes, name: str) -> RunState:
    """Read the content of a state.json, `name` in messages. Raises CanvasError as `load_state` does."""
    try:
        record = json.loads(data)
        version = record["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _garbled(name, f"it is not the JSON object this engine writes ({error})") from error
    if version != STATE_VERSION:
        raise CanvasError(
            f"{name} must be of version {STATE_VERSION}; got {version!r}, written by another release of the "
            "engine. Continue with that release, or use another output.folder."
        )
    if record.pop("checksum", None) != _sha256(record):
        raise _garbled(name, "its checksum does not match its content")
    progress = Progress(**{f.name: record[f.name] for f in fields(Progress)})
    where = {name: record[name] for name in ("writer", "store") if name in record}
    return RunState(record["keys"], progress, record["buffers"], record["commits"], **where)


def encode_state(state: RunState) -> bytes:
    """Return the content of state.json."""
    record: dict[str, object] = {
        "version": STATE_VERSION,
        "digest": state.digest,
        **asdict(state.progress),
        "commits": state.commits,
        "buffers": state.buffers,
        "keys": state.keys,
    }
    record |= {"writer": state.writer} if state.writer else {}
    record |= {"store": state.store} if state.store else {}
    record["checksum"] = _sha256(record)
    return (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()


def _garbled(name: str, why: str) -> CanvasError:
    return CanvasError(
        f"{name} must say which step is committed; {why}. Restore it from a backup; without it the latents "
        f"cannot be used: remove {name.removesuffix('/state.json')} or use another output.folder to start again."
    )


def check_run_keys(where: Path | str, old: dict[str, object], new: dict[str, object]) -> None:
    """Refuse to continue a run with other keys; keys that earlier releases lacked count as what those did.

    Raises: CanvasMismatchError naming each key, old and new.
    """
    kept = {key: value for key, value in old.items() if key not in GONE}
    kept |= {key: was for key, was in SAID_NOTHING.items() if key in old and old[key] is None and new.get(key)}
    check_keys(where, {key: value for key, value in SINCE.items() if key in new} | kept, new)
