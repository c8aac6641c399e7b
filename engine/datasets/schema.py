"""What a prepared set says about itself: dataset.json, slide.json, and which arrays must lie beside them.

It knows names, shapes and types, not what is in the arrays. The layout is in prepared.py.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.core.errors import PreparedError, PreparedMismatchError
from engine.core.units import LATENT_CHANNELS, TILE_LATENT_PX, TILE_PX, MagnificationScale

SET_VERSION = 1
"""Raise it when what lies in a prepared set changes its meaning."""
DATASET, SLIDE, SLIDES = "dataset.json", "slide.json", "slides"
LATENT_SHAPE = (LATENT_CHANNELS, TILE_LATENT_PX, TILE_LATENT_PX)
IMAGE_SHAPE = (TILE_PX, TILE_PX, 3)


@dataclass(frozen=True)
class SetFacts:
    """What all slides of a set share."""

    domain: Literal["brca", "naip"]
    magnifications: tuple[str, ...]
    """Base first; level i is 2**i times coarser."""
    base_mpp: float
    """µm/px of the first."""
    encoder: str
    """Name of the SSL encoder."""
    encoder_digest: str
    """SHA-256 of its weights."""
    ssl_dim: int
    """D, the length of one vector."""
    autoencoder_digest: str
    """SHA-256 of the autoencoder's weights; latents of another one mean nothing."""
    scale_factor: float = 1.0
    """What the autoencoder's latents are multiplied with (ModelConfig.scale_factor)."""
    latent_shape: tuple[int, ...] = LATENT_SHAPE
    tile_px: int = TILE_PX
    version: int = SET_VERSION

    @property
    def scale(self) -> MagnificationScale:
        return MagnificationScale(self.magnifications, self.base_mpp)


@dataclass(frozen=True)
class SlideFacts:
    """What is known of one slide; `counts` are the patches that are there."""

    slide: str
    path: str
    """Of the file it was made of."""
    size: tuple[int, int]
    """Level-0 px (width, height)."""
    mpp: tuple[float, float]
    """µm per level-0 px (x, y)."""
    mpp_source: str
    source_digest: str
    """Of the file (preparation_plan.source_digest)."""
    cells: tuple[int, int] | None
    """Whole base cells on the slide (H, W); None in an imported set."""
    counts: Mapping[str, int]
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Patches that were left out because pixels under them are damaged."""
    too_small: tuple[str, ...] = ()
    """Magnifications of which one patch is larger than the slide."""
    images: bool = False
    grid_sides: Mapping[str, int] = field(default_factory=dict)
    """g of grids.npy by magnification, in an imported set."""
    synthetic: bool = False
    reader: str = ""


def read_set_facts(folder: Path) -> SetFacts:
    """Read dataset.json. Raises PreparedError if it is missing, damaged or of another version."""
    record = _read_json(folder / DATASET, "Name the folder that engine.prepare wrote (--out)")
    if record.get("version") != SET_VERSION:
        raise PreparedError(
            f"{folder / DATASET} must be of version {SET_VERSION}; got {record.get('version')!r}, of another release. "
            "Prepare the slides again, or use that release."
        )
    return _as_facts(SetFacts, record, folder / DATASET)


def read_slide_facts(folder: Path, slide: str) -> SlideFacts:
    """Read a slide's slide.json. Raises PreparedError if it is missing or damaged."""
    path = folder / SLIDES / slide / SLIDE
    return _as_facts(SlideFacts, _read_json(path, "Run engine.prepare again"), path)


def check_set_facts(folder: Path, facts: SetFacts, expected: Mapping[str, Any]) -> None:
    """Hold facts to what they must be. Raises PreparedMismatchError naming each field that differs."""
    found = asdict(facts)
    wanted = {name: tuple(v) if isinstance(v, list) else v for name, v in expected.items()}
    differing = [f"{name} is {found[name]!r}, not {v!r}" for name, v in wanted.items() if found[name] != v]
    if differing:
        raise PreparedMismatchError(
            f"{folder} was prepared for another model: {'; '.join(differing)}. Use that model, or prepare the slides "
            "again into another folder."
        )


def array_files(facts: SlideFacts, shared: SetFacts) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Return shape and type of every array of a slide, by its path below the slide's folder."""
    half, found = np.dtype(np.float16), {}
    if facts.cells is not None:
        found["cells.npy"] = ((*facts.cells, shared.ssl_dim), half)
    for name, n in facts.counts.items():
        if not n:
            continue
        found[f"{name}/places.npy"] = ((n, 2), np.dtype(np.int32))
        found[f"{name}/tissue.npy"] = ((n,), np.dtype(np.float32))
        found[f"{name}/latents.npy"] = ((n, *shared.latent_shape), half)
        if facts.images:
            found[f"{name}/images.npy"] = ((n, *IMAGE_SHAPE), np.dtype(np.uint8))
        if name in facts.grid_sides:
            found[f"{name}/grids.npy"] = ((n, shared.ssl_dim, *[facts.grid_sides[name]] * 2), half)
    return found


def check_files(folder: Path, facts: SlideFacts, shared: SetFacts) -> None:
    advice = f"Remove {folder} and run engine.prepare again."
    for name, (shape, dtype) in array_files(facts, shared).items():
        path = folder / name
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                found, by_column, kind = read(file)
                held = path.stat().st_size - file.tell()
        except FileNotFoundError as error:
            raise PreparedError(f"{path} must be there; it is missing. {advice}") from error
        except (OSError, ValueError) as error:
            raise PreparedError(f"{path} must be a readable .npy file; {error}. {advice}") from error
        if (found, kind, by_column) != (shape, dtype, False):
            raise PreparedError(f"{path} must hold {dtype} {shape}; it holds {kind} {found}. {advice}")
        if held != int(np.prod(shape)) * dtype.itemsize:
            raise PreparedError(f"{path} must hold all of its {shape} values; it is cut off or too long. {advice}")


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise PreparedError(f"{path} must be there; it is missing. {advice}.") from error
    except (OSError, ValueError) as error:
        raise PreparedError(f"{path} must be readable JSON; {error}. {advice}.") from error
    if not isinstance(record, dict):
        raise PreparedError(f"{path} must be a JSON object; it is a {type(record).__name__}. {advice}.")
    return record


def _as_facts(kind: type[Any], record: dict[str, Any], path: Path) -> Any:
    """Build facts of JSON values; lists become tuples. Raises PreparedError for a missing or an unknown key."""
    known = {f.name for f in fields(kind)}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise PreparedError(
            f"{path} must have the keys {', '.join(sorted(known))}; {error}. Restore it, or prepare again."
        ) from error
