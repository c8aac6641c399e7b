"""What one replica computes for one batch, and DenoiseTiles, the contract between coordinator and replicas.

Invariant: a prediction is a pure function of (model, batch); evaluating a batch again anywhere gives the same bytes.
It does not know the canvas, the plan or Ray. Source: ZoomLDM (CVPR 2025), joint multi-scale sampling.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from engine.core.errors import DeviceMemoryError
from engine.core.numerics import resize_by
from engine.core.units import LATENT_FACTOR
from engine.model.zoomldm import ZoomLDM
from engine.sampling.back_projection import GuideWindows

log = logging.getLogger(__name__)
B = TypeVar("B", "TileBatch", "DecodeBatch", "EncodeBatch")
A = TypeVar("A", "TilePrediction", "DecodedBatch", "EncodedBatch")
CONTEXTS_KEPT = 256
"""Contexts a denoiser remembers; at the published sizes (4, 65, 512) float32 one takes 0.5 MB."""


@dataclass(frozen=True)
class NewtonTarget:
    """The guide's squares for the tiles of a batch and the constants of the correction."""

    target: Float32[np.ndarray, "b 3 s s"]
    """float32 (B, 3, s, s) in [-1, 1]; s divides 256."""
    corrections: int
    step: float
    lr: float


@dataclass(frozen=True)
class TileBatch:
    """Everything a replica needs to denoise B tiles at one timestep; numpy only, so that it travels."""

    key: str
    """"pass/step/level/index", unique in a run; names the batch in errors."""
    tiles: tuple[int, ...]
    """Tile numbers; fewer than B when the last batch of a level is padded."""
    x_t: Float32[np.ndarray, "b 3 h w"]
    """float32 (B, 3, 64, 64)."""
    timestep: int
    """The network's time argument."""
    alpha_bar: float
    cells: Float32[np.ndarray, "b d grid_h grid_w"]
    """float32 (B, D, h, w): raw SSL vectors of each tile."""
    magnification: int
    """The model's magnification index."""
    weight: float
    """w in eps = (1+w)·eps_cond − w·eps_null."""
    newton: NewtonTarget | None = None


@dataclass(frozen=True)
class TilePrediction:
    """A replica's answer to a TileBatch."""

    key: str
    x0: np.ndarray
    """float32 (B, 3, 64, 64): predicted clean latents."""
    eps: np.ndarray | None = None
    """float32 (B, 3, 64, 64), only with newton, which moves x_t and so decouples eps from it."""


@dataclass(frozen=True)
class DecodeBatch:
    """Latent windows to decode; padded like TileBatch."""

    key: str
    tiles: tuple[int, ...]
    latents: Float32[np.ndarray, "b 3 h w"]
    """float32 (B, 3, 64, 64)."""


@dataclass(frozen=True)
class DecodedBatch:
    key: str
    images: np.ndarray
    """float32 (B, 3, 256, 256), about [-1, 1], not clamped."""


@dataclass(frozen=True)
class EncodeBatch:
    """Windows of a guide to enlarge over their tiles and to encode; padded like TileBatch."""

    key: str
    tiles: tuple[int, ...]
    guide: GuideWindows


@dataclass(frozen=True)
class EncodedBatch:
    key: str
    latents: np.ndarray
    """float32 (B, 3, 64, 64), not quantised."""


class DenoiseTiles(Protocol):
    """Evaluate batches somewhere; answers come in the order asked, lazily, with bounded read-ahead.

    Several calls may be open at once; the batches of each may be taken whenever an answer of any is asked for.
    A source that is read ahead may give None: its next batch needs an answer that was not taken yet; ask again after
    the next one is.
    """

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]: ...

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]: ...

    def encode(self, batches: Iterable[EncodeBatch]) -> Iterator[EncodedBatch]: ...


def _peak(x: Tensor) -> Tensor:
    """Return each sample's largest magnitude, (B, 1, 1, 1)."""
    return x.abs().amax(dim=(1, 2, 3), keepdim=True)


@dataclass(frozen=True)
class NewtonStep:
    """One correction, with the intermediates that parity compares. Shapes: image (B,3,256,256), latent (B,3,64,64)."""

    image_error: Float[Tensor, "b 3 image_h image_w"]
    latent_error: Float[Tensor, "b 3 h w"]
    direction: Float[Tensor, "b 3 h w"]


