"""SSL vectors of a tile → cross-attention tokens. One tile's tokens do not depend on the others in the call.

It does not know where the vectors come from, nor guidance. Parameter names are those of the published checkpoints, so
no table of names is needed. torchvision's ViT blocks are rebuilt from torch.nn: torchvision is not a dependency.
Source: ZoomLDM (CVPR 2025), Summarizer; Large-Image-Diffusion (CVPR 2024), one- and two-token conditioner.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from engine.model.config import ModelConfig

GRID_SIDE = 8
"""Cells on each axis that the Summarizer sees at most."""
CELL_TOKENS = GRID_SIDE * GRID_SIDE
_NORM_EPS = 1e-6


def standardise(grid: Float[Tensor, "d h w"]) -> Float[Tensor, "d h w"]:
    """Standardise each cell of `(D, h, w)` over its channels: (e − mean)/std, the std with n − 1.

    Source: n − 1 meets `refine.window_context` of the reference activations to 2e-7; n misses it by 9e-4.
    Raises: ValueError for a cell whose channels are all equal or not finite.
    """
    std, mean = torch.std_mean(grid, dim=0, keepdim=True)
    if not bool(((std > 0) & torch.isfinite(std)).all()):
        raise ValueError("every cell of an SSL grid must be finite and vary over its channels; one is constant or NaN.")
    return (grid - mean) / std


class EncoderLayer(nn.Module):
    """Apply one pre-norm transformer layer to `(B, T, width)`; names as in torchvision's ViT."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=_NORM_EPS)
        # Identity stands where the published network has dropout, so that the second linear is "mlp.3".
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Identity(), nn.Linear(mlp, width))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.ln_1(tokens)
        tokens = tokens + self.self_attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.ln_2(tokens))


