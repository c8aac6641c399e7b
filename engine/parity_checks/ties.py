"""Latent pixels between two codes: which of the two did a reference draw?

A VQ decoder draws each latent pixel as its nearest code. Where two codes are equally near but for float32's rounding,
`quantise` takes the truly nearer one; the published arithmetic, |z|² + |e|² − 2z·e in float32, takes either, and which
depends on the machine. Neither is a fault, yet one such pixel of 4096 moves the picture's norm by 1 %, and not only
around it: attention and group normalisation carry it to every pixel. So a picture is compared whole, after each tie
was decided as the reference shows it. Every other pixel keeps its nearest code, so that a wrong code is still seen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.zoomldm import ZoomLDM

TIE = 1e-6
"""Gap of the squared distances to two codes, in units of |z|² + |e|², which the published arithmetic adds up: float32
keeps 1.2e-7 of each of its terms."""
MOST_TIES = 32
"""So many are decided, the closest first; each takes a picture. More are no accident of rounding."""


@dataclass(frozen=True)
class Tie:
    """A latent pixel, and the latents that decode as the code which `quantise` does not take."""

    picture: int
    y: int
    x: int
    other: Tensor
    """(K,): the second nearest code, scaled as latents are."""


@dataclass(frozen=True)
class Decided:
    """The least error that the ties among some latents leave."""

    error: float
    ties: int
    otherwise: int
    """How many of the ties the reference decided otherwise than `quantise`."""


def find_ties(model: ZoomLDM, latents: Tensor) -> list[Tie]:
    """Return the ties among latents (B, K, h, w), the closest first. Codes that are nearly one make none."""
    scale = model.config.scale_factor
    codes = model.vae.quantize.embedding.weight.detach().double().cpu()
    pixels = latents.detach().double().cpu() / scale
    found: list[tuple[float, Tie]] = []
    for number, picture in enumerate(pixels):
        for y in range(picture.shape[1]):  # by rows: float64 tables of a whole picture would take 268 MB at 8192 codes
            z = picture[:, y].T
            distance, index = (
                torch.cdist(z, codes, compute_mode="donot_use_mm_for_euclid_dist").square().topk(2, largest=False)
            )
            first, second = codes[index[:, 0]], codes[index[:, 1]]
            limit = TIE * (z.square().sum(1) + second.square().sum(1))
            gap = distance[:, 1] - distance[:, 0]
            close = (gap <= limit) & ((first - second).square().sum(1) > limit)
            found += [
                (float(gap[x] / limit[x]), Tie(number, y, x, second[x] * scale)) for x in close.nonzero()[:, 0].tolist()
            ]
    return [tie for _, tie in sorted(found, key=lambda pair: pair[0])]


def decide(model: ZoomLDM, latents: Tensor, error_of: Callable[[Tensor], float], enough: float) -> Decided:
    """Decide each tie among latents (B, K, h, w) so that the error of what is made of them becomes least.

    One after the other, since each is seen most around its own pixel, until the error is at most `enough`.
    """
    ties, otherwise, least = find_ties(model, latents), 0, error_of(latents)
    for tie in ties[:MOST_TIES]:
        if least <= enough:
            break
        changed = latents.clone()
        changed[tie.picture, :, tie.y, tie.x] = tie.other.to(latents)
        error = error_of(changed)
        if error < least:
            latents, least, otherwise = changed, error, otherwise + 1
    return Decided(least, len(ties), otherwise)
