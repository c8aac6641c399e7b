"""Do pictures of a text show what it says? Shares of tissue, whose caption a picture is of, and regions of a map.

    python -m benchmarks.quality.text --data runs/train_demo_text/data [--pictures 12] [--json FILE]

A judge, fitted on the phantoms that the prior was trained on, says from an SSL vector how much of each kind of tissue a
cell holds; what it is worth on held-out phantoms is said first. Then, on grids that the demo's prior draws:

- shares: 30 captions ask for 5 to 60 % of fat, stroma and nests; Spearman's correlation with what the judge finds,
- words: "only A, no B" of the same three, 2 x 2 cells as `make demo-text` draws: is there most of A, how much of B,
- pairs: held-out regions and their captions; how often a grid is nearer to its own caption's region than to another's,
- map: half of a canvas asks for one kind and half for another; cells away from the border whose kind is the one asked.

With --pictures N the first two are repeated on N pictures of 512 px each, which are sampled from the grids and encoded
again: what a user sees. A grid alone could please the judge, which reads the vectors that the prior draws.
"""

import csv
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV

import generate_large
from benchmarks.support.arguments import figures_parser, write_json
from engine.conditions.reference import embedding_grid
from engine.core.units import TILE_PX
from engine.images.ome_zarr import Image
from engine.model.encoders.base import SSLEncoder
from engine.model.encoders.registry import load_encoder
from engine.model.text.prior import TextPrior
from engine.model.text.sampler import TextRegions, sample_grid
from engine.model.text.towers import load_tower
from engine.model.text.weights import load_prior
from engine.model.zoomldm import ZoomLDM
from engine.slides.phantom.captions import KINDS

ASKED = ("fat", "stroma", "nests")
LEVELS = (5, 10, 15, 20, 25, 30, 40, 45, 50, 60)
"""Percent that a caption asks for."""
SIDE = 4
"""Cells of a grid on each axis; pictures have 2."""