def newton_direction(
    model: ZoomLDM,
    x_t: Float[Tensor, "b 3 h w"],
    x0: Float[Tensor, "b 3 h w"],
    context: Float[Tensor, "b t c"],
    target: Float[Tensor, "b 3 s s"],
    step: float,
    at: tuple[int, float, float],
) -> NewtonStep:
    """Return the direction in which x_t makes the decoded picture match its guide square.

    `target` is (B, 3, s, s); `at` is (timestep, alpha_bar, w).
    Source: ZoomLDM, inexact Newton: finite differences through decoder, encoder and U-Net instead of gradients.
    """
    t, alpha_bar, w = at
    scale = target.shape[-1] / (x0.shape[-1] * LATENT_FACTOR)
    image = model.decode(x0)
    d = resize_by(target - resize_by(image, scale), 1 / scale)
    d = d / _peak(d)
    e = model.encode(image + step * d) - model.encode(image)
    e = e / _peak(e)
    moved = x_t + step * e
    x0_moved = model.x0_from_eps(moved, model.predict_eps(moved, t, context, w), alpha_bar)
    g = (x0_moved - x0) / step
    return NewtonStep(d, e, g / _peak(g))


def predict_tiles(
    model: ZoomLDM, batch: TileBatch, context: Float[Tensor, "b t c"]
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 h w"]]:
    """Return (x_t, x0, eps) of a batch after its corrections, each (B, 3, 64, 64) on the model's device."""
    x_t = torch.as_tensor(batch.x_t).to(model.device)
    at = (batch.timestep, batch.alpha_bar, batch.weight)
    eps = model.predict_eps(x_t, batch.timestep, context, batch.weight)
    x0 = model.x0_from_eps(x_t, eps, batch.alpha_bar)
    if batch.newton is not None:
        target = torch.as_tensor(batch.newton.target).to(x_t)
        for _ in range(batch.newton.corrections):
            found = newton_direction(model, x_t, x0, context, target, batch.newton.step, at)
            x_t = x_t + batch.newton.lr * found.direction
            eps = model.predict_eps(x_t, batch.timestep, context, batch.weight)
            x0 = model.x0_from_eps(x_t, eps, batch.alpha_bar)
    return x_t, x0, eps


def one_by_one(batches: Iterable[TileBatch | None]) -> Iterator[TileBatch]:
    """Yield the batches of a source that is not read ahead.

    Raises: RuntimeError if it waits for an answer although all were taken.
    """
    for batch in batches:
        if batch is None:
            raise RuntimeError("a source of batches must have one when every answer was taken; got None.")
        yield batch


def is_out_of_memory(error: Exception) -> bool:
    """Say whether memory ran out: on a GPU, in numpy, or on the CPU, where torch has no type for it (2.13)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return type(error) is RuntimeError and any(words in str(error) for words in ("can't allocate memory", "bad_alloc"))


class LocalDenoiser:
    """DenoiseTiles in this process: the specification that every other denoiser must match.

    Contexts are remembered per whole batch of cells, the newest `CONTEXTS_KEPT` of them: a batch returns at every step
    with the same cells. Keyed by value and computed in the batch's shape, a remembered context has a new one's bytes.

    >>> import engine, numpy as np
    >>> from engine.sampling.denoiser import DecodeBatch
    >>> denoiser = engine.LocalDenoiser(engine.ZoomLDM.from_pretrained("demo"))
    >>> batch = DecodeBatch("one", (0,), np.zeros((1, 3, 64, 64), np.float32))
    >>> denoiser.decode_batch(batch).images.shape
    (1, 3, 256, 256)
    """

    def __init__(self, model: ZoomLDM) -> None:
        self.model = model
        self._contexts: OrderedDict[tuple[int, tuple[int, ...], bytes], Tensor] = OrderedDict()

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        for batch in one_by_one(batches):
            yield self.denoise_batch(batch)

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        for batch in batches:
            yield self.decode_batch(batch)

    def encode(self, batches: Iterable[EncodeBatch]) -> Iterator[EncodedBatch]:
        for batch in batches:
            yield self.encode_batch(batch)

    def denoise_batch(self, batch: TileBatch) -> TilePrediction:
        """Evaluate one batch. Raises DeviceMemoryError."""
        return self._evaluate(self._denoise, batch)

    def decode_batch(self, batch: DecodeBatch) -> DecodedBatch:
        """Decode one batch of latent windows. Raises DeviceMemoryError."""
        return self._evaluate(self._decode, batch)

    def encode_batch(self, batch: EncodeBatch) -> EncodedBatch:
        """Enlarge a guide over one batch of tiles and encode it. Raises DeviceMemoryError."""
        return self._evaluate(self._encode, batch)

    def _evaluate(self, function: Callable[[B], A], batch: B) -> A:
        """Evaluate a batch; where memory runs out, once more after all that can be made again was let go.

        Once more WHOLE: halves in their own shape have other last bits, and padded to the planned shape they need the
        memory of the whole.
        """
        for again in (True, False):
            try:
                return function(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                why = str(error).strip().partition("\n")[0]
                if not again:
                    raise DeviceMemoryError(
                        f"Batch {batch.key} must fit into the memory of its device whole, in its planned shape; {why}. "
                        "Free that memory or use a device with more and repeat the same command, or set "
                        "sampling.batch_size (decode.batch_size) lower and use another output.folder."
                    ) from error
            # Out here, because the error holds what the failed attempt had allocated.
            log.warning("Out of memory at batch %s (%s); it is evaluated once more, whole.", batch.key, why)
            self._contexts.clear()
            torch.cuda.empty_cache()
        raise AssertionError("the second attempt returns or raises")

    @torch.inference_mode()
    def _denoise(self, batch: TileBatch) -> TilePrediction:
        _, x0, eps = predict_tiles(self.model, batch, self._context(batch))
        return TilePrediction(batch.key, x0.float().cpu().numpy(), eps.float().cpu().numpy() if batch.newton else None)

    @torch.inference_mode()
    def _decode(self, batch: DecodeBatch) -> DecodedBatch:
        images = self.model.decode(torch.as_tensor(batch.latents).to(self.model.device))
        return DecodedBatch(batch.key, images.float().cpu().numpy())

    @torch.inference_mode()
    def _encode(self, batch: EncodeBatch) -> EncodedBatch:
        latents = self.model.encode(batch.guide.enlarged(self.model.device))
        return EncodedBatch(batch.key, latents.float().cpu().numpy())

    def _context(self, batch: TileBatch) -> Tensor:
        """Return the context (B, T, C) of a batch's cells, remembered or new."""
        digest = hashlib.blake2b(np.ascontiguousarray(batch.cells).tobytes(), digest_size=16).digest()
        key = (batch.magnification, batch.cells.shape, digest)
        if key not in self._contexts:
            grids = [torch.as_tensor(c) for c in batch.cells]
            self._contexts[key] = self.model.summarize(grids, [batch.magnification] * len(grids))
            if len(self._contexts) > CONTEXTS_KEPT:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(key)
        return self._contexts[key]


class PointwiseDenoiser:
    """x0 = gain·x_t + mean of the tile's cells; decoding repeats each latent px 4×4, encoding takes the means back."""

    def __init__(self, gain: float = 0.5) -> None:
        self.gain = np.float32(gain)

    def denoise(self, batches: Iterable[TileBatch | None]) -> Iterator[TilePrediction]:
        for batch in one_by_one(batches):
            shift = batch.cells.mean(axis=(1, 2, 3), dtype=np.float32)[:, None, None, None]
            yield TilePrediction(batch.key, self.gain * batch.x_t + shift)

    def decode(self, batches: Iterable[DecodeBatch]) -> Iterator[DecodedBatch]:
        for batch in batches:
            yield DecodedBatch(batch.key, batch.latents.repeat(LATENT_FACTOR, 2).repeat(LATENT_FACTOR, 3))

    def encode(self, batches: Iterable[EncodeBatch]) -> Iterator[EncodedBatch]:
        f = LATENT_FACTOR
        for batch in batches:
            images = batch.guide.enlarged().numpy()
            n, c, h, w = images.shape
            cells = images.reshape(n, c, h // f, f, w // f, f)
            yield EncodedBatch(batch.key, cells.mean(axis=(3, 5), dtype=np.float32))
