"""Bags as models see them: read from files or memory, instances sampled per epoch, padded into batches.

Invariant: what an epoch sees depends on (seed, epoch, bag) and on nothing else; memory is bounded by the cache's limit
and the batches read ahead, never by the cohort. It does not know labels, splits or models.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core.errors import BagError
from mil.data.feature_files import find_features, joined_rows, open_features
from mil.errors import CohortError

Coarse = Literal["stored", "pooled"]
"""Vectors of coarser scales: those of the file, or means of the finest scale's inside each coarse tile."""
READ_AHEAD = 2
"""Batches prepared by the reading thread while the model works."""


class Bag(Protocol):
    """The instances of one slide. `widths` are the lengths of the parts an instance is joined from, fine to coarse."""

    name: str
    widths: tuple[int, ...]

    def read(self) -> NDArray[Any]:
        """Return the instances, floating (N, sum of widths); finite. The array is not to be written to."""
        ...


class BagCache:
    """Bags kept in memory up to a limit in bytes; safe between threads.

    The first to come stay: with bags visited in a new order each epoch, driving older ones out would keep no larger
    share and copy more. Sent to another process, it starts empty.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._arrays: dict[object, NDArray[Any]] = {}
        self._lock = Lock()

    def get(self, key: object) -> NDArray[Any] | None:
        return self._arrays.get(key)

    def offer(self, key: object, array: NDArray[Any]) -> None:
        """Keep the array if there is room for it."""
        with self._lock:
            if key not in self._arrays and self.held_bytes + array.nbytes <= self.limit_bytes:
                self._arrays[key] = array
                self.held_bytes += array.nbytes

    def __reduce__(self) -> tuple[type["BagCache"], tuple[int]]:
        return BagCache, (self.limit_bytes,)


class StoredBag:
    """A bag in a features file; each instance is a tile of the finest scale, joined with its parents' vectors.

    Source of the joining: the published multi-scale form (ZoomLDM, CVPR 2025): 20x beside the 5x around it.
    """

    def __init__(
        self, path: Path, scales: Sequence[str], widths: tuple[int, ...], cache: BagCache, coarse: Coarse = "stored"
    ) -> None:
        """`coarse` says where the vectors of all scales but the finest come from; see `Coarse`."""
        self.coarse: Coarse = coarse
        self.path, self.name, self.scales, self.widths = path, path.stem, tuple(scales), widths
        self._cache = cache

    def read(self) -> NDArray[Any]:
        """See Bag. Raises BagError for NaN in a tile that is said to be readable, or other widths than before."""
        held = self._cache.get((self.path, self.scales, self.coarse))
        if held is not None:
            return held
        file = open_features(self.path)
        try:
            rows = joined_rows(file, self.scales)
            pooled = self.coarse == "pooled"
            parts = [file.features(scale) for scale in (self.scales[:1] if pooled else self.scales)]
            parts += [_pooled(parts[0], rows[0], own) for own in rows[1:]] if pooled else []
            widths = tuple(part.shape[1] for part in parts)
        finally:
            file.close()
        if widths != self.widths:
            raise BagError(f"{self.path} must be {self.widths} wide; it is now {widths}. It changed since the start.")
        parts = [p if len(r) == len(p) and _counts_up(r) else p[r] for p, r in zip(parts, rows, strict=True)]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        check_finite(array, str(self.path))
        self._cache.offer((self.path, self.scales, self.coarse), array)
        return array


class ArrayBag:
    """A bag that is in memory already: any array (N, D)."""

    def __init__(self, array: Any, name: str = "", widths: tuple[int, ...] | None = None) -> None:
        """Raises CohortError for another shape or values that are not finite."""
        self._array = np.asarray(array)
        if self._array.ndim != 2 or not np.issubdtype(self._array.dtype, np.floating):
            raise CohortError(
                f"a bag must be a floating array (N, D); {name or 'one'} is {self._array.dtype} {self._array.shape}. "
                "Give one array per bag, one row per instance."
            )
        check_finite(self._array, name or "a bag")
        self.name, self.widths = name, widths or (self._array.shape[1],)

    def read(self) -> NDArray[Any]:
        return self._array


def _pooled(fine: NDArray[Any], tiles: NDArray[np.int64], parents: NDArray[np.int64]) -> NDArray[Any]:
    """Return a coarse scale made of a fine one (N, D): the mean of the `tiles` inside each parent, by its row."""
    total = np.zeros((parents.max(initial=-1) + 1, fine.shape[1]))
    np.add.at(total, parents, fine[tiles])
    counts = np.bincount(parents, minlength=len(total))
    return (total / np.maximum(counts, 1)[:, None]).astype(fine.dtype)


def _counts_up(rows: NDArray[np.int64]) -> bool:
    return bool(len(rows) == 0 or (rows[0] == 0 and (np.diff(rows) == 1).all()))


def check_finite(array: NDArray[Any], where: str) -> None:
    """Raise BagError naming the first row that holds NaN or infinity."""
    # The sum is finite only if all are; it costs no second array of the bag's size.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum(dtype=np.float64)):
            return
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise BagError(
            f"{where} must hold finite features; {len(bad)} of {len(array)} rows do not, the first is row {bad[0]}. "
            "Extract the slide again, with float32 if values overflowed."
        )


@dataclass(frozen=True)
class Batch:
    """Some bags, padded to one length."""

    x: Tensor
    """(B, N, D) float32; zeros where there is no instance."""
    mask: Tensor
    """(B, N) bool; True where there is an instance."""
    index: NDArray[np.int64]
    """(B,) numbers of the bags in the sequence they came from."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.x.to(device, non_blocking=True), self.mask.to(device, non_blocking=True), self.index)


