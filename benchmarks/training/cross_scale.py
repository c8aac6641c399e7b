"""Does training on all magnifications help the one that has few patches? Against training on those alone.

    python -m benchmarks.training.cross_scale --places --lr 1e-3 --steps 2400 [--seeds 0 1]

A few training phantoms are large enough for a 1.25x patch, one each; most are small pieces, as biopsies are beside
resections. There are 100 times as many 20x patches, and numbers between in geometric steps. The same network learns,
from random weights (with --places, after learning where cells lie) or from those of --start: from all of them (even
shares), and from the 1.25x patches alone, until it has seen as many of them, and on until it has done as many steps.
Then each samples 1.25x patches for the conditions of held-out phantoms. Fréchet distance of the demo encoder's
features, one per patch, to the held-out patches themselves; lower is better. It is biased upwards by the number of
patches, for all rows alike but "training patches", which are fewer.

What is done is kept in the folder, so the command continues, and more --seeds may be added. Exit code 1 unless the
joint training has the lowest mean.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.quality.quality import own_against_others
from benchmarks.support.phantom_set import DemoNetworks, Pictures, write_piece
from benchmarks.training.overfit import config_of
from engine.core.runtime import pin_arithmetic
from engine.datasets.dataset import PreparedSet
from engine.evaluation.measures.distances import frechet_distance
from engine.model.zoomldm import ZoomLDM
from engine.training.checkpoints import save_json
from engine.training.demo.data import HELDOUT_SEED
from engine.training.demo.stages import DEMO_SCALE
from engine.training.denoiser import train as denoiser_training
from engine.training.denoiser.settings import InitialSettings, JointConfig, OutputSettings, Precision
from engine.training.denoiser.validation import sample_tiles
from engine.training.settings import PlaceSettings
from engine.training.trainer import DTYPES

TRAINING_SEED = 1000
"""The embedded demo model was made with phantoms 0 to 19, and judged with some from 10000 on."""
_BATCH, _DRAWS = 8, 2
Figures = dict[str, dict[str, dict[str, float]]]
"""By training, then by its seed, then by name."""


@dataclass(frozen=True)
class Training:
    """One row of the table."""

    name: str
    alone: bool
    steps: int


@dataclass(frozen=True)
class Trial:
    """Everything that is compared."""

    folder: Path
    at: str
    pieces: int
    small: int
    heldout: int
    ratio: int
    steps: int
    stride: int
    weight: float
    start: str | None
    places: bool
    lr: float
    precision: Precision

    @property
    def level(self) -> int:
        return DEMO_SCALE.index(self.at)

    def trainings(self) -> list[Training]:
        """Return what is trained; those with the same `alone` are one run, stopped on its way."""
        levels = self.level + 1
        return [
            Training(f"{self.at} alone, as many {self.at} patches seen", True, self.steps // levels),
            Training(f"{self.at} alone, as many steps", True, self.steps),
            Training("all magnifications", False, self.steps),
        ]


def write_sets(trial: Trial, networks: DemoNetworks) -> tuple[PreparedSet, PreparedSet]:
    """Make what is missing of the training and the held-out set, and open both."""
    names, side = DEMO_SCALE.names[: trial.level + 1], 2**trial.level
    sides = [side // 3] * trial.small + [side] * trial.pieces
    given = {
        name: shares(
            round(trial.pieces * trial.ratio ** (1 - i / trial.level)), [max(0, s - 2**i + 1) ** 2 for s in sides]
        )
        for i, name in enumerate(names)
    }
    for i, own_side in enumerate(sides):
        counts = {name: given[name][i] for name in names if given[name][i]}
        write_piece(trial.folder / "train", networks, TRAINING_SEED + i, own_side, counts)
    for i in range(trial.heldout):
        write_piece(trial.folder / "heldout", networks, HELDOUT_SEED + TRAINING_SEED + i, side, {trial.at: 1})
    return PreparedSet(trial.folder / "train"), PreparedSet(trial.folder / "heldout")


def shares(total: int, rooms: Sequence[int]) -> list[int]:
    """Return how many of `total` patches each piece gives: alike, but no more than its room. Least room comes first."""
    given: list[int] = []
    for i, room in enumerate(rooms):
        given.append(min(room, round((total - sum(given)) / (len(rooms) - i))))
    if sum(given) < total:
        raise ValueError(f"{total} patches must fit {len(rooms)} pieces with room for {sum(rooms)}. Use more pieces.")
    return given


def config_for(trial: Trial, training: Training, seed: int, threads: int) -> JointConfig:
    """Return the training: the small network of the overfit test."""
    config = config_of(trial.folder, training.steps, threads)
    run = trial.folder / ("alone" if training.alone else "joint") / str(seed)
    levels = len(config.model.magnifications)
    weights = [float(i == trial.level if training.alone else i <= trial.level) for i in range(levels)]
    # A constant rate, so that a run can be looked at on its way and go on.
    train = replace(config.train, lr=trial.lr, decay="constant", ema=0.99, magnification_weights=tuple(weights))
    initial = config.initial if trial.start is None else InitialSettings(model=trial.start)
    output = OutputSettings(folder=str(run / f"model_{training.steps}"))
    places = PlaceSettings(token_steps=300, path_steps=250) if trial.places else PlaceSettings()
    config = replace(config, data=str(trial.folder / "train"), run=str(run), initial=initial, places=places)
    return replace(config, seed=seed, train=train, output=output, precision=trial.precision)


def train_to(config: JointConfig) -> None:
    """Train, or go on, to the step that the configuration names. Raises: ValueError for a run that is beyond it."""
    denoiser_training.train(config)
    done = json.loads((Path(config.run) / "training.json").read_text())["steps"]
    if done != config.train.steps:
        raise ValueError(
            f"{config.run} must not be beyond step {config.train.steps}; it is at {done}, of another --steps. Use "
            "another --folder; its train and heldout may be copied."
        )


@torch.no_grad()
def sample(trial: Trial, networks: DemoNetworks, folder: Path, heldout: PreparedSet, draw: int) -> Pictures:
    """Return one sample of a model for each held-out condition; another draw starts from other noise."""
    model = ZoomLDM.from_pretrained(folder, dtype=DTYPES[trial.precision]).channels_last()
    count, made = heldout.count(trial.level), []
    for first in range(0, count, _BATCH):
        numbers = range(first, min(first + _BATCH, count))
        grids = [torch.from_numpy(heldout.example(trial.level, i).grid) for i in numbers]
        levels = [trial.level] * len(grids)
        made.append(
            sample_tiles(
                model, model.summarize(grids, levels), draw * count + first, trial.weight, trial.stride
            ).float()
        )
    return networks.pictures(torch.cat(made).numpy())


def images_of(data: PreparedSet, level: int) -> Pictures:
    """Return all patches of a level."""
    return np.stack([data.image(level, i) for i in range(data.count(level))])


def bounds(trial: Trial) -> dict[str, float]:
    """Return distances that no training here can be expected to be below."""
    networks, (train, heldout) = DemoNetworks(), (PreparedSet(trial.folder / name) for name in ("train", "heldout"))
    real = networks.vectors(images_of(heldout, trial.level))
    latents = np.stack([heldout.example(trial.level, i).latent for i in range(heldout.count(trial.level))])
    return {
        "held-out patches through the autoencoder": frechet_distance(
            networks.vectors(networks.pictures(latents)), real
        ),
        "training patches": frechet_distance(networks.vectors(images_of(train, trial.level)), real),
    }


def judge(trial: Trial, networks: DemoNetworks, folder: Path, heldout: PreparedSet) -> dict[str, float]:
    """Compare a model's samples with the held-out patches, means over several draws; writes pairs.png beside it."""
    real = images_of(heldout, trial.level)
    drawn = [sample(trial, networks, folder, heldout, draw) for draw in range(_DRAWS)]
    pairs = np.concatenate([np.concatenate(list(row[:_BATCH]), axis=1) for row in (real, *drawn)])
    Image.fromarray(pairs).save(folder / "pairs.png")
    wanted, found = networks.vectors(real), [networks.vectors(pictures) for pictures in drawn]
    return {
        "frechet": float(np.mean([frechet_distance(v, wanted) for v in found])),
        "own_wins": float(np.mean([own_against_others(v, wanted)["own_wins"] for v in found])),
    }


