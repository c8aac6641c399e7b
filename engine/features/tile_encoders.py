"""Tiles → one vector each: by the diffusion model's U-Net, or by an SSL encoder.

Invariant: a tile's vector is a pure function of its pixels, slide, magnification, coordinates and the settings; it
depends neither on its neighbours nor on how tiles are cut into batches. It does not know files, slides or Ray.
Source: ZoomLDM (CVPR 2025), features for multiple-instance learning: encode, noise to a timestep, one pass, pool.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from numpy.typing import NDArray
from torch import Tensor

from engine.core.errors import CheckpointError
from engine.core.numerics import noise_block
from engine.core.units import TILE_PX
from engine.model.config import ModelConfig
from engine.model.encoders.base import SSLEncoder
from engine.model.unet_features import check_blocks
from engine.model.zoomldm import ZoomLDM, digest


@dataclass(frozen=True)
class TilePixels:
    """Tiles of one slide at one magnification; numpy only, so that they travel."""

    slide: str
    """Name of the slide; it keys the noise."""
    scale: str
    """Magnification: "20x"."""
    coords: NDArray[np.int64]
    """(n, 2): x and y of the top left corner, level-0 px; they key the noise."""
    images: NDArray[np.uint8]
    """(n, 3, 256, 256), RGB."""
    valid: NDArray[np.bool_] | None = None
    """(n,): False where the pixels could not be read; such tiles are not looked at. None: all are."""
    cells: NDArray[np.float32] | None = None
    """(n, D, h, w): SSL vectors of the cells a tile covers, for condition "own"."""

    def __post_init__(self) -> None:
        n = len(self.coords)
        if self.images.dtype != np.uint8 or self.images.shape != (n, 3, TILE_PX, TILE_PX):
            raise ValueError(
                f"tiles must be uint8 ({n}, 3, {TILE_PX}, {TILE_PX}), one per coordinate; got {self.images.dtype} "
                f"{self.images.shape}."
            )
        for name, array in (("valid", self.valid), ("cells", self.cells)):
            if array is not None and len(array) != n:
                raise ValueError(f"{name} must have one entry for each of the {n} tiles; got {len(array)}.")


class TileEncoder(Protocol):
    """Turns tiles into vectors; the same call for every network."""

    @property
    def id(self) -> str:
        """The encoder's name in bags: "zoomldm", "uni", …"""
        ...

    @property
    def dim(self) -> int:
        """D, the length of one vector."""
        ...

    def attributes(self) -> dict[str, Any]:
        """Return what bags.BagAttributes must say about the encoder; reads all weights, so ask once."""
        ...

    def encode(self, tiles: TilePixels) -> Float32[np.ndarray, "n d"]:
        """Return (n, D); NaN for tiles that are not valid. Raises CheckpointError if the network returns NaN."""
        ...


