"""Which U-Net block, timestep and condition describe a tile best, and what does each cost? On phantoms, one run.

    python -m benchmarks.features.feature_choice [--slides 24] [--tiles 10] [--timesteps 1,50,150,300,600] \
        [--write PAGE]

Two tasks, each on the tiles of half the slides against the other half: 20x, low or high pleomorphism of nuclei; 5x,
orderly or ragged architecture. The other knob and the stain vary freely. Figure: area under the ROC curve of a ridge
classifier on one tile's vector, slides held out in four folds, ± the deviation of a bootstrap over slides.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.support.arguments import figures_parser, write_json
from engine.core.runtime import pin_arithmetic
from engine.core.units import TILE_PX
from engine.features.tile_encoders import TilePixels, as_images, cell_grids, noised
from engine.model.encoders.base import SSLEncoder
from engine.model.encoders.registry import load_encoder
from engine.model.unet_features import block_widths
from engine.model.zoomldm import ZoomLDM
from engine.slides.phantom.render import Phantom

FOLDS, BATCH, BOOTSTRAPS = 4, 8, 200
LOW, HIGH = (0.0, 0.45), (0.55, 1.0)
JOINED = (("up.0", "up.1"), ("mid", "up.0", "up.1"), ("up.1", "up.2"))
RIDGES = 10.0 ** np.arange(-1, 5)
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


@dataclass(frozen=True)
class Task:
    """One magnification, and the knob of the phantom that its tiles should tell apart."""

    scale: str
    knob: str
    factor: int


TASKS = (Task("20x", "pleomorphism", 1), Task("5x", "architecture", 4))


@dataclass(frozen=True)
class Slides:
    """The tiles of a task, slide by slide."""

    tiles: list[TilePixels]
    """With the SSL vectors of their cells, if an encoder was given."""
    high: NDArray[np.bool_]
    """(slides,): the class."""
    colours: NDArray[np.float64]
    """(tiles, 6): mean and deviation of red, green and blue."""


def draw_slides(task: Task, slides: int, tiles: int, ssl: SSLEncoder | None, base_mpp: float) -> Slides:
    """Render `tiles` tiles of each of `slides` phantoms, every second one of the high class."""
    drawn, high, colours = [], np.arange(slides) % 2 == 1, []
    side = TILE_PX * task.factor
    for slide in range(slides):
        rng = np.random.default_rng([slide, task.factor])
        knobs = {"pleomorphism": rng.uniform(), "architecture": rng.uniform()}
        knobs[task.knob] = rng.uniform(*(HIGH if high[slide] else LOW))
        phantom = Phantom(90_000 + slide, **knobs)
        coords = rng.integers(0, 40, (tiles, 2)) * side
        fields = [phantom.render(y * base_mpp, x * base_mpp, side, side, base_mpp) for x, y in coords]
        # (k, 256, k, 256, 3): one rendering serves the cells and, averaged, the tile, as one read does.
        cells = (
            np.stack(fields).reshape(tiles, task.factor, TILE_PX, task.factor, TILE_PX, 3).transpose(0, 1, 3, 5, 2, 4)
        )
        reduced = np.stack(fields).reshape(tiles, TILE_PX, task.factor, TILE_PX, task.factor, 3).mean((2, 4))
        images = np.ascontiguousarray(np.rint(reduced).astype(np.uint8).transpose(0, 3, 1, 2))
        grids = None if ssl is None else cell_grids(ssl, np.ascontiguousarray(cells), BATCH)
        drawn.append(TilePixels(f"phantom-{slide}", task.scale, coords.astype(np.int64), images, None, grids))
        colours.append(np.concatenate([images.mean((2, 3)), images.std((2, 3))], axis=1))
    return Slides(drawn, high, np.concatenate(colours))


@torch.inference_mode()
def block_vectors(
    model: ZoomLDM, slides: Slides, settings: Sequence[tuple[str, int]]
) -> dict[tuple[str, int], NDArray]:
    """Return all blocks' means side by side, (tiles, ΣC), for each condition and timestep; latents are made once."""
    blocks = list(block_widths(model.config))
    found: dict[tuple[str, int], list[NDArray]] = {setting: [] for setting in settings}
    for whole in slides.tiles:
        for rows in np.array_split(np.arange(len(whole.coords)), -(-len(whole.coords) // BATCH)):
            cells = None if whole.cells is None else whole.cells[rows]
            part = replace(whole, coords=whole.coords[rows], images=whole.images[rows], cells=cells)
            latents = model.encode(as_images(part, model.device))
            contexts = {"null": model.null_context(len(rows))}
            if cells is not None:
                index = model.config.scale.index(part.scale)
                contexts["own"] = model.summarize(list(torch.from_numpy(cells)), [index] * len(rows))
            for condition, t in settings:
                x_t = noised(model, latents, part, t, seed=0)
                found[condition, t].append(model.features(x_t, t, contexts[condition], blocks).numpy())
    return {setting: np.concatenate(parts) for setting, parts in found.items()}


def probe(vectors: NDArray, high: NDArray[np.bool_], slide: NDArray[np.int64]) -> tuple[float, float]:
    """Return the tile AUC of a ridge classifier on held-out slides, and its deviation over slides."""
    scores = np.empty(len(vectors))
    fold = slide // 2 % FOLDS  # pairs of slides, one of each class
    for held in range(FOLDS):
        train, test = fold != held, fold == held
        mean, spread = vectors[train].mean(0), vectors[train].std(0) + 1e-6
        fit = _ridge((vectors[train] - mean) / spread, np.where(high[train], 1.0, -1.0))
        scores[test] = fit((vectors[test] - mean) / spread)
    rng, auc = np.random.default_rng(0), area(scores, high)
    rows = [np.flatnonzero(slide == s) for s in np.unique(slide)]
    again = []
    while len(again) < BOOTSTRAPS:
        chosen = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
        if 0 < high[chosen].sum() < len(chosen):
            again.append(area(scores[chosen], high[chosen]))
    return auc, float(np.std(again))


def _ridge(x: NDArray, y: NDArray) -> Callable[[NDArray], NDArray]:
    """Fit in the dual form; the penalty has the least leave-one-out error."""
    values, axes = np.linalg.eigh(x @ x.T)
    best: tuple[float, NDArray] | None = None
    for penalty in RIDGES * len(x) / 100:
        inverse = (axes / (np.maximum(values, 0) + penalty)) @ axes.T
        dual = inverse @ y
        error = float(np.mean((dual / np.diag(inverse)) ** 2))
        if best is None or error < best[0]:
            best = error, dual
    assert best is not None
    weights = x.T @ best[1]
    return lambda new: new @ weights


def area(scores: NDArray, high: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve; ties count half."""
    above = scores[high][:, None] - scores[~high][None]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def measure(
    model: ZoomLDM, ssl: SSLEncoder | None, slides: int, tiles: int, timesteps: Sequence[int]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return AUC and deviation by task, then by "condition t block"; "colour" and "ssl" are the simple rivals."""
    widths = block_widths(model.config)
    starts = dict(zip(widths, np.cumsum([0, *widths.values()]), strict=False))
    settings = [("null", t) for t in timesteps]
    if ssl is not None:
        settings += [("own", t) for t in timesteps[1:-1] or timesteps]
    found = {}
    for task in TASKS:
        drawn = draw_slides(task, slides, tiles, ssl, model.config.base_mpp)
        slide = np.repeat(np.arange(slides), tiles)
        high = drawn.high[slide]
        rows = {"colour": probe(drawn.colours, high, slide)}
        if ssl is not None:
            grids = np.concatenate([part.cells for part in drawn.tiles if part.cells is not None])
            rows["ssl"] = probe(grids.mean((2, 3)), high, slide)
        for (condition, t), vectors in block_vectors(model, drawn, settings).items():
            parts = {name: vectors[:, starts[name] : starts[name] + widths[name]] for name in widths}
            joined = [names for names in JOINED if set(names) <= set(parts)]
            for names in [*((name,) for name in parts), *joined]:
                rows[f"{condition} {t} {'+'.join(names)}"] = probe(np.hstack([parts[n] for n in names]), high, slide)
        found[f"{task.scale} {task.knob}"] = rows
    return found


@torch.inference_mode()
def cost(model: ZoomLDM) -> dict[str, float]:
    """Return milliseconds per tile of the autoencoder, and of the U-Net up to each block: the best of three."""
    images, context = torch.zeros(BATCH, 3, TILE_PX, TILE_PX), model.null_context(BATCH)
    latents = model.encode(images)
    calls: dict[str, Callable[[], object]] = {"autoencoder": lambda: model.encode(images)}
    for name in block_widths(model.config):
        calls[name] = lambda name=name: model.features(latents, 100, context, [name])
    found = {}
    for name, call in calls.items():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        found[name] = min(times) / BATCH * 1e3
    return found


def tables(found: dict[str, dict[str, tuple[float, float]]], costs: dict[str, float]) -> str:
    """Return the figures as Markdown: a table per task and condition, then the costs and the best setting."""
    lines = []
    for task, rows in found.items():
        split = {key: key.split(" ") for key in rows if " " in key}
        for condition in dict.fromkeys(c for c, _, _ in split.values()):
            mine = [parts for parts in split.values() if parts[0] == condition]
            times, blocks = dict.fromkeys(t for _, t, _ in mine), dict.fromkeys(b for _, _, b in mine)
            lines += [
                f"**{task}, condition {condition}** (AUC)",
                "",
                f"| block | {' | '.join(f't = {t}' for t in times)} |",
            ]
            lines += ["|---" * (len(times) + 1) + "|"]
            for block in blocks:
                cells = [f"{rows[f'{condition} {t} {block}'][0]:.3f}" for t in times]
                lines.append(f"| {block} | {' | '.join(cells)} |")
            lines.append("")
        best = max(split, key=lambda key: rows[key][0])
        rivals = [f"{name} {rows[name][0]:.3f} ± {rows[name][1]:.3f}" for name in ("colour", "ssl") if name in rows]
        lines += [f"Best: {best}, {rows[best][0]:.3f} ± {rows[best][1]:.3f}. Beside it: {', '.join(rivals)}.", ""]
    mean = {key: np.mean([rows[key][0] for rows in found.values()]) for key in next(iter(found.values()))}
    best = max((key for key in mean if " " in key), key=lambda key: mean[key])
    lines += [f"**Best of both tasks**: {best}, mean AUC {mean[best]:.3f}.", ""]
    lines += ["| ms per tile | " + " | ".join(costs) + " |", "|---" * (len(costs) + 1) + "|"]
    lines += ["| | " + " | ".join(f"{ms:.0f}" for ms in costs.values()) + " |"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--slides", type=int, default=24, help=f"phantoms per task, at least {2 * FOLDS}")
    parser.add_argument("--tiles", type=int, default=10, help="tiles per phantom")
    parser.add_argument("--timesteps", default="1,50,150,300,600")
    parser.add_argument("--threads", type=int, default=2, help="1 on busy cores: threads wait for each other")
    parser.add_argument("--write", type=Path, help=f"a page whose part from {BEGIN} to {END} is replaced by the tables")
    arguments = parser.parse_args(argv)
    if arguments.slides < 2 * FOLDS or arguments.slides % 2:
        parser.error(f"--slides must be even and at least {2 * FOLDS}, one of each class per fold")
    pin_arithmetic(arguments.threads)
    start, model = time.perf_counter(), ZoomLDM.from_pretrained("demo")
    ssl = load_encoder(model.config.encoder, None, model.extras)
    timesteps = [int(t) for t in arguments.timesteps.split(",")]
    found, costs = measure(model, ssl, arguments.slides, arguments.tiles, timesteps), cost(model)
    how = f"`python -m benchmarks.features.feature_choice --slides {arguments.slides} --tiles {arguments.tiles} "
    how += f"--timesteps {arguments.timesteps} --threads {arguments.threads}`, {time.perf_counter() - start:.0f} s.\n\n"
    page = how + tables(found, costs)
    print(page)
    write_json(arguments.json, {"auc": found, "ms_per_tile": costs})
    if arguments.write:
        text = arguments.write.read_text()
        section = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
        arguments.write.write_text(section.sub(lambda _: f"{BEGIN}\n{page}\n{END}", text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