def sample_rows(count: int, limit: int | None, seed: int, epoch: int, bag: int) -> NDArray[np.int64] | None:
    """Return the rows of a bag that an epoch sees, ascending; None = all."""
    if limit is None or count <= limit:
        return None
    rng = np.random.default_rng(np.random.SeedSequence((seed, epoch, bag)))
    return np.sort(rng.choice(count, limit, replace=False, shuffle=False))


def collate(arrays: Sequence[NDArray[Any]], index: Sequence[int]) -> Batch:
    """Pad bags to the longest one. Raises CohortError for an empty bag, which has no answer."""
    if empty := [i for i, a in zip(index, arrays, strict=True) if not len(a)]:
        raise CohortError(f"a bag must have an instance; bag number {empty[0]} has none. Leave empty bags out by name.")
    longest = max(len(a) for a in arrays)
    if len(arrays) == 1:
        x = torch.from_numpy(np.ascontiguousarray(arrays[0], dtype=np.float32))[None]
        return Batch(x, torch.ones(1, longest, dtype=torch.bool), np.asarray(index))
    x = torch.zeros(len(arrays), longest, arrays[0].shape[1])
    mask = torch.zeros(len(arrays), longest, dtype=torch.bool)
    for i, array in enumerate(arrays):
        x[i, : len(array)] = torch.from_numpy(np.ascontiguousarray(array))
        mask[i, : len(array)] = True
    return Batch(x, mask, np.asarray(index))


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which an epoch visits the bags."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(count)


def batches(
    bags: Sequence[Bag], groups: Sequence[Sequence[int]], seed: int = 0, epoch: int = 0, limit: int | None = None
) -> Iterator[Batch]:
    """Yield one batch per group of bag numbers, read ahead in a thread; at most `limit` instances of each bag."""

    def load(group: Sequence[int]) -> Batch:
        arrays = []
        for number in group:
            array = bags[number].read()
            rows = sample_rows(len(array), limit, seed, epoch, int(number))
            arrays.append(array if rows is None else array[rows])
        return collate(arrays, group)

    with ThreadPoolExecutor(1) as reader:
        waiting = [reader.submit(load, group) for group in groups[:READ_AHEAD]]
        for at in range(len(groups)):
            batch = waiting.pop(0).result()
            if at + READ_AHEAD < len(groups):
                waiting.append(reader.submit(load, groups[at + READ_AHEAD]))
            yield batch


def as_bags(items: Sequence[Any]) -> list[Bag]:
    """Return bags as they are, and arrays as bags named by their number. Raises CohortError for mixed widths."""
    bags: list[Bag] = [item if hasattr(item, "read") else ArrayBag(item, f"bag {i}") for i, item in enumerate(items)]
    widths = {bag.widths: bag.name for bag in bags}
    if len(widths) > 1:
        shown = "; ".join(f"{width} in {name}" for width, name in list(widths.items())[:3])
        raise CohortError(f"all bags must have one width; got {shown}. Use one encoder for all.")
    return bags


def load_bags(folder: str | Path, scales: Sequence[str] | None = None, cache_bytes: int = 2**30) -> list[StoredBag]:
    """Return the bags of a folder by slide name, read from disk when they are asked for, at most `cache_bytes` kept.

    `scales` are those to join, fine to coarse, such as ("20x", "5x"); None takes all that the first file has. The
    folder may be ours, or TRIDENT's, CLAM's or STAMP's. Raises: BagError for a folder without features, or a scale
    that a file has not.

    >>> import engine, mil, numpy as np
    >>> tissue = np.random.default_rng(0).integers((150, 50, 130), (220, 130, 200), (1024, 1024, 3)).astype(np.uint8)
    >>> slide = engine.Slide.from_array(tissue, mpp=0.5, name="case_7")
    >>> _ = engine.extract_features([slide], "runs/features", encoders=["texture"], progress=False)
    >>> (bag,) = mil.load_bags("runs/features/features", scales=("20x", "5x"))
    >>> bag.read().shape  # each 20x tile beside the 5x tile around it
    (16, 240)
    """
    files, cache, found = find_features(Path(folder)), BagCache(cache_bytes), []
    for path in files.values():
        file = open_features(path)
        try:
            scales = file.scales if scales is None else scales
            widths = tuple(file.shape(scale)[1] for scale in scales)
        finally:
            file.close()
        found.append(StoredBag(path, scales, widths, cache))
    return found