class Encoder(nn.Module):
    """Add learned positions to `(B, 65, width)`, apply the layers and the final norm."""

    def __init__(self, width: int, layers: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, CELL_TOKENS + 1, width).normal_(std=0.02))
        self.layers = nn.Sequential()
        for i in range(layers):
            self.layers.add_module(f"encoder_layer_{i}", EncoderLayer(width, heads, mlp))
        self.ln = nn.LayerNorm(width, eps=_NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.ln(self.layers(tokens + self.pos_embedding))


class Summarizer(nn.Module):
    """Turn SSL grids of any size and a magnification into 65 tokens each.

    Grids above 8×8 are average-pooled to 8; fewer than 64 cells fill the middle tokens, row by row.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.conditioner
        self.ssl_dim, self.output_dim = config.ssl_dim, c.output_dim
        self.pad_token = nn.Parameter(torch.empty(1, 1, c.width).normal_(std=0.02))
        self.mag_embedding = nn.Embedding(len(config.magnifications), c.width)
        self.dim_reduce = nn.Linear(config.ssl_dim, c.width)
        self.encoder = Encoder(c.width, c.layers, c.heads, c.mlp)
        self.final_proj = nn.Linear(c.width, c.output_dim)
        self.layer_norm = nn.LayerNorm(c.output_dim)

    @staticmethod
    def prepare(grid: Tensor) -> Tensor:
        """Pool a raw grid `(D, h, w)` to at most 8×8 cells and standardise each, in float32 at least."""
        _check_grid(grid)
        side = (min(grid.shape[1], GRID_SIDE), min(grid.shape[2], GRID_SIDE))
        wide = grid.to(torch.promote_types(grid.dtype, torch.float32))
        return standardise(functional.adaptive_avg_pool2d(wide, side))

    def forward(self, cells: Sequence[Tensor], magnifications: Sequence[int]) -> Float[Tensor, "b t c"]:
        """Summarise prepared grids `(D, ≤8, ≤8)` with their magnification indices: `(B, 65, C)`."""
        _check_magnifications(cells, magnifications, self.mag_embedding.num_embeddings)
        placed = torch.stack([self._place(grid) for grid in cells])
        index = torch.tensor(list(magnifications), device=placed.device)
        tokens = torch.cat([self.mag_embedding(index)[:, None], placed], dim=1)
        return self.layer_norm(self.final_proj(self.encoder(tokens)))

    def _place(self, cells: Tensor) -> Tensor:
        _check_grid(cells, self.ssl_dim)
        count = cells.shape[1] * cells.shape[2]
        if count > CELL_TOKENS:
            raise ValueError(f"the Summarizer takes at most 8×8 cells; got {tuple(cells.shape[1:])}; prepare() it.")
        tokens = self.dim_reduce(cells.flatten(1).T.to(self.pad_token))
        start, pad = CELL_TOKENS // 2 - count // 2, self.pad_token[0]
        return torch.cat([pad.expand(start, -1), tokens, pad.expand(CELL_TOKENS - start - count, -1)])

    def null(self, batch: int) -> Float[Tensor, "{batch} t c"]:
        """Return the null condition `(B, 65, C)`: zeros, because training dropped whole summaries."""
        return self.pad_token.new_zeros(batch, CELL_TOKENS + 1, self.output_dim)


class TokenConditioner(nn.Module):
    """Turn one SSL vector into one token, or a tile's and its region's into two (the predecessor's form)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.conditioner
        self.ssl_dim, self.region_dim, self.normalize = config.ssl_dim, c.region_dim, c.normalize
        self.patch_fc = nn.Linear(config.ssl_dim, c.output_dim)
        self.region_fc = nn.Linear(c.region_dim, c.output_dim) if c.region_dim else None

    def prepare(self, grid: Tensor) -> Tensor:
        """Return the vector `(D, 1, 1)` of one cell with an absent region filled with zeros, in float32 at least.

        D is the tile's width, or the tile's and the region's, one after the other.
        """
        full = self.ssl_dim + self.region_dim
        _check_grid(grid, self.ssl_dim, full)
        if grid.shape[1:] != (1, 1):
            raise ValueError(f"a token conditioner takes one cell per tile; got {tuple(grid.shape[1:])} cells.")
        wide = grid.to(torch.promote_types(grid.dtype, torch.float32))
        return functional.pad(wide, (0, 0, 0, 0, 0, full - grid.shape[0]))

    def forward(self, cells: Sequence[Tensor], magnifications: Sequence[int]) -> Float[Tensor, "b t c"]:
        """Embed prepared vectors `(D, 1, 1)`: `(B, 1, C)`, or `(B, 2, C)` with a region."""
        _check_magnifications(cells, magnifications, 1)
        return self._embed(torch.stack([cell[:, 0, 0] for cell in cells]))

    def null(self, batch: int) -> Float[Tensor, "{batch} t c"]:
        """Return the null condition `(B, 1 or 2, C)`: the answer to zeros, i.e. the biases."""
        return self._embed(self.patch_fc.weight.new_zeros(batch, self.ssl_dim + self.region_dim))

    def _embed(self, vectors: Tensor) -> Tensor:
        layers = [self.patch_fc] if self.region_fc is None else [self.patch_fc, self.region_fc]
        parts = vectors.split([layer.in_features for layer in layers], dim=1)
        if self.normalize:
            parts = [functional.normalize(part, dim=1) for part in parts]
        tokens = [layer(part.to(layer.weight)) for layer, part in zip(layers, parts, strict=True)]
        return torch.stack(tokens, dim=1)


Conditioner = Summarizer | TokenConditioner


def build_conditioner(config: ModelConfig) -> Conditioner:
    """Return the conditioner that the config names, with random weights."""
    return Summarizer(config) if config.conditioner.kind == "summarizer" else TokenConditioner(config)


def _check_grid(grid: Tensor, *dims: int) -> None:
    """Raise ValueError unless `grid` is (D, h, w), not empty, with D one of `dims` (any when none is given)."""
    if grid.ndim != 3 or 0 in grid.shape or (dims and grid.shape[0] not in dims):
        wanted = f" with D = {' or '.join(str(d) for d in sorted(set(dims)))}" if dims else ""
        raise ValueError(f"an SSL grid must be (D, h, w){wanted}; got {tuple(grid.shape)}.")


def _check_magnifications(grids: Sequence[Tensor], magnifications: Sequence[int], known: int) -> None:
    if not grids or len(grids) != len(magnifications):
        raise ValueError(
            f"summarize needs one magnification per grid and at least one; got {len(grids)} grids, "
            f"{len(magnifications)} magnifications."
        )
    wrong = [m for m in magnifications if not 0 <= m < known]
    if wrong:
        raise ValueError(f"a magnification index must lie in 0…{known - 1}; got {wrong[0]}.")
