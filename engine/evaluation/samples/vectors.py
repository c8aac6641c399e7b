"""A set as numbers: one vector per crop, the detail of all crops, and what must be said beside any figure of them.

Invariant: crops are encoded once, in the order of the rule; those of blurred copies in the same pass. It does not know
figures. Vectors that were extracted earlier (bags) come in by `read_bags`, without pixels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from engine.core.errors import BagError, CheckpointError, EngineError
from engine.evaluation.samples.crops import Crop, CropRule
from engine.evaluation.samples.sets import PictureSet, Unusable
from engine.features.bag_reader import BagFile, find_bags
from engine.images.detail import Detail, DetailSums
from engine.model.encoders.base import SSLEncoder

SHOWN = 8
"""Crops of a set that a page shows."""
BLUR_PX = 1.5
"""Deviation of the blur of the ceiling, px: nuclei lose their outline, tissue keeps its architecture."""


@dataclass(frozen=True)
class VectorSet:
    """What figures are computed from."""

    where: str
    vectors: NDArray[np.float32]
    """(n, D), in an order drawn by the seed."""
    encoder: str
    digest: str
    """SHA-256 of the encoder's weights."""
    mpp: float
    codecs: dict[str, int]
    """How many pictures went through which codec."""
    blurred: NDArray[np.float32] | None = None
    """(n, D) of the crops blurred by BLUR_PX, if asked for."""
    detail: Detail | None = None
    shown: list[Crop] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.vectors)


def encode_set(
    pictures: PictureSet, rule: CropRule, encoder: SSLEncoder, digest: str, blurred: bool = False, batch: int = 16
) -> VectorSet:
    """Encode the crops of a set. Raises: EngineError as PictureSet.crops; CheckpointError for NaN."""
    detail, shown = DetailSums(rule.tissue_grey), []
    vectors, soft = [], []
    for part in _parts(pictures.crops(rule), batch):
        for crop in part:
            detail.add(crop.pixels, crop.y, crop.x)
        shown += part[: max(0, SHOWN - len(shown))]
        pixels = np.stack([crop.pixels for crop in part])
        vectors.append(encode(encoder, pixels, batch))
        if blurred:
            soft.append(encode(encoder, blur(pixels), batch))
    return VectorSet(
        pictures.where, np.concatenate(vectors), encoder.id, digest, rule.mpp, pictures.codecs,
        np.concatenate(soft) if blurred else None, detail.result(), shown, pictures.unusable,
    )  # fmt: skip


def _parts(crops: Iterator[Crop], size: int) -> Iterator[list[Crop]]:
    while part := list(islice(crops, size)):
        yield part


def encode(encoder: SSLEncoder, pixels: NDArray[np.uint8], batch: int = 16) -> NDArray[np.float32]:
    """Encode uint8 (n, 3, 256, 256) to (n, D), always in the shape of a full batch: kernels differ by shape.

    Raises: CheckpointError if the encoder returns NaN or infinity.
    """
    found = []
    for first in range(0, len(pixels), batch):
        part = pixels[first : first + batch]
        filled = np.concatenate([part, np.repeat(part[:1], batch - len(part), axis=0)])
        found.append(encoder.encode(torch.from_numpy(filled)).float().numpy()[: len(part)])
    vectors = np.concatenate(found)
    if not np.isfinite(vectors).all():
        raise CheckpointError(
            f"the encoder {encoder.id} must return finite vectors; it returned NaN or infinity. Fetch its weights "
            "again."
        )
    return vectors


def blur(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return crops (n, 3, h, w) blurred by BLUR_PX."""
    soft = ndimage.gaussian_filter(pixels.astype(np.float32), (0, 0, BLUR_PX, BLUR_PX), mode="reflect")
    return np.rint(soft).clip(0, 255).astype(np.uint8)


def holds_bags(path: Path) -> bool:
    """Say whether a path is a bag, or a folder with bags in it."""
    return path.suffix == ".h5" if path.is_file() else path.is_dir() and any(path.glob("*.h5"))


def read_bags(path: Path, mpp: float | None, count: int | None, seed: int) -> VectorSet:
    """Read the valid vectors of all bags at one µm/px (None: the finest), in an order drawn by the seed.

    Raises: EngineError for bags of different encoders, an unknown µm/px, or fewer vectors than asked for.
    """
    vectors, named, unusable = [], {}, []
    scale_mpp = mpp
    for file in [path] if path.is_file() else find_bags(path):
        try:
            with BagFile(file) as bag:
                scales = [bag.scale_of(name) for name in bag.scales]
                scale_mpp = scale_mpp or scales[0].mpp
                chosen = [s.name for s in scales if abs(s.mpp / scale_mpp - 1) <= 0.01]
                if not chosen:
                    raise BagError(
                        f"{file} must have features at {scale_mpp:g} µm/px; it has them at "
                        f"{', '.join(f'{s.mpp:g}' for s in scales)}. Name one with --crop_mpp."
                    )
                about = bag.attributes
                details = "".join(f" {v}" for v in (about.block, about.timestep, about.condition) if v is not None)
                named[f"{about.encoder}{details}", about.weights_sha256] = str(file)
                vectors.append(bag.features(chosen[0])[bag.valid(chosen[0])].astype(np.float32))
        except BagError as error:
            unusable.append(Unusable(str(file), "bag", str(error)))
    if not vectors or scale_mpp is None:
        raise EngineError(f"{path} must hold a bag that can be used; none can. The first: {unusable[0].message}")
    if len(named) > 1:
        told = "; ".join(f"{file}: {encoder} ({digest[:12]})" for (encoder, digest), file in named.items())
        raise EngineError(f"the features of a set must be of one encoder; got {told}. Compare them one by one.")
    every = np.concatenate(vectors)
    every = every[np.random.default_rng(seed).permutation(len(every))]
    if count is not None and len(every) < count:
        raise EngineError(f"{path} must hold the {count} vectors asked for; it holds {len(every)}. Lower --count.")
    ((encoder, digest),) = named
    return VectorSet(
        str(path), every[:count], encoder, digest, scale_mpp, {"features on disk": len(vectors)}, unusable=unusable
    )


def check_encoders(sets: Iterable[VectorSet]) -> None:
    """Hold all sets to one encoder with one digest. Raises EngineError naming each."""
    found = {(one.encoder, one.digest): one.where for one in sets}
    if len(found) > 1:
        told = "; ".join(f"{where}: {encoder} ({digest[:12]})" for (encoder, digest), where in found.items())
        raise EngineError(
            f"both sets must be seen by one encoder with the same weights; got {told}. Extract one of them again, or "
            "compare pictures instead of features."
        )
