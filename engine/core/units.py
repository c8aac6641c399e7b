"""Magnification ↔ µm/px ↔ model index, and px ↔ latent px. The only file that knows units.

It does not know slides, canvases or models; a scale is two numbers and a list of names.
Source: ZoomLDM (CVPR 2025): 20x = 0.5 µm/px, each further level halves; NAIP starts at 1 m/px.
"""

from dataclasses import dataclass

LATENT_FACTOR = 4
"""Image px per latent px on each axis (VQ f4)."""
TILE_PX = 256
"""Image px of a tile or cell on each axis; what the network was trained on."""
TILE_LATENT_PX = TILE_PX // LATENT_FACTOR
LATENT_CHANNELS = 3


@dataclass(frozen=True)
class MagnificationScale:
    """The magnifications a model knows, base first; level i is 2**i times coarser than the base.

    `base_mpp` is in µm/px (1e6 µm = 1 m for satellite pictures).
    """

    names: tuple[str, ...]
    base_mpp: float

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"magnifications must be distinct and at least one; got {self.names}.")
        if not self.base_mpp > 0:
            raise ValueError(f"base_mpp must be positive (µm/px); got {self.base_mpp}.")

    @property
    def base(self) -> str:
        return self.names[0]

    def index(self, name: str) -> int:
        """Return the model's magnification index. Raises ValueError naming the known ones."""
        if name not in self.names:
            raise ValueError(f"magnification must be one of {', '.join(self.names)}; got {name!r}.")
        return self.names.index(name)

    def factor(self, name: str) -> int:
        """Return how many base px one px of this level covers on each axis (20x → 1, 1.25x → 16)."""
        return 2 ** self.index(name)

    def mpp(self, name: str) -> float:
        """Return µm per px."""
        return self.base_mpp * self.factor(name)


BRCA_SCALE = MagnificationScale(("20x", "10x", "5x", "2.5x", "1.25x", "0.625x", "0.3125x", "0.15625x"), 0.5)
NAIP_SCALE = MagnificationScale(("1x", "2x", "3x", "4x"), 1e6)
