"""What a run at work looks like: per level a small JPEG of x0 after a committed step, and how fast the run is.

For whoever looks on, such as the viewer; no run reads them, and none waits for a reader. A file is the old one or the
whole new one. Writing takes at most about `SHARE` of a run's time: a step that comes sooner is left out. It knows rows
of latents and a colour map, not models or tiles. The facts of a JPEG stand in its comment (ITU-T T.81, B.2.4.5), so
that pixels and facts are always of one step.
"""

import json
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

from engine.canvas.storage import PREVIEWS
from engine.core.errors import CanvasError
from engine.core.files import write_atomically

log = logging.getLogger(__name__)
SPEED = "speed.json"
LONGEST_PX = 1024
"""Of a preview: 3 MB of px, however large the canvas."""
SHARE = 0.01
QUALITY = 95
"""Of a preview, whose few px are enlarged a lot."""
_COMMENT, _START = b"\xff\xfe", b"\xff\xd8"
Colour = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Latents (3, h, w) → colours in [−1, 1], (3, h, w); affine, so that means may be taken first."""


@dataclass(frozen=True)
class PreviewFacts:
    """What a preview shows."""

    level: str
    pass_name: str
    step: int
    """Steps of the pass that are done; x0 is the last one's prediction."""
    steps: int
    height: int
    width: int
    """Latent px of the level."""
    factor: int
    """Latent px of a px on each axis; the last px may reach beyond the level."""
    reduced: int
    """Px of the run's picture per px of this level's picture."""
    mpp: float
    """µm/px of the run's picture."""


@dataclass(frozen=True)
class Speed:
    """How fast a run is."""

    pass_name: str
    step: int
    steps: int
    tiles: int
    """Evaluated by this process."""
    tiles_per_s: float
    remaining_s: float | None
    """Of this pass; None while that is not known."""
    replicas: int
    process: int
    at: float
    """Seconds since 1970 when it was written."""


@dataclass(frozen=True)
class Shown:
    """What previews say of their run."""

    colour: Colour | None
    """None when the checkpoint has no colour map: then only the speed is written."""
    reduced: Mapping[str, int]
    """Level → px of the picture per px of the level."""
    mpp: float
    """µm/px of the picture."""
    tiles: Callable[[], int]
    """How many tiles this process has evaluated."""
    replicas: Callable[[], int]
    """How many are alive."""