def load_cells(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return SSL vectors (N, D) and shares (N, kinds) of all cells of captioned phantoms."""
    vectors, shares = [], []
    for path in sorted(folder.glob("*.npy")):
        grid = np.load(path)
        vectors.append(grid.reshape(len(grid), -1).T)
        shares.append(np.load(folder / "shares" / path.name).reshape(len(KINDS), -1).T)
    return np.concatenate(vectors), np.concatenate(shares)


class Judge:
    """Shares of each kind of tissue from SSL vectors, by ridge regression on the vectors and their squares."""

    def __init__(self, folder: Path) -> None:
        vectors, shares = load_cells(folder)
        self._fit = RidgeCV(np.logspace(-2, 4, 13)).fit(self._features(vectors), shares)

    @staticmethod
    def _features(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([vectors, vectors**2], axis=1)

    def shares(self, grid: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return shares (kinds, h, w) of a grid (D, h, w)."""
        found = self._fit.predict(self._features(grid.reshape(len(grid), -1).T)).clip(0, 1)
        return found.T.reshape(len(KINDS), *grid.shape[1:])

    def worth(self, folder: Path) -> dict[str, float]:
        """Return the correlation of judged and true shares of held-out cells, by kind."""
        vectors, shares = load_cells(folder)
        judged = self._fit.predict(self._features(vectors))
        return {kind: float(np.corrcoef(judged[:, i], shares[:, i])[0, 1]) for i, kind in enumerate(KINDS)}


class Drawn:
    """Grids, and pictures, of texts."""

    def __init__(self, source: str, text_source: str | None, weight: float, folder: Path) -> None:
        self.model = ZoomLDM.from_pretrained(source)
        self.prior: TextPrior = load_prior(source, None, text_source, self.model.config)
        self.tower = load_tower(self.prior.config.tower, self.prior)
        self.encoder: SSLEncoder = load_encoder(self.model.config.encoder, None, self.model.extras)
        self.source, self.text_source, self.weight, self.folder = source, text_source, weight, folder

    def grid(self, texts: list[str], masks: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
        """Return the vectors (D, h, w) of texts that hold where their masks say."""
        with torch.no_grad():
            tokens = self.prior.read(*self.tower.encode(texts))
        return sample_grid(self.prior, TextRegions(tokens, masks), 50, self.weight, seed).numpy()

    def seen(self, text: str, seed: int) -> NDArray[np.float32]:
        """Sample a picture of 512 px of a text, and return the vectors (D, 2, 2) that the encoder sees in it."""
        run, side = self.folder / "run", 2 * TILE_PX
        flags = {"config": "configs/demo.yaml", "text": text, "text_weight": self.weight, "sampling.seed": seed,
                 "canvas.height": side, "canvas.width": side, "ray.enabled": "false", "output.formats": "[]",
                 "output.folder": run, "model.source": self.source}  # fmt: skip
        if self.text_source is not None:
            flags["model.text_source"] = self.text_source
        if generate_large.main([f"--{key}={value}" for key, value in flags.items()]):
            raise RuntimeError(f"the picture of {text!r} must be sampled; the command failed.")
        pixels = Image.open(run / "image.ome.zarr").read(0, side).transpose(1, 2, 0)
        shutil.rmtree(run)
        return embedding_grid(np.ascontiguousarray(pixels), self.encoder)


def shares_follow(drawn: Drawn, judge: Judge, pictures: int | None = None) -> dict[str, object]:
    """Return Spearman's correlation of asked and judged shares, by kind and of all; on pictures, or on grids."""
    asked, found = {}, {}
    for kind in ASKED:
        levels = LEVELS if pictures is None else LEVELS[:: max(1, len(LEVELS) * len(ASKED) // pictures)]
        got = []
        for number, level in enumerate(levels):
            text, seed = f"{level} % {kind}", 100 + number
            grid = (
                drawn.grid([text], np.ones((1, SIDE, SIDE), np.float32), seed)
                if pictures is None
                else drawn.seen(text, seed)
            )
            got.append(float(judge.shares(grid).mean(axis=(1, 2))[KINDS.index(kind)]))
        asked[kind], found[kind] = list(levels), [round(100 * v, 1) for v in got]
    by_kind = {kind: rank_correlation(asked[kind], found[kind]) for kind in ASKED}
    every = rank_correlation(sum(asked.values(), []), sum(found.values(), []))
    return {"spearman": by_kind, "spearman_of_all": every, "asked": asked, "found": found}


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Return Spearman's correlation."""
    result: Any = spearmanr(a, b)
    return float(result.statistic)


def captioned(folder: Path) -> list[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    """Return each caption with its region's mean vector (D,) and true shares (kinds,)."""
    found = []
    with (folder / "captions.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            x, y, w, h = (int(row[name]) // TILE_PX for name in ("x", "y", "width", "height"))
            grids = (np.load(folder / name / f"{row['slide']}.npy") for name in ("", "shares"))
            vector, shares = (grid[:, y : y + h, x : x + w].mean(axis=(1, 2)) for grid in grids)
            found.append((row["text"], vector, shares))
    return found


def nearer(own: list[NDArray[np.float32]], regions: list[NDArray[np.float32]]) -> float:
    """Return how often a vector is nearer (cosine) to its own region's than to another's."""
    a, b = (np.stack(v) / np.linalg.norm(np.stack(v), axis=1, keepdims=True) for v in (own, regions))
    likeness = a @ b.T
    other = ~np.eye(len(a), dtype=bool)
    return float((np.diag(likeness)[:, None] > likeness)[other].mean())


def pairs_agree(drawn: Drawn, data: Path, count: int = 20, pictures: bool = False) -> dict[str, float]:
    """Return how often a caption's grid is nearer to its own region than to another's; chance is 0.5.

    `of_true_shares` puts the mean vector that the region's true shares of tissue let one expect (ridge regression on
    them and their squares, over the captions of training) in the grid's place: all that such a caption can tell, and
    more exactly than it does.
    """
    rows = captioned(data / "heldout")
    chosen = [row for row in rows if row[0].count(",") >= 2][:: max(1, len(rows) // (3 * count))][:count]
    masks = np.ones((1, SIDE, SIDE), np.float32)
    own = [
        (drawn.seen(text, number) if pictures else drawn.grid([text], masks, number)).mean(axis=(1, 2))
        for number, (text, _, _) in enumerate(chosen)
    ]
    _, vectors, shares = (np.array(column) for column in zip(*captioned(data / "train"), strict=True))
    expected = RidgeCV(np.logspace(-2, 4, 13)).fit(np.hstack([shares, shares**2]), vectors)
    told = np.array([row[2] for row in chosen])
    regions = [row[1] for row in chosen]
    return {
        "nearer": nearer(own, regions),
        "of_true_shares": nearer(list(expected.predict(np.hstack([told, told**2]))), regions),
        "captions": len(own),
    }


def kinds_are_kept_apart(drawn: Drawn, judge: Judge, seeds: int = 3) -> dict[str, object]:
    """Return how often "only A, no B" has most of A, and how much of B is there, for each A over all B and seeds."""
    most, unwanted = {}, {}
    for kind in ASKED:
        found = [
            judge.shares(drawn.grid([f"only {kind}, no {other}"], np.ones((1, 2, 2), np.float32), seed))
            .mean(axis=(1, 2))
            .tolist()
            for other in ASKED
            if other != kind
            for seed in range(seeds)
        ]
        others = [other for other in ASKED if other != kind for _ in range(seeds)]
        most[kind] = float(np.mean([np.argmax(row) == KINDS.index(kind) for row in found]))
        unwanted[kind] = float(np.mean([row[KINDS.index(o)] for row, o in zip(found, others, strict=True)]))
    return {"most": most, "share of what is not wanted": unwanted}


def map_holds(drawn: Drawn, judge: Judge, side: int = 8) -> dict[str, float]:
    """Return the share of cells, two or more away from the border, whose kind is what their half asked for."""
    found = {}
    for number, (left, right) in enumerate((("fat", "nests"), ("stroma", "fat"), ("nests", "stroma"))):
        masks = np.zeros((2, side, side), np.float32)
        masks[0, :, : side // 2], masks[1, :, side // 2 :] = 1, 1
        grid = drawn.grid([f"mostly {left}", f"mostly {right}"], masks, number)
        kinds = judge.shares(grid)[[KINDS.index(kind) for kind in ASKED]].argmax(axis=0)
        right_kind = np.concatenate([kinds[:, : side // 2 - 1] == ASKED.index(left),
                                     kinds[:, side // 2 + 1 :] == ASKED.index(right)], axis=1)  # fmt: skip
        found[f"{left} | {right}"] = float(right_kind.mean())
    return found


def main() -> None:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--data", type=Path, default=Path("runs/train_demo_text/data"), help="captioned phantoms")
    parser.add_argument("--source", default="demo", help="the model")
    parser.add_argument("--text_source", help="folder of the prior; the model's own without it")
    parser.add_argument("--weight", type=float, default=2.0, help="w of the prior's guidance")
    parser.add_argument("--pictures", type=int, default=0, help="pictures to sample for each of the first two")
    args = parser.parse_args()
    judge = Judge(args.data / "train")
    with tempfile.TemporaryDirectory() as folder:
        drawn = Drawn(args.source, args.text_source, args.weight, Path(folder))
        figures: dict[str, object] = {
            "judge": judge.worth(args.data / "heldout"),
            "shares": shares_follow(drawn, judge),
            "words": kinds_are_kept_apart(drawn, judge),
            "pairs": pairs_agree(drawn, args.data),
            "map": map_holds(drawn, judge),
        }
        if args.pictures:
            figures["shares_of_pictures"] = shares_follow(drawn, judge, args.pictures)
            figures["pairs_of_pictures"] = pairs_agree(drawn, args.data, args.pictures, pictures=True)
    print(json.dumps(figures, indent=1))
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
