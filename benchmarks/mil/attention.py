"""Do models find the instances that a bag's label comes from? Two problems whose answer is known instance by instance.

    python -m benchmarks.mil.attention [--bags 300] [--phantoms 200] [--encoder texture] [--json FILE]

Digits: bags of 20 to 40 of scikit-learn's 8x8 pictures of digits, positive if one to three of them are nines. Training
and test bags share no picture.
Phantoms: the 36 tiles (20x) of a field of tissue, described by their texture, or by what --encoder names ("demo", the
embedded model's SSL encoder) or --blocks (its U-Net's), and whitened. In positive fields the nuclei are pleomorphic
(knob 0.85 to 1), in negative ones not (0 to 0.15); what carries the label are the tiles with epithelium (a third of
their area), whose nuclei the knob changes.

Figures on test bags: area under the ROC curve of the bags; and the mean, over positive bags, of the area of attention
against the instances that carry the label (bar: 0.8 for abmil). Mean pooling has no attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from benchmarks.support.arguments import figures_parser, write_json
from engine.core.runtime import pin_arithmetic
from engine.core.units import BRCA_SCALE, TILE_PX
from engine.features.tile_encoders import DiffusionEncoder, FeatureConfig, SSLTileEncoder, TileEncoder, TilePixels
from engine.model.encoders.registry import load_encoder
from engine.model.zoomldm import ZoomLDM
from engine.slides.phantom.render import Phantom
from engine.slides.phantom.tissue import FIELD_UM, build_fields
from mil.fit.baseline import MeanPoolClassifier
from mil.fit.classifier import MILClassifier
from mil.fit.training import Scaling

MODELS = ("abmil", "clam_sb", "dsmil", "transmil")
KEY_DIGIT, TEST_SHARE = 9, 0.4
SIDE = 6
"""Tiles along a field."""
LOW, HIGH = (0.0, 0.15), (0.85, 1.0)
EPITHELIUM = 1 / 3
TARGET = 0.8
TRAINING = {"hidden": 64, "attention": 32, "lr": 1e-3, "epochs": 40, "device": "cpu"}


@dataclass(frozen=True)
class Bags:
    """Bags, their labels, and which instances carry a positive one."""

    arrays: list[NDArray[np.float32]]
    labels: NDArray[np.int64]
    keys: list[NDArray[np.bool_]]

    def part(self, rows: NDArray[np.int64]) -> "Bags":
        """Return some of the bags."""
        return Bags([self.arrays[i] for i in rows], self.labels[rows], [self.keys[i] for i in rows])


def digit_bags(count: int, pictures: NDArray[np.float32], digits: NDArray[np.int64], seed: int) -> Bags:
    """Return `count` bags of pictures (n, 64), every second one with nines."""
    rng = np.random.default_rng(seed)
    nines, others = (np.flatnonzero((digits == KEY_DIGIT) == is_key) for is_key in (True, False))
    labels, arrays, keys = np.arange(count) % 2, [], []
    for label in labels:
        number, key = int(rng.integers(20, 41)), int(rng.integers(1, 4)) * int(label)
        chosen = rng.permutation(np.concatenate([rng.choice(nines, key), rng.choice(others, number - key)]))
        arrays.append(pictures[chosen])
        keys.append(digits[chosen] == KEY_DIGIT)
    return Bags(arrays, labels, keys)


def digits_problem(count: int) -> tuple[Bags, Bags]:
    """Return training and test bags of digits."""
    found = [np.asarray(part) for part in load_digits(return_X_y=True)]
    pictures, digits = (found[0] / 16).astype(np.float32), found[1].astype(np.int64)
    order = np.random.default_rng(0).permutation(len(digits))
    tested = round(len(order) * TEST_SHARE)
    train, test = order[tested:], order[:tested]
    return (
        digit_bags(count, pictures[train], digits[train], 1),
        digit_bags(round(count * TEST_SHARE), pictures[test], digits[test], 2),
    )


def phantom_tiles(number: int) -> tuple[TilePixels, NDArray[np.bool_]]:
    """Render the tiles of field `number` (odd: positive) and say which carry its label."""
    rng = np.random.default_rng(number)
    phantom = Phantom(70_000 + number, rng.uniform(*(HIGH if number % 2 else LOW)), rng.uniform())
    corner = rng.integers(0, 40, 2) * TILE_PX
    places = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), axis=-1).reshape(-1, 2)
    coords = (corner + places * TILE_PX).astype(np.int64)
    images = [
        phantom.render(y * BRCA_SCALE.base_mpp, x * BRCA_SCALE.base_mpp, TILE_PX, TILE_PX, BRCA_SCALE.base_mpp)
        for x, y in coords
    ]
    side = round(TILE_PX * BRCA_SCALE.base_mpp / FIELD_UM)
    keys = [
        build_fields(phantom.seed, phantom.ducts, (y * side, x * side), (side, side)).epithelium.mean() > EPITHELIUM
        for x, y in coords // TILE_PX
    ]
    pixels = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
    return TilePixels(f"phantom-{number}", "20x", coords, pixels), np.array(keys) & bool(number % 2)


def tile_encoder(name: str, blocks: str | None, timestep: int) -> TileEncoder:
    """Return an encoder by its name, or the embedded model's U-Net's blocks (joined by commas)."""
    model = ZoomLDM.from_pretrained("demo")
    if blocks is not None:
        return DiffusionEncoder(model, FeatureConfig(blocks=tuple(blocks.split(",")), timestep=timestep))
    return SSLTileEncoder(load_encoder(name, extras=model.extras))


def phantom_problem(count: int, encoder: TileEncoder) -> tuple[Bags, Bags]:
    """Return training and test bags of phantom fields."""
    drawn = [phantom_tiles(number) for number in range(count)]
    bags = Bags([encoder.encode(tiles) for tiles, _ in drawn], np.arange(count) % 2, [keys for _, keys in drawn])
    tested = round(count * TEST_SHARE)
    rows = np.arange(count)
    return bags.part(rows[tested:]), bags.part(rows[:tested])


def measure(
    train: Bags, test: Bags, scaling: Scaling = "standardize", models: Sequence[str] = MODELS
) -> dict[str, dict[str, float]]:
    """Return the areas of bags and of attention, by model; the first row is mean pooling."""
    plain = MeanPoolClassifier(scaling=scaling).fit(train.arrays, train.labels)
    found = {"mean pool": {"bags": float(roc_auc_score(test.labels, plain.decision_function(test.arrays)))}}
    for name in models:
        model = MILClassifier(name, scaling=scaling, **TRAINING).fit(train.arrays, train.labels)
        maps = model.attention_maps(test.arrays)
        areas = [roc_auc_score(k, a) for k, a in zip(test.keys, maps, strict=True) if 0 < k.sum() < len(k)]
        found[name] = {
            "bags": float(roc_auc_score(test.labels, model.decision_function(test.arrays))),
            "attention": float(np.mean(areas)),
        }
    return found


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the figures as Markdown."""
    lines = ["| | " + " | ".join(f"{problem}: bags | attention" for problem in found) + " |"]
    lines.append("|---" * (2 * len(found) + 1) + "|")
    for name in next(iter(found.values())):
        cells = [f"{rows[name][what]:.3f}" if what in rows[name] else "" for rows in found.values()
                 for what in ("bags", "attention")]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and say by the exit code whether the bar is met."""
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--bags", type=int, default=300, help="training bags of digits")
    parser.add_argument("--phantoms", type=int, default=200, help="fields of tissue, training and test")
    parser.add_argument("--encoder", default="texture", help="what describes the tiles of phantoms")
    parser.add_argument("--blocks", help="take these U-Net blocks instead")
    parser.add_argument("--timestep", type=int, default=FeatureConfig().timestep)
    arguments = parser.parse_args(argv)
    pin_arithmetic(2)
    encoder = tile_encoder(arguments.encoder, arguments.blocks, arguments.timestep)
    found = {
        "digits": measure(*digits_problem(arguments.bags)),
        "phantoms": measure(*phantom_problem(arguments.phantoms, encoder), scaling="whiten"),
    }
    print(table(found))
    write_json(arguments.json, found)
    return int(min(rows["abmil"]["attention"] for rows in found.values()) < TARGET)


if __name__ == "__main__":
    raise SystemExit(main())
