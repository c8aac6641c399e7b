"""Regions without captions: each is told by the vector that a CLIP's vision tower gives its tiles.

Invariant: a region lies wholly on encoded cells, tiles cover at least half of it, and its vector is the mean of theirs,
of length 1, less the mean over all regions. It does not know networks.

Bags (engine.extract_features) hold the vectors, grids the SSL vectors of the same slides.
Source: Zhou et al. 2022 (LAFITE: a generator of texts trained on the vectors of pictures).
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray

from engine.core.errors import EngineError
from engine.core.units import TILE_PX
from engine.features.bag_reader import BagFile, find_bags
from engine.training.text.captions import Caption, LeftOut, digest_of, open_grids

PER_SLIDE = 500
"""Regions of a slide at most; they differ little, and each has a vector in memory."""
COVERED = 0.5
LEAST_TEXTS = 20


class PicturedGrids:
    """Grids by slide, regions of them, and the vector of each region's pixels."""

    def __init__(self, bags: str, grids: str, tower: str, window: int, encoder: str, ssl_dim: int, base_mpp: float):
        """Read bags of the vision tower `tower` and the grids of the same slides; regions have 1, 2, 4 … `window` cells
        a side.

        Raises: EngineError when bags are of another encoder, or no region is left. BagError for a damaged bag.
        """
        self._grids, _ = open_grids(grids, encoder, ssl_dim, base_mpp)
        self.captions: list[Caption] = []
        self.left_out: list[LeftOut] = []
        vectors: list[NDArray[np.float32]] = []
        seen = ""
        for number, path in enumerate(find_bags(Path(bags))):
            if path.stem not in self._grids:
                self.left_out.append(LeftOut(path.name, f"there is no grid of slide {path.stem!r}"))
                continue
            with BagFile(path) as bag:
                seen = seen or bag.attributes.weights_sha256
                if bag.attributes.encoder != tower or bag.attributes.weights_sha256 != seen:
                    raise EngineError(
                        f"bags in {bags} must be of the tower's own vision side, {tower!r} (weights {seen[:12]}); "
                        f"{path.name} is of {bag.attributes.encoder!r} ({bag.attributes.weights_sha256[:12]}). "
                        f"Extract with --encoders [{tower}]."
                    )
                sums, counts = _by_cell(bag, self._grids[path.stem].shape[1:], base_mpp)
            regions = _regions(self._grids[path.stem], counts, window, number)
            self.captions += [Caption(path.stem, y, x, side, side, "") for y, x, side in regions]
            vectors += [_unit(sums[y : y + side, x : x + side].sum(axis=(0, 1))) for y, x, side in regions]
        if not vectors:
            raise EngineError(
                f"{bags} must hold bags whose tiles lie on the grids in {grids}; none does. Extract and prepare the "
                "same slides, under the same names."
            )
        self._vectors = np.stack(vectors)
        self.mean: Float32[np.ndarray, " e"] = self._vectors.mean(axis=0)
        self.digest = digest_of(repr(self.captions).encode() + self._vectors.tobytes(), self._grids)
        self.centre(self.mean)

    def centre(self, mean: Float32[np.ndarray, " e"]) -> None:
        """Tell regions by their vectors less this mean; the held-out ones by that of those that are learned."""
        self.told: Float32[np.ndarray, "n e"] = self._vectors - mean
        self.spread = float(np.sqrt((self.told**2).mean()))
        """How much the vectors differ, by channel."""

    def __len__(self) -> int:
        return len(self.captions)

    def grid(self, number: int) -> NDArray[np.float32]:
        """Return the SSL vectors of region `number`: float32 (D, h, w)."""
        c = self.captions[number]
        return self._grids[c.slide][:, c.y : c.y + c.height, c.x : c.x + c.width].astype(np.float32)


def read_texts_of(path: str | None) -> list[str]:
    """Return the texts of a file, one a line. Raises: EngineError for too few."""
    if path is None:
        raise EngineError(
            f"a prior without captions needs captions.texts, a file of at least {LEAST_TEXTS} texts as users will "
            "write them, one a line; got none."
        )
    try:
        found = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"captions.texts must be a text file in UTF-8; {path} is not ({error}).") from error
    if len(set(found)) < LEAST_TEXTS:
        raise EngineError(
            f"captions.texts must hold at least {LEAST_TEXTS} different texts, one a line, for their mean to mean "
            f"something; {path} has {len(set(found))}."
        )
    return found


def _by_cell(
    bag: BagFile, shape: tuple[int, ...], base_mpp: float
) -> tuple[Float32[np.ndarray, "h w e"], NDArray[np.int64]]:
    """Return the sum of the tiles' unit vectors by cell, and how many there are: (h, w, E), (h, w)."""
    scale = bag.scale_of(bag.scales[0])  # the finest
    features = bag.features(scale.name).astype(np.float32)
    valid = bag.valid(scale.name) & np.isfinite(features).all(axis=1)
    facts = bag.attributes
    per_cell = np.array([TILE_PX * base_mpp / facts.mpp_x, TILE_PX * base_mpp / facts.mpp_y])
    centres = scale.coords + np.array(scale.tile_level0_px) / 2
    x, y = np.floor(centres / per_cell).astype(np.int64).T
    valid &= (x >= 0) & (y >= 0) & (x < shape[1]) & (y < shape[0])
    sums = np.zeros((*shape, features.shape[1]), np.float32)
    counts = np.zeros(shape, np.int64)
    np.add.at(sums, (y[valid], x[valid]), _unit(features[valid]))
    np.add.at(counts, (y[valid], x[valid]), 1)
    return sums, counts


def _regions(
    grid: NDArray[np.floating], counts: NDArray[np.int64], window: int, slide: int
) -> list[tuple[int, int, int]]:
    """Return y, x and side of regions in cells: at every size as many as there are, PER_SLIDE in all."""
    usable = np.asarray(np.isfinite(grid).all(axis=0))
    by_side: list[list[tuple[int, int, int]]] = []
    side = 1
    while side <= min(window, *counts.shape):
        found = []
        for y in range(0, counts.shape[0] - side + 1, side):
            for x in range(0, counts.shape[1] - side + 1, side):
                part = slice(y, y + side), slice(x, x + side)
                if usable[part].all() and (counts[part] > 0).mean() >= COVERED:
                    found.append((y, x, side))
        by_side.append(found)
        side *= 2
    rng = np.random.default_rng(slide)
    share = PER_SLIDE // max(len(by_side), 1)
    kept = [sorted(rng.permutation(len(found))[:share]) for found in by_side]
    return [found[int(i)] for found, chosen in zip(by_side, kept, strict=True) for i in chosen]


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(length, 1e-12)).astype(np.float32)
