"""What a phantom shows, as shares of tissue and as captions.

Invariant: a caption says of a window what its fields hold there; a share is of the window's area, and the five add up
to one. Every sentence is made of a few dozen words (`WORDS_PER_KIND`, `_AMOUNTS`), so that a small text encoder can
learn all of them. It does not know pixels or encoders.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.core.units import TILE_PX
from engine.slides.phantom.render import Phantom
from engine.slides.phantom.tissue import FIELD_UM, build_fields

KINDS = ("nests", "stroma", "fat", "lymphocytes", "necrosis")
"""Kinds of tissue, in the order of every array of shares. Lumina belong to the nests."""
WORDS_PER_KIND = {
    "nests": ("nests", "nests of tumour", "tumour"),
    "stroma": ("stroma", "dense stroma", "fibrous stroma"),
    "fat": ("fat", "fat cells", "adipose tissue"),
    "lymphocytes": ("lymphocytes", "lymphoid cells", "inflammation"),
    "necrosis": ("necrosis", "necrotic tissue"),
}
_AMOUNTS = (
    (0.02, ("no",)),
    (0.12, ("little", "a little", "few")),
    (0.30, ("some",)),
    (0.55, ("much", "a lot of")),
    (0.85, ("mostly",)),
    (1.01, ("only", "nothing but")),
)
"""Up to which share of the window an amount is said."""
_PER_CELL = round(TILE_PX * 0.5 / FIELD_UM)
"""Points of the fields per cell of 256 px at 0.5 µm/px, on each axis."""


@dataclass(frozen=True)
class PhantomShares:
    """Shares of each kind of tissue in the cells of a region: float32 (5, h, w)."""

    phantom: Phantom
    cells: NDArray[np.float32]

    @classmethod
    def of(cls, phantom: Phantom, height: int, width: int) -> "PhantomShares":
        """Compute the shares of height × width cells (128 µm each) from the phantom's origin on."""
        fields = build_fields(phantom.seed, phantom.ducts, (0, 0), (height * _PER_CELL, width * _PER_CELL))
        fat = fields.fat
        inside = (1 - fat) * (fields.white_um > 0)
        nests = np.maximum(fields.epithelium, inside)
        necrosis = fields.necrosis * (1 - inside)
        lymphocytes = fields.lymphoid * (1 - nests) * (1 - necrosis)
        found = np.stack([nests, np.zeros_like(fat), fat, lymphocytes, necrosis])
        found /= np.maximum(found.sum(axis=0), 1)
        found[1] = 1 - found.sum(axis=0)
        cells = found.reshape(len(KINDS), height, _PER_CELL, width, _PER_CELL).mean(axis=(2, 4))
        return cls(phantom, cells.astype(np.float32))

    def window(self, y: int, x: int, height: int, width: int) -> NDArray[np.float32]:
        """Return the mean shares (5,) of a window of cells."""
        return self.cells[:, y : y + height, x : x + width].mean(axis=(1, 2))


def amount(share: float, rng: np.random.Generator) -> str:
    """Return a word for a share of a window."""
    words = next(words for limit, words in _AMOUNTS if share < limit)
    return words[rng.integers(len(words))]


def percent(share: float) -> str:
    """Return a share in steps of five percent, as captions name it."""
    return f"{round(20 * share) * 5} %"


def caption(shares: NDArray[np.float32], rng: np.random.Generator, phantom: Phantom | None = None) -> str:
    """Return one of the sentences that are true of the shares (5,), such as "mostly stroma, 20 % fat, no necrosis".

    What is said of a kind is its amount in words or in percent; kinds that are not said may be there. With a phantom,
    the form of its nests and nuclei may be said, too.
    """
    said = [i for i in range(len(KINDS)) if rng.random() < (0.75 if shares[i] > 0.1 else 0.35)]
    said = said or [int(shares.argmax())]
    parts = []
    for i in rng.permutation(said):
        words = WORDS_PER_KIND[KINDS[i]]
        # The first word of each kind is the one that users write most.
        word = words[0] if rng.random() < 0.5 else words[rng.integers(len(words))]
        how = percent(float(shares[i])) if rng.random() < 0.5 else amount(float(shares[i]), rng)
        parts.append(f"{how} {word}")
    if phantom is not None and shares[0] > 0.1 and rng.random() < 0.4:
        parts.append(_form(phantom, rng))
    return ", ".join(parts)


def _form(phantom: Phantom, rng: np.random.Generator) -> str:
    """Say how the nests or the nuclei of a phantom look."""
    if rng.random() < 0.5:
        return ("round open ducts", "irregular ducts", "ragged solid nests")[min(int(3 * phantom.architecture), 2)]
    return ("bland nuclei", "moderately varied nuclei", "pleomorphic nuclei")[min(int(3 * phantom.pleomorphism), 2)]