def compare(trial: Trial, seeds: Sequence[int], threads: int) -> Figures:
    """Return figures by training and seed; those that lie in the folder are not made again."""
    networks, file = DemoNetworks(), trial.folder / "figures.json"
    train, heldout = write_sets(trial, networks)
    figures: Figures = json.loads(file.read_text()) if file.exists() else {}
    for seed in map(str, seeds):
        for training in trial.trainings():
            row = figures.setdefault(f"{training.name}: {training.steps} steps", {})
            if seed not in row:
                config = config_for(trial, training, int(seed), threads)
                train_to(config)
                row[seed] = judge(trial, networks, Path(config.output.folder), heldout)
                save_json(file, figures)
                print(f"{training.name}, {training.steps} steps, seed {seed}: {row[seed]}", flush=True)
    return figures


def table(figures: Figures, limits: Mapping[str, float]) -> str:
    """Return the figures as Markdown."""
    lines = ["| | Fréchet distance | by training seed | own patch nearer |", "|---|---|---|---|"]
    lines += [f"| {name} | {distance:.2f} | | |" for name, distance in limits.items()]
    for name, row in figures.items():
        each = ", ".join(f"{seed['frechet']:.2f}" for seed in row.values())
        wins = np.mean([seed["own_wins"] for seed in row.values()])
        lines.append(f"| {name} | {mean_distance(row):.2f} | {each} | {wins:.2f} |")
    return "\n".join(lines)


def mean_distance(row: Mapping[str, Mapping[str, float]]) -> float:
    """Return the mean over the training seeds."""
    return float(np.mean([seed["frechet"] for seed in row.values()]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/cross_scale"))
    parser.add_argument("--at", default="1.25x", choices=DEMO_SCALE.names[1:], help="the scarce magnification")
    parser.add_argument("--pieces", type=int, default=8, help="training phantoms with a scarce patch, one each")
    parser.add_argument("--small", type=int, default=48, help="training phantoms a third as wide")
    parser.add_argument("--heldout", type=int, default=36, help="held-out phantoms")
    parser.add_argument("--ratio", type=int, default=100, help="20x patches for one scarce patch")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings")
    parser.add_argument("--stride", type=int, default=100, help="timesteps between two steps of sampling")
    parser.add_argument("--weight", type=float, default=0.0, help="of classifier-free guidance")
    parser.add_argument("--start", help="model that both trainings start from; else random weights of a small network")
    parser.add_argument("--places", action="store_true", help="teach random weights first where cells lie")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--precision", default="bfloat16", choices=DTYPES, help="of training and sampling")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    pin_arithmetic(options.threads)
    trial = Trial(**{f.name: getattr(options, f.name) for f in fields(Trial)})
    figures = compare(trial, options.seeds, options.threads)
    print(table(figures, bounds(trial)))
    *alone, together = map(mean_distance, figures.values())
    return 0 if together < min(alone) else 1


if __name__ == "__main__":
    sys.exit(main())
