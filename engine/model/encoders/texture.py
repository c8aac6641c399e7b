"""Texture of one cell by a fixed filter bank: nothing is trained, fitted or downloaded.

Invariant: a cell's vector is a pure function of its pixels. It does not know slides or files.
Source: Ruifrok & Johnston 2001 (stain densities); Freeman & Adelson 1991 (steerable derivatives); Mallat 2012
(scattering: pooled moduli are stable under small shifts and deformations, unlike pixels or raw responses).

What the raw features (RAW_DIM) see, from two px of the cell on (1 µm at 20x):
  stain     mean and spread of haematoxylin (H), eosin (E) and the rest; soft histograms of H and E
  texture   mean and spread of the modulus of oriented Gaussian derivatives: 4 scales × 4 orientations × (H, E)
  blobs     both signs of the Laplacian at 4 scales × (H, E): density and size of nuclei, lumina, gaps
  layout    2×2 means of H, E, the rest and of the nuclear texture
"""

import math

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from engine.model.encoders.base import digest_of, require_cells

RAW_DIM = 120
SCALES = 4
ORIENTATIONS = 4
_LAMP = 245.0
_STAINS = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))
"""Optical density of H, E and the third stain of the published matrix, which here takes what is left over."""
_HISTOGRAM = (0.05, 0.15, 0.3, 0.5, 0.75, 1.05)
"""Centres of the soft histogram bins, in density of one stain."""
_FLOOR = 0.01
"""Density below which texture is camera noise: log(modulus + floor) is flat there, and finite on white glass."""
_SIGMA, _RADIUS = 1.2, 4


class TextureEncoder(nn.Module):
    """The raw features as they are; `id` is "texture". Their entries differ in size: scale or whiten them."""

    id, dim = "texture", RAW_DIM
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filters", derivative_filters(), persistent=False)

    @property
    def digest(self) -> str:
        return digest_of({"filters": self.filters, "stains": torch.tensor(_STAINS), "bins": torch.tensor(_HISTOGRAM)})

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Float32[Tensor, "b d"]:
        """Encode uint8 cells `(B, 3, 256, 256)` to float32 `(B, RAW_DIM)`, on the CPU.

        Raises: ValueError for another dtype or shape.
        """
        require_cells(images)
        if not len(images):
            return torch.empty(0, self.dim)
        # One cell at a time: its maps stay in the cache (twice as fast), and its vector cannot depend on its batch.
        return torch.cat([raw_features(cell.to(self.filters.device), self.filters) for cell in images.split(1)]).cpu()


def raw_features(cells: UInt8[Tensor, "b 3 h w"], filters: Float32[Tensor, "5 1 k k"]) -> Float32[Tensor, "b d"]:
    """Return the raw features of uint8 `(B, 3, 256, 256)`: float32 `(B, RAW_DIM)`, finite for any pixels.

    `filters` are the five Gaussian derivatives (5, 1, k, k): x, y, xx, xy, yy.
    """
    stains = _stain_densities(cells)
    dyes = stains[:, :2]
    features = [_mean_and_spread(stains), _soft_histogram(dyes), F.adaptive_avg_pool2d(stains, 2).flatten(1)]
    for scale in range(SCALES):
        level = F.avg_pool2d(dyes, 2**scale) if scale else dyes
        features.append(_mean_and_spread(level)[:, 2:] if scale else _nuclear_layout(level))
        features += _texture(level, filters)
    return torch.cat(features, dim=1)


def _stain_densities(cells: Tensor) -> Tensor:
    """Return densities of H, E and the rest, (B, 3, 128, 128), clipped to [−0.5, 3].

    Halved first: the finest octave is mostly sharpness of scanner, JPEG and decoder rather than tissue.
    """
    light = F.avg_pool2d(cells.float(), 2).clamp(1, _LAMP)
    matrix = torch.tensor(_STAINS, device=cells.device)
    inverse = torch.linalg.inv(matrix / matrix.norm(dim=1, keepdim=True))
    return torch.einsum("bchw,cs->bshw", -torch.log10(light / _LAMP), inverse).clamp(-0.5, 3)


def _mean_and_spread(maps: Tensor) -> Tensor:
    """Return means, then deviations over each map of (B, C, h, w): (B, 2·C)."""
    spread, mean = torch.std_mean(maps, dim=(2, 3))
    return torch.cat([mean, spread], dim=1)


def _soft_histogram(maps: Tensor) -> Tensor:
    """Return the share of pixels above each centre with a soft edge: (B, C·bins); unlike hard bins, no jumps."""
    edges = [torch.sigmoid((maps - centre) * (4 / centre)).mean(dim=(2, 3)) for centre in _HISTOGRAM]
    return torch.cat(edges, dim=1)


def _nuclear_layout(dyes: Tensor) -> Tensor:
    """Return the logarithm of the haematoxylin contrast in each quadrant: (B, 4)."""
    haematoxylin = dyes[:, :1]
    around = F.pad(haematoxylin, (_RADIUS,) * 4, mode="reflect")
    # Two passes: one 9×9 pooling costs as much as all the rest of the encoder.
    around = F.avg_pool2d(F.avg_pool2d(around, (9, 1), 1), (1, 9), 1)
    contrast = (haematoxylin - around).abs()
    return torch.log(F.adaptive_avg_pool2d(contrast, 2) + _FLOOR).flatten(1)


def _texture(level: Tensor, filters: Tensor) -> list[Tensor]:
    """Return log mean and log spread of oriented moduli, and log means of both signs of the Laplacian, of one scale.

    `level` is (B, 2, h, w); the results are (B, 2·ORIENTATIONS) twice and (B, 2) twice.
    """
    batch, dyes, h, w = level.shape
    padded = F.pad(level.reshape(batch * dyes, 1, h, w), (_RADIUS,) * 4, mode="reflect")
    dx, dy, dxx, dxy, dyy = F.conv2d(padded, filters).reshape(batch, dyes, 5, h, w).unbind(2)
    moduli = []
    for i in range(ORIENTATIONS):
        c, s = math.cos(math.pi * i / ORIENTATIONS), math.sin(math.pi * i / ORIENTATIONS)
        odd, even = c * dx + s * dy, c * c * dxx + 2 * c * s * dxy + s * s * dyy
        # The modulus of an odd and an even response does not care whether an edge or a line passes.
        moduli.append(torch.sqrt(odd.square() + even.square()))
    energy = torch.log(_mean_and_spread(torch.cat(moduli, dim=1)) + _FLOOR)
    laplacian = dxx + dyy
    blobs = [torch.log(F.relu(sign * laplacian).mean(dim=(2, 3)) + _FLOOR) for sign in (1, -1)]
    return [energy, *blobs]


def derivative_filters() -> Tensor:
    """Return Gaussian derivatives (5, 1, k, k) x, y, xx, xy, yy, normalised by scale (× σ per order), zero mean."""
    at = torch.arange(-_RADIUS, _RADIUS + 1, dtype=torch.float64) / _SIGMA
    gauss = torch.exp(-at.square() / 2)
    gauss = gauss / gauss.sum()
    first, second = -at * gauss, (at.square() - 1) * gauss
    second = second - second.mean()
    pairs = [(gauss, first), (first, gauss), (gauss, second), (first, first), (second, gauss)]
    return torch.stack([torch.outer(rows, columns) for rows, columns in pairs])[:, None].float()
