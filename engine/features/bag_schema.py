"""What a bag of features is, apart from the features: attributes, tiles, and which settings make two bags differ.

Known before the first pixel is encoded, so a resumed extraction can compare. It does not know files (bags.py).
Frames: coordinates are x, y of a tile's top left corner in level-0 px; mpp is µm/px.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from engine.core.units import TILE_PX
from engine.slides.slide import check_slide_name

_DTYPES = (np.dtype(np.float32), np.dtype(np.float16))


@dataclass(frozen=True)
class BagAttributes:
    """What makes a bag interpretable on its own; None is stored as an absent attribute."""

    slide: str
    """Name of the slide, without folder and ending."""
    mpp_x: float
    """µm per level-0 px."""
    mpp_y: float
    mpp_source: str
    """Where µm/px came from, such as "openslide" or "override"."""
    level0_width: int
    """px."""
    level0_height: int
    reader: str
    """The library that read the pixels, with its version."""
    encoder: str
    """"zoomldm", or the id of an SSL encoder."""
    weights_sha256: str
    code_version: str
    synthetic: bool
    """The slide is generated: it must not be tested on, and it inherits the patient it was generated from."""
    seed: int = 0
    """Of the keyed noise."""
    objective: float | None = None
    """Nominal power of the scanner's objective, where the file says so; nothing is computed from it."""
    series: int | None = None
    """Number of the picture that was read, of a file that holds several; None of others, and in earlier bags."""
    block: str | None = None
    """U-Net blocks whose means are joined, separated by commas; None for SSL encoders."""
    timestep: int | None = None
    """Network time argument the latents are noised to; None for SSL encoders."""
    condition: str | None = None
    """"null", or "own": each tile's own SSL vector; None for SSL encoders."""
    source_patient: str | None = None
    """Of a generated bag: whose tissue its conditions are from; None of others, and where nobody said."""
    source_slide: str | None = None
    """Of a generated bag: the slide its conditions are from."""
    tile_px: int = TILE_PX
    """px of a tile on each axis, at the magnification of its group."""

    def __post_init__(self) -> None:
        check_slide_name(self.slide)
        for name in ("mpp_x", "mpp_y", "level0_width", "level0_height", "tile_px"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        for name in ("mpp_source", "reader", "encoder", "weights_sha256", "code_version"):
            if not getattr(self, name):
                raise ValueError(f"{name} must say something; got an empty string.")


@dataclass(frozen=True)
class BagScale:
    """The tiles of one magnification."""

    name: str
    """Magnification: "20x"."""
    mpp: float
    """µm/px of a tile as the encoder sees it."""
    tile_level0_px: tuple[float, float]
    """Width and height of a tile in level-0 px; not whole on most scanners."""
    coords: NDArray[np.int64]
    """(N, 2): x and y of the top left corner, level-0 px."""
    parent: NDArray[np.int64] | None = None
    """(N,): the row of the enclosing tile in the next coarser scale; None on the coarsest."""

    def __post_init__(self) -> None:
        if self.coords.dtype != np.int64 or self.coords.ndim != 2 or self.coords.shape[1] != 2:
            raise ValueError(f"coords must be int64 (N, 2); got {self.coords.dtype} {self.coords.shape}.")
        if self.parent is not None and (self.parent.dtype != np.int64 or self.parent.shape != self.coords.shape[:1]):
            raise ValueError(
                f"parent must be int64 ({len(self.coords)},), one row per tile; got {self.parent.dtype} "
                f"{self.parent.shape}."
            )
        if not self.name or "/" in self.name or not self.mpp > 0 or not min(self.tile_level0_px) > 0:
            raise ValueError(f"a scale needs a name and sizes above zero; got {self.name!r}, {self.mpp} µm/px.")


@dataclass(frozen=True)
class BagPlan:
    """Everything of a bag but the features: known before the first pixel is encoded."""

    attributes: BagAttributes
    scales: tuple[BagScale, ...]
    """Fine to coarse."""
    width: int
    """D, the length of one vector."""
    dtype: str = "float32"
    """Of features on disk: float32 or float16."""

    def __post_init__(self) -> None:
        if self.width < 1 or np.dtype(self.dtype) not in _DTYPES:
            raise ValueError(f"a bag needs width >= 1 in float32 or float16; got {self.width} in {self.dtype}.")
        if not self.scales or len({scale.name for scale in self.scales}) != len(self.scales):
            raise ValueError(f"a bag needs scales of different names; got {[scale.name for scale in self.scales]}.")
        for scale, coarser in zip(self.scales, [*self.scales[1:], None], strict=True):
            if (scale.parent is None) != (coarser is None):
                raise ValueError(f"every scale but the coarsest needs parents; {scale.name} breaks that.")
            if scale.parent is not None and coarser is not None and len(scale.parent):
                first, last = int(scale.parent.min()), int(scale.parent.max())
                if first < 0 or last >= len(coarser.coords):
                    raise ValueError(
                        f"parents of {scale.name} must be rows of {coarser.name}, 0 to {len(coarser.coords) - 1}; got "
                        f"{first} to {last}."
                    )

    def scale(self, name: str) -> BagScale:
        """Return one scale. Raises ValueError naming the known ones."""
        for scale in self.scales:
            if scale.name == name:
                return scale
        raise ValueError(f"the bag has {', '.join(scale.name for scale in self.scales)}; got {name!r}.")


def differences(old: BagPlan, new: BagPlan) -> Iterator[str]:
    """Yield what makes the features of two plans differ, each as "name was …, now …"; the code's version may."""
    before, now = ({**asdict(p.attributes), "width": p.width, "dtype": p.dtype} for p in (old, new))
    for name in now:
        earlier = name == "series" and before[name] is None  # blocks of an earlier version do not say
        if name != "code_version" and not earlier and before[name] != now[name]:
            yield f"{name} was {before[name]!r}, now {now[name]!r}"
    if [s.name for s in old.scales] != [s.name for s in new.scales]:
        yield f"scales were {[s.name for s in old.scales]}, now {[s.name for s in new.scales]}"
        return
    for a, b in zip(old.scales, new.scales, strict=True):
        same = np.array_equal(a.coords, b.coords) and (a.mpp, a.tile_level0_px) == (b.mpp, b.tile_level0_px)
        if not same or not np.array_equal(a.parent, b.parent):  # type: ignore[arg-type]
            yield f"{a.name} had {len(a.coords)} tiles, now {len(b.coords)}, or other ones"