@dataclass(frozen=True)
class FeatureConfig:
    """What of the U-Net becomes a tile's vector."""

    blocks: tuple[str, ...] = ("up.3",)
    """U-Net blocks whose spatial means are joined: down.0 (finest) ..., mid, up.0 (coarsest) ..."""
    timestep: int = 300
    """Timestep the latents are noised to: 0 (almost clean) to 999."""
    condition: Literal["null", "own"] = "null"
    """null: no condition; own: each tile's own SSL vectors and magnification, which costs an SSL encoder."""
    batch: int = 16
    """Tiles per network call, in one shape; another number may change the last bits."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        if self.timestep < 0 or self.batch < 1:
            raise ValueError(f"timestep >= 0 and batch >= 1 must hold; got {self.timestep} and {self.batch}.")


class _Wide(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def dim(self) -> int: ...


def diffusion_width(model: ModelConfig, config: FeatureConfig, ssl: _Wide | None) -> int:
    """Return D of a DiffusionEncoder of these. Raises ValueError where they do not fit together."""
    width = check_blocks(model, config.blocks)
    if config.timestep >= model.timesteps:
        raise ValueError(f"timestep must be below {model.timesteps}; got {config.timestep}.")
    if ssl is not None and ssl.dim != model.ssl_dim:
        raise ValueError(
            f"the model is conditioned on {model.ssl_dim} wide vectors of {model.encoder!r}; got "
            f"{ssl.id!r}, {ssl.dim} wide. Use the model's own encoder."
        )
    return width


def diffusion_attributes(config: FeatureConfig, weights_sha256: str) -> dict[str, Any]:
    """Return what bags say of a DiffusionEncoder with these weights."""
    return {
        "encoder": DiffusionEncoder.id,
        "weights_sha256": weights_sha256,
        "block": ",".join(config.blocks),
        "timestep": config.timestep,
        "condition": config.condition,
        "seed": config.seed,
    }


def ssl_attributes(id: str, weights_sha256: str) -> dict[str, Any]:
    """Return what bags say of an SSLTileEncoder with these weights."""
    return {"encoder": id, "weights_sha256": weights_sha256}


class DiffusionEncoder:
    """The U-Net of a ZoomLDM as an encoder of tiles; its id is "zoomldm"."""

    id = "zoomldm"

    def __init__(self, model: ZoomLDM, config: FeatureConfig, ssl: SSLEncoder | None = None) -> None:
        """`ssl` makes the vectors of condition "own" at the base magnification, unless the tiles bring them.

        Raises: ValueError for unknown blocks, a timestep the model does not know, or a wrong `ssl`.
        """
        self.dim = diffusion_width(model.config, config, ssl)
        self.model, self.config, self.ssl = model, config, ssl

    def attributes(self) -> dict[str, Any]:
        return diffusion_attributes(self.config, digest(self.model))

    def encode(self, tiles: TilePixels) -> Float32[np.ndarray, "n d"]:
        index = self.model.config.scale.index(tiles.scale)
        if self.config.condition == "own":
            tiles = self._with_cells(tiles)
        return _in_batches(self, tiles, self.config.batch, lambda part: self._encode_batch(part, index))

    def _with_cells(self, tiles: TilePixels) -> TilePixels:
        """Add the SSL vectors that condition the tiles. Raises ValueError where they must be brought."""
        if tiles.cells is not None:
            return tiles
        factor = self.model.config.scale.factor(tiles.scale)
        if self.ssl is None or factor != 1:
            raise ValueError(
                f"condition 'own' needs the {factor}x{factor} SSL vectors that a tile covers at {tiles.scale}; the "
                "tiles bring none. Pass cells, made of the base magnification's pixels, or use condition 'null'."
            )
        vectors = SSLTileEncoder(self.ssl, self.config.batch).encode(tiles)
        return replace(tiles, cells=vectors[:, :, None, None])

    @torch.inference_mode()
    def _encode_batch(self, tiles: TilePixels, index: int) -> Tensor:
        latents = self.model.encode(as_images(tiles, self.model.device))
        x_t = noised(self.model, latents, tiles, self.config.timestep, self.config.seed)
        return self.model.features(x_t, self.config.timestep, self._context(tiles, index), self.config.blocks)

    def _context(self, tiles: TilePixels, index: int) -> Tensor:
        if tiles.cells is None or self.config.condition == "null":
            return self.model.null_context(len(tiles.coords))
        grids = list(torch.from_numpy(tiles.cells).to(self.model.device))
        return self.model.summarize(grids, [index] * len(grids))


def as_images(tiles: TilePixels, device: torch.device) -> Float32[Tensor, "n 3 256 256"]:
    """Return the pixels as the model takes them: float32 (n, 3, 256, 256) in [−1, 1]; bytes travel to the device."""
    return torch.from_numpy(tiles.images).to(device).float() / 127.5 - 1


def noised(
    model: ZoomLDM, latents: Float[Tensor, "n c h w"], tiles: TilePixels, timestep: int, seed: int
) -> Float[Tensor, "n c h w"]:
    """Noise latents (n, 3, 64, 64) to a timestep, each with the noise of its slide, magnification and place."""
    stream = f"features/{tiles.slide}/{tiles.scale}"
    noise = [
        # Modulo: a tile may begin left of the slide, and the counter knows no negative numbers.
        noise_block(seed, stream, timestep, int(y) % 2**64, int(x) % 2**64)
        for x, y in tiles.coords
    ]
    alpha_bar = float(model.alphas_cumprod[timestep])
    drawn = torch.from_numpy(np.stack(noise)).to(latents)
    return alpha_bar**0.5 * latents + (1 - alpha_bar) ** 0.5 * drawn


class SSLTileEncoder:
    """An SSL encoder as an encoder of tiles, at any magnification."""

    def __init__(self, ssl: SSLEncoder, batch: int = 16) -> None:
        """`batch` is the number of tiles per network call."""
        self.ssl, self.batch = ssl, batch
        self.id, self.dim = ssl.id, ssl.dim

    def attributes(self) -> dict[str, Any]:
        return ssl_attributes(self.id, self.ssl.digest)

    def encode(self, tiles: TilePixels) -> Float32[np.ndarray, "n d"]:
        return _in_batches(self, tiles, self.batch, lambda part: self.ssl.encode(torch.from_numpy(part.images)))


def encode_all(encoders: Sequence[TileEncoder], tiles: TilePixels) -> dict[str, NDArray[np.float32]]:
    """Encode the same pixels with several encoders: vectors (n, D) by encoder id, in the order given.

    SSL vectors that are wanted for themselves also condition the diffusion model, so that they are computed once.
    """
    vectors: dict[str, NDArray[np.float32]] = {}
    for encoder in sorted(encoders, key=lambda e: isinstance(e, DiffusionEncoder)):
        given = tiles
        if isinstance(encoder, DiffusionEncoder) and encoder.config.condition == "own" and tiles.cells is None:
            known = vectors.get(encoder.model.config.encoder)
            if known is not None and encoder.model.config.scale.factor(tiles.scale) == 1:
                given = replace(tiles, cells=known[:, :, None, None])
        vectors[encoder.id] = encoder.encode(given)
    return {encoder.id: vectors[encoder.id] for encoder in encoders}


def cell_grids(
    ssl: SSLEncoder, children: UInt8[np.ndarray, "n k k 3 256 256"], batch: int = 16
) -> Float32[np.ndarray, "n d k k"]:
    """Return the SSL vectors of the base cells under coarser tiles, for TilePixels.cells: float32 (n, D, k, k).

    `children` is uint8 (n, k, k, 3, 256, 256): all cells of each tile row by row, the ones without tissue too.
    """
    n, k = children.shape[:2]
    flat = children.reshape(n * k * k, 3, TILE_PX, TILE_PX)
    tiles = TilePixels("", "", np.zeros((len(flat), 2), np.int64), flat)
    vectors = SSLTileEncoder(ssl, batch).encode(tiles)
    return np.ascontiguousarray(vectors.reshape(n, k, k, ssl.dim).transpose(0, 3, 1, 2))


def _in_batches(
    encoder: TileEncoder, tiles: TilePixels, size: int, compute: Callable[[TilePixels], Tensor]
) -> NDArray[np.float32]:
    """Evaluate the valid tiles in batches of one shape (the last one filled up), and put each where it belongs."""
    vectors = np.full((len(tiles.coords), encoder.dim), np.nan, np.float32)
    rows = np.arange(len(tiles.coords)) if tiles.valid is None else np.flatnonzero(tiles.valid)
    for first in range(0, len(rows), size):
        chosen = rows[first : first + size]
        # Always one shape: libraries choose their kernels by it, and another kernel rounds differently.
        filled = np.concatenate([chosen, np.repeat(chosen[:1], size - len(chosen))])
        cells = None if tiles.cells is None else tiles.cells[filled]
        part = TilePixels(tiles.slide, tiles.scale, tiles.coords[filled], tiles.images[filled], None, cells)
        answer = compute(part).float().cpu().numpy()[: len(chosen)]
        if not np.isfinite(answer).all():
            bad = chosen[int(np.flatnonzero(~np.isfinite(answer).all(axis=1))[0])]
            raise CheckpointError(
                f"the encoder {encoder.id} must return finite numbers; the tile at {tuple(tiles.coords[bad].tolist())} "
                f"of {tiles.slide!r} at {tiles.scale} gave NaN or infinity. Use float32, or check the weights."
            )
        vectors[chosen] = answer
    return vectors
