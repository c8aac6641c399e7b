"""The SSL-like encoder of the embedded demo model: a fixed filter bank, then PCA whitening. No training, no download.

Invariant: a cell's vector is a pure function of its pixels and of the stored mean and projection; every entry lies in
(−SQUASH, SQUASH), whatever the picture. It does not know slides or files.
Source: Ruifrok & Johnston 2001 (stain densities); Freeman & Adelson 1991 (steerable derivatives); Mallat 2012
(scattering: pooled moduli are stable under small shifts and deformations, unlike pixels or raw responses).

What the raw features (RAW_DIM) see, at 1 µm/px and coarser:
  stain     mean and spread of haematoxylin (H), eosin (E) and the rest; soft histograms of H and E
  texture   mean and spread of the modulus of oriented Gaussian derivatives: 4 scales × 4 orientations × (H, E)
  blobs     both signs of the Laplacian at 4 scales × (H, E): density and size of nuclei, lumina, gaps
  layout    2×2 means of H, E, the rest and of the nuclear texture
Whitening makes all of them count; its damping keeps directions that are mostly noise from counting as much.
A learned network would see more, but needs data and minutes per slide on the CPU the demo is for.
"""

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import CheckpointError
from engine.model.ssl_encoder import digest_of, require_cells

DIM = 64
RAW_DIM = 120
SQUASH = 3.0
"""Whitened entries beyond about 3 deviations saturate: a real slide is far from a phantom in a few directions, and
one such direction must not swallow the cosine between two cells."""

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
_DAMPING = 0.1


class DemoEncoder(nn.Module):
    """A fitted filter-bank encoder; `id` is "demo". The filters are constants, only the whitening is stored."""

    id = "demo"
    center: Tensor
    projection: Tensor
    filters: Tensor

    def __init__(self, center: Tensor, projection: Tensor) -> None:
        """Take `center` (RAW_DIM,) and `projection` (RAW_DIM, D), both float32; use fit or from_tensors."""
        super().__init__()
        self.register_buffer("center", center)
        self.register_buffer("projection", projection)
        self.register_buffer("filters", _derivative_filters().to(center.device), persistent=False)

    @property
    def dim(self) -> int:
        return self.projection.shape[1]

    @property
    def digest(self) -> str:
        return digest_of(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Return what `from_tensors` reads; kept in the model folder as "encoder/model"."""
        return {"center": self.center.detach().cpu(), "projection": self.projection.detach().cpu()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Build the encoder from stored tensors. Raises CheckpointError when they are not a demo encoder's."""
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        right = set(shapes) == {"center", "projection"} and shapes["center"] == (RAW_DIM,)
        right = right and len(shapes["projection"]) == 2 and shapes["projection"][0] == RAW_DIM
        if not right or not all(v.is_floating_point() and v.isfinite().all() for v in tensors.values()):
            raise CheckpointError(
                f"a demo encoder must hold finite center ({RAW_DIM},) and projection ({RAW_DIM}, D); got {shapes}. "
                "Restore the model folder's encoder/model.safetensors, or fit the encoder again."
            )
        return cls(tensors["center"].float(), tensors["projection"].float().contiguous())

    @classmethod
    def fit(cls, cells: Tensor, dim: int = DIM) -> Self:
        """Fit the whitening on uint8 cells `(N, 3, 256, 256)`; a few thousand cells of many slides are plenty.

        Raises: ValueError for fewer than 2·dim cells, too few to estimate the spectrum, or for cells without variety.
        """
        require_cells(cells)
        if not 1 <= dim <= RAW_DIM or len(cells) < 2 * dim:
            raise ValueError(
                f"fitting {dim} dimensions (1 to {RAW_DIM}) needs at least {2 * dim} cells; got {len(cells)}. "
                "Pass more cells or a smaller dim."
            )
        filters = _derivative_filters()
        raw = torch.cat([raw_features(cell, filters) for cell in cells.split(1)]).double()
        spread, center = torch.std_mean(raw, dim=0)
        if not bool((spread > 1e-6).any()):
            raise ValueError(f"the {len(cells)} cells must differ to fit an encoder; all look the same.")
        # A feature that hardly moves on these cells must not be blown up on other ones.
        scale = 1 / spread.clamp_min(0.1 * float(spread.median()) + 1e-6)
        eigenvalues, axes = torch.linalg.eigh(torch.cov(((raw - center) * scale).T))
        eigenvalues, axes = eigenvalues.flip(0)[:dim].clamp_min(0), axes.flip(1)[:, :dim]
        # An eigenvector's sign is arbitrary; fixing it makes two fits of the same cells equal.
        axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
        damped = (eigenvalues + _DAMPING * eigenvalues.mean()).rsqrt()
        # Laid out as it is read back: another memory order may change the product's last bits.
        return cls(center.float(), (scale[:, None] * axes * damped).float().contiguous())

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Encode uint8 cells `(B, 3, 256, 256)` to float32 `(B, D)` in (−SQUASH, SQUASH), on the CPU.

        Raises: ValueError for another dtype or shape.
        """
        require_cells(images)
        if not len(images):
            return torch.empty(0, self.dim)
        # One cell at a time: its maps stay in the cache (twice as fast), and its vector cannot depend on its batch.
        return torch.cat([self._encode_cell(cell) for cell in images.split(1)]).cpu()

    def _encode_cell(self, cell: Tensor) -> Tensor:
        whitened = (raw_features(cell.to(self.center.device), self.filters) - self.center) @ self.projection
        return SQUASH * torch.tanh(whitened / SQUASH)


def raw_features(cells: Tensor, filters: Tensor) -> Tensor:
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


def _derivative_filters() -> Tensor:
    """Return Gaussian derivatives (5, 1, k, k) x, y, xx, xy, yy, normalised by scale (× σ per order), zero mean."""
    at = torch.arange(-_RADIUS, _RADIUS + 1, dtype=torch.float64) / _SIGMA
    gauss = torch.exp(-at.square() / 2)
    gauss = gauss / gauss.sum()
    first, second = -at * gauss, (at.square() - 1) * gauss
    second = second - second.mean()
    pairs = [(gauss, first), (first, gauss), (gauss, second), (first, first), (second, gauss)]
    return torch.stack([torch.outer(rows, columns) for rows, columns in pairs])[:, None].float()
