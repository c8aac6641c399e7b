"""Are the summaries that a CDM draws like those of held-out pictures? Per magnification, beside two bounds.

    python -m benchmarks.quality.summaries [--run runs/train_cdm] [--source demo] [--count 128] [--steps 200] \
        [--sheet PNG]

Compared with held-out summaries, as many of each: drawn ones, training ones (no CDM need be better) and a Gaussian
with the training set's mean and covariance (what a CDM must beat). Fréchet distance on the first 32 principal axes
of the training summaries; 1-NN accuracy (0.5 = cannot be told apart; Lopez-Paz & Oquab 2017); distance to the nearest
training summary, in units of the held-out ones' (far below 1 = copies, far above = off the data).
"""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from benchmarks.support.arguments import figures_parser, write_json
from engine.conditions.patch_sampler import PatchSampler
from engine.core.runtime import pin_arithmetic
from engine.evaluation.measures.distances import frechet_distance
from engine.model.cdm import CDM
from engine.model.cdm_sampler import sample_summaries
from engine.model.weights.cdm import load_cdm
from engine.model.zoomldm import ZoomLDM
from engine.sampling.pixels import to_uint8

COMPONENTS, AXES_FROM, BATCH, SHOWN = 32, 1500, 32, 4
Rows = NDArray[np.float32]
"""Summaries (N, T·C), one per row."""


def components(train: Rows, count: int = COMPONENTS) -> tuple[Rows, Rows, float]:
    """Return the mean (T·C,), the first principal axes (T·C, count) and their share of the variance."""
    mean = train.mean(0)
    centred = torch.from_numpy(train - mean)
    # The Gram matrix of N rows is smaller than the covariance of T·C columns, and has the same eigenvalues.
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    axes = centred.T @ vectors[:, -count:]
    return mean, (axes / axes.norm(dim=0)).numpy(), float(values[-count:].sum() / values.sum())


def told_apart(a: Rows, b: Rows) -> float:
    """Return how often the nearest other vector of a or b is of the same set; both have the same size."""
    both = torch.from_numpy(np.concatenate([a, b]))
    gaps = torch.cdist(both, both).fill_diagonal_(float("inf"))
    first = torch.arange(len(both)) < len(a)
    return float((first[gaps.argmin(1)] == first).float().mean())


def nearest(rows: Rows, train: Rows) -> float:
    """Return the median distance of a row to its nearest training row."""
    return float(torch.cdist(torch.from_numpy(rows), torch.from_numpy(train)).min(1).values.median())


def gaussian(train: Rows, count: int, rng: np.random.Generator) -> Rows:
    """Draw rows with the mean and the covariance of the training rows, whatever their rank."""
    mean = train.mean(0)
    weights = rng.standard_normal((count, len(train)), dtype=np.float32) / len(train) ** 0.5
    return mean + weights @ (train - mean)


def figures(train: Rows, heldout: Rows, drawn: Rows, rng: np.random.Generator) -> dict[str, object]:
    """Compare drawn rows and both bounds with the held-out rows."""
    mean, axes, share = components(train[:AXES_FROM])
    unit = nearest(heldout, train)
    own = rng.permutation(len(train))
    picked, rest = train[own[: len(drawn)]], train[own[len(drawn) :]]
    found: dict[str, object] = {"variance_in_components": round(share, 3)}
    sets = (("training", picked, rest), ("cdm", drawn, train), ("gaussian", gaussian(train, len(drawn), rng), train))
    for name, rows, others in sets:
        found[name] = {
            "frechet": round(frechet_distance((rows - mean) @ axes, (heldout - mean) @ axes), 2),
            "told_apart": round(told_apart(rows, heldout), 3),
            "nearest_training": round(nearest(rows, others) / unit, 2),
        }
    return found


def draw(cdm: CDM, level: int, count: int, steps: int) -> Rows:
    drawn = sample_summaries(cdm, level, count, steps, seed=1, batch_size=BATCH)
    return drawn.flatten(1).cpu().numpy()


@torch.inference_mode()
def sheet_row(model: ZoomLDM, contexts: list[torch.Tensor]) -> NDArray[np.uint8]:
    """Return patches of several sets of summaries side by side, the same starting noise in each set."""
    sampler = PatchSampler("ddim", 50, 2.0, seed=0)
    drawn = [to_uint8(sampler.draw_from(model, context)).transpose(0, 2, 3, 1) for context in contexts]
    return np.concatenate([np.pad(np.concatenate(list(d), 1), ((4, 4), (0, 16), (0, 0))) for d in drawn], 1)


def main() -> None:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/train_demo_cdm"), help="folder with summaries/")
    parser.add_argument("--source", default="demo", help="model whose CDM is judged")
    parser.add_argument("--cdm", type=Path, help="folder of the CDM; else the model's")
    parser.add_argument("--count", type=int, default=128, help="summaries of each kind and magnification")
    parser.add_argument("--steps", type=int, default=200, help="DDIM steps")
    parser.add_argument("--sheet", type=Path, help="PNG: patches of held-out summaries, and of drawn ones")
    arguments = parser.parse_args()
    pin_arithmetic(1)
    rng = np.random.default_rng(0)
    model = ZoomLDM.from_pretrained(arguments.source)
    cdm = load_cdm(arguments.source, own=arguments.cdm)
    shape = (cdm.config.tokens, cdm.config.channels)
    found, rows = {}, []
    for level, name in enumerate(model.config.magnifications):
        train, heldout = (
            np.load(arguments.run / "summaries" / split / f"{name}.npy").astype(np.float32)
            for split in ("train", "heldout")
        )
        count = min(arguments.count, len(heldout))
        drawn = draw(cdm, level, count, arguments.steps)
        flat = [part.reshape(len(part), -1) for part in (train, heldout[:count])]
        found[name] = figures(flat[0], flat[1], drawn, rng)
        print(name, json.dumps(found[name]), flush=True)
        if arguments.sheet:
            some = [torch.from_numpy(heldout[:SHOWN]), torch.from_numpy(drawn[:SHOWN]).view(-1, *shape)]
            rows.append(sheet_row(model, some))
    if arguments.sheet:
        PIL.Image.fromarray(np.concatenate(rows)).save(arguments.sheet)
    write_json(arguments.json, found)


if __name__ == "__main__":
    main()