class LivePreviews:
    """Writes the previews of one run. Threads may give rows side by side."""

    def __init__(self, folder: Path, shown: Shown, share: float = SHARE) -> None:
        """`share` of the run's time at most is spent, but for the first and the last step of each pass."""
        self._folder, self._run = folder / PREVIEWS, shown
        self._share, self._lock = share, threading.Lock()
        self._spent_s, self._began_s = 0.0, time.monotonic()
        self._shown: dict[tuple[str, int], tuple[NDArray[np.uint8], int, tuple[int, int]]] = {}
        self._pass: tuple[str, int, float, int] | None = None
        """Name of the pass, and its first step, time and tiles here."""
        self._due: dict[int, bool] = {}
        self._refused = False

    def rows(self, level: str, size: tuple[int, int], number: int, last: bool, y0: int, x0: np.ndarray) -> None:
        """Take rows of x0, float32 (3, n, w), of a level of `size` latent px at step `number` of the pass.

        `y0` is a multiple of 256; `last` says that it is the pass's last step, which is always shown, as the first is.
        """
        if self._refused or self._run.colour is None:
            return
        start = time.monotonic()
        with self._lock:
            if number not in self._due:
                first = self._pass is not None and number == self._pass[1]
                self._due[number] = first or last or self._spent_s <= self._share * (start - self._began_s)
            if not self._due[number]:
                return
            factor = _factor(size)
            if (level, number) not in self._shown:
                shape = (*(-(-side // factor) for side in size), 3)
                self._shown[level, number] = np.zeros(shape, np.uint8), factor, size
            pixels = self._shown[level, number][0]
        small = self._run.colour(_box_mean(x0, factor))
        top = y0 // factor
        pixels[top : top + small.shape[1]] = np.clip((small + 1) * 127.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        with self._lock:
            self._spent_s += time.monotonic() - start

    def committed(self, pass_name: str, number: int, steps: int) -> None:
        """Write what step `number` of a pass showed, now that it is committed; −1: the pass begins.

        A disk that refuses costs the previews, not the run: a warning says so, and no more are written.
        """
        if self._refused:
            return
        try:
            self._write(pass_name, number, steps)
        except (OSError, CanvasError) as error:
            log.warning("no more live previews are written: %s", error)
            self._refused = True
            self._shown.clear()

    def _write(self, pass_name: str, number: int, steps: int) -> None:
        start = time.monotonic()
        if self._pass is None or self._pass[0] != pass_name:
            self._pass = pass_name, number + 1, start, self._run.tiles()
            self._shown.clear()
            self._due.clear()
        if not self._due.pop(number, number + 1 in (0, steps)):
            return
        self._folder.mkdir(exist_ok=True)
        for (level, step), (pixels, factor, size) in list(self._shown.items()):
            if step == number:
                facts = PreviewFacts(
                    level, pass_name, number + 1, steps, *size, factor, self._run.reduced[level], self._run.mpp
                )
                write_atomically(self._folder / f"{level}.jpg", with_facts(pixels, facts))
            if step <= number:
                del self._shown[level, step]
        _, first, since, tiles = self._pass
        done, seconds = number + 1 - first, max(start - since, 1e-9)
        count = self._run.tiles()
        remaining = seconds / done * (steps - number - 1) if done > 0 else None
        speed = Speed(pass_name, number + 1, steps, count, (count - tiles) / seconds, remaining, self._run.replicas(),
                      os.getpid(), time.time())  # fmt: skip
        write_atomically(self._folder / SPEED, json.dumps(asdict(speed)).encode())
        with self._lock:
            self._spent_s += time.monotonic() - start

    @property
    def spent_s(self) -> float:
        """Seconds that were spent on previews so far."""
        return self._spent_s


def _factor(size: tuple[int, int]) -> int:
    """Return the power of two by which a level fits into LONGEST_PX; bands of 256 rows are whole multiples of it."""
    factor = 1
    while -(-max(size) // factor) > LONGEST_PX and factor < 256:
        factor *= 2
    return factor


def _box_mean(rows: np.ndarray, factor: int) -> NDArray[np.float32]:
    if factor == 1:
        return rows
    down, across = -rows.shape[1] % factor, -rows.shape[2] % factor
    whole = np.pad(rows, ((0, 0), (0, down), (0, across)), mode="edge") if down or across else rows
    parts = whole.reshape(3, whole.shape[1] // factor, factor, whole.shape[2] // factor, factor)
    return parts.mean(axis=(2, 4), dtype=np.float32)


def affine_colour(matrix: np.ndarray, offset: np.ndarray) -> Colour:
    """Return colour = matrix · latent + offset; matrix (3, 3), offset (3,)."""
    m, o = matrix.astype(np.float32), offset.astype(np.float32)[:, None, None]
    return lambda latents: np.tensordot(m, latents, axes=(1, 0)) + o


def with_facts(pixels: NDArray[np.uint8], facts: PreviewFacts) -> bytes:
    """Return uint8 (h, w, 3) as a JPEG whose comment holds the facts."""
    data = simplejpeg.encode_jpeg(pixels, QUALITY, "RGB", "444")
    said = json.dumps(asdict(facts)).encode()
    return _START + _COMMENT + struct.pack(">H", len(said) + 2) + said + data[2:]


def read_facts(data: bytes) -> PreviewFacts | None:
    """Return what a preview says of itself; None for another file."""
    if not data.startswith(_START + _COMMENT) or len(data) < 6:
        return None
    (length,) = struct.unpack(">H", data[4:6])
    try:
        record = json.loads(data[6 : 4 + length])
        return PreviewFacts(**{f.name: _checked(record, f.name, f.type) for f in fields(PreviewFacts)})
    except (ValueError, KeyError, TypeError):
        return None


def read_speed(folder: Path) -> Speed | None:
    """Return how fast the run in a folder was when it last said so; None if it never did."""
    try:
        record = json.loads((folder / PREVIEWS / SPEED).read_bytes())
        return Speed(**{f.name: record[f.name] for f in fields(Speed)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checked(record: Mapping[str, Any], name: str, kind: object) -> Any:
    value = record[name]
    if kind is float and isinstance(value, int | float) and value > 0:
        return float(value)
    if (
        kind is float
        or (kind is int and (not isinstance(value, int) or value < 0))
        or (kind is str and not isinstance(value, str))
    ):
        raise ValueError(name)
    return value
