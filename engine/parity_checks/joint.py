"""The reference joint steps with newton, replayed on a few of their tiles.

The tiles of these references do not overlap: they meet only in the guide, whose steps do not depend on them. So a tile
is replayed exactly without the others, and a few prove what all would: two of different rows and columns tell rows
from columns, and in one batch they tell a tile's own peak from the batch's; later steps prove one tile's arithmetic at
other times. All sixteen took a quarter of an hour on two cores, for float64 has no fast convolution on a CPU. A third
of that was page faults: the C library gives every buffer above 32 MiB back to the system, which has to zero it again
for the next convolution.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from engine.core.units import TILE_PX
from engine.model.zoomldm import ZoomLDM
from engine.parity_checks.activations import PARTS_TOLERANCE, Check, Expected, relative
from engine.sampling.denoiser import newton_direction
from engine.sampling.guidance import GuidePicture
from engine.sampling.schedule import Step, steps

JOINT_TOLERANCE = 1e-6
WEIGHT, NEWTON_STEP, NEWTON_LR = 2.0, 0.005, 0.5


def replayed_tiles(n: int) -> list[int]:
    """Return which of n×n row-major tiles are replayed: the second of the first row, the third of the second row."""
    return [1, n + min(2, n - 1)] if n > 1 else [0]


def replay_joint(model: ZoomLDM, e: Expected) -> Iterator[Check]:
    """Replay joint steps with newton: t from 200·steps, stride 200, w = 2. Needs a float64 model.

    In float32 the finite differences amplify rounding to 1 % after one step, whoever computes them.
    """
    if "x_T" not in e:
        return
    n, device = round(len(e["x_T"]) ** 0.5), model.device
    tiles = replayed_tiles(n)
    grid = e["ssl_grid"].double().to(device)
    # As with the Summarizer's own references, this grid is past standardising.
    context = model.conditioner([grid[:, y : y + 1, x : x + 1] for y in range(n) for x in range(n)], [0] * n * n)
    guide_context = model.conditioner([grid], [n.bit_length() - 1])
    yield Check("context_20x", relative(context, e["context_20x"]), PARTS_TOLERANCE)
    yield Check("context_guide", relative(guide_context, e["context_guide"]), PARTS_TOLERANCE)
    context, guide_context = e["context_20x"][tiles].double().to(device), e["context_guide"].double().to(device)
    x_t, guide_x_t = e["x_T"][tiles].double().to(device), e["guide_x_T"].double().to(device)
    for i, step in enumerate(steps(200 * sum(k.endswith(".guide_noise") for k in e), 200)):
        guide_eps = model.predict_eps(guide_x_t, step.t, guide_context, WEIGHT)
        guide_x0 = model.x0_from_eps(guide_x_t, guide_eps, step.alpha_bar)
        picture = model.decode(guide_x0).clamp(-1, 1)
        guide_x_t = _advance(step, guide_x0, guide_eps, e[f"step{i}.guide_noise"])
        for name, value in (("guide_image", picture), ("guide_x_next", guide_x_t)):
            yield Check(f"step{i}.{name}", relative(value, e[f"step{i}.{name}"]), JOINT_TOLERANCE)
        corrections = sum(key.startswith(f"step{i}.newton") for key in e) // 3
        found = _step_of_tiles(model, step, x_t, context, _squares(picture, n)[tiles], corrections)
        x_t = found["x_next"] = _advance(step, found["x0_after_newton"], found.pop("eps"), e[f"step{i}.noise"][tiles])
        for name, value in found.items():
            yield Check(f"step{i}.{name}", _error(value, e[f"step{i}.{name}"], tiles), JOINT_TOLERANCE)
        tiles, x_t, context = tiles[:1], x_t[:1], context[:1]  # which is where in the picture was seen


def _step_of_tiles(
    model: ZoomLDM, step: Step, x_t: Tensor, context: Tensor, target: Tensor, corrections: int
) -> dict[str, Tensor]:
    """Return every stage of one step of tiles, by the names of the references, and the last eps."""
    eps = model.predict_eps(x_t, step.t, context, WEIGHT)
    x0 = model.x0_from_eps(x_t, eps, step.alpha_bar)
    found = {"x0_before": x0}
    for k in range(corrections):
        move = newton_direction(model, x_t, x0, context, target, NEWTON_STEP, (step.t, step.alpha_bar, WEIGHT))
        found |= {f"newton{k}.{key}": value for key, value in vars(move).items()}
        x_t = x_t + NEWTON_LR * move.direction
        eps = model.predict_eps(x_t, step.t, context, WEIGHT)
        x0 = model.x0_from_eps(x_t, eps, step.alpha_bar)
    return found | {"x_t_after_newton": x_t, "x0_after_newton": x0, "eps": eps}


def _error(ours: Tensor, expected: Tensor, tiles: list[int]) -> float:
    """Compare the replayed tiles with a reference that shows all tiles, or only the first few."""
    shown = [place for place, tile in enumerate(tiles) if tile < len(expected)]
    return relative(ours[shown], expected[[tiles[place] for place in shown]])


def _squares(picture: Tensor, n: int) -> Tensor:
    """Cut a guide picture (1, 3, 256, 256) into the squares of n×n tiles as a run does: (n², 3, 256/n, 256/n)."""
    guide = GuidePicture(picture[0].cpu().numpy(), n)
    found = [guide.square(y * TILE_PX, x * TILE_PX, TILE_PX // n) for y in range(n) for x in range(n)]
    return torch.from_numpy(np.stack(found)).to(picture)


def _advance(step: Step, x0: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
    arrays = (v.double().cpu().numpy() for v in (x0, eps, noise))
    return torch.from_numpy(step.update(*arrays)).to(x0)
