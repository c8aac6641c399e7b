"""Figures of pictures larger than memory: a block at a time, in threads or wherever dask computes.

They are those of `engine.images.metrics` and `engine.images.detail`, which go through a picture in bands; sums over
blocks differ from sums over bands by float rounding alone. Pictures are dask arrays uint8 (3, h, w), as the levels of
`engine.open_picture`. Figures are computed when a function is called, by dask's scheduler: threads of this process,
unless a client or `actors.cluster.dask_on_ray` says otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.core.lazy import CHUNK_PX
from engine.images.detail import TISSUE_GREY, Detail, DetailSums
from engine.images.metrics import scores_of

if TYPE_CHECKING:
    import dask.array as da

PIECE_PX = 64
"""Rows and columns measured together inside a block, in floats; a multiple of every period of the detail."""


@dataclass(frozen=True)
class Difference:
    """How two pictures of one size differ, over all px and colours, in grey levels 0..255."""

    largest: int
    mean: float
    psnr_db: float
    """Infinite for equal pictures."""
    differing_share: float
    """Share of px of which any colour differs."""


def seam_profile(picture: "da.Array") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean absolute difference of each row (h,) to the one above, of each column (w,) to its left; [0] is 0.

    Raises: ValueError unless the picture is uint8 (3, h, w).
    """
    import dask.array as da

    blocks = _blocks(picture)
    _, height, width = blocks.shape
    lines = []
    for axis in (1, 2):
        cuts = [sizes if i == axis else (1,) * len(sizes) for i, sizes in enumerate(blocks.chunks)]
        parts = da.map_overlap(
            _steps, blocks, depth={1: 1, 2: 1}, boundary="nearest", trim=False, axis=axis, chunks=tuple(cuts),
            dtype=np.int64, meta=np.empty((0, 0, 0), np.int64),
        )  # fmt: skip
        lines.append(parts.sum(axis=(0, 3 - axis)))
    across_y, across_x = da.compute(*lines)
    return across_y / (3 * width), across_x / (3 * height)


def _steps(block: NDArray[np.uint8], axis: int) -> NDArray[np.int64]:
    """Return the summed differences along an axis of a block with a rim of one px: (1, n, 1) or (1, 1, n)."""
    inner = block.astype(np.int16)
    inner = inner[:, :-1, 1:-1] if axis == 1 else inner[:, 1:-1, :-1]
    return np.abs(np.diff(inner, axis=axis)).sum(axis=(0, 3 - axis), dtype=np.int64, keepdims=True)


def seam_scores(
    picture: "da.Array", edges_y: Sequence[int], edges_x: Sequence[int]
) -> tuple[float | None, float | None]:
    """Return the seam score and its control, as `engine.images.metrics.seam_scores`; edges in px.

    Raises: ValueError for an edge outside the picture.
    """
    return scores_of(seam_profile(picture), edges_y, edges_x)


def colour_histograms(picture: "da.Array") -> NDArray[np.int64]:
    """Return how many px have each value: (3, 256), red, green and blue. Raises: ValueError as `seam_profile`."""

    def count(block: NDArray[np.uint8], axis: object = None, keepdims: object = None) -> NDArray[np.int64]:
        return np.stack([np.bincount(colour.ravel(), minlength=256) for colour in block])[:, :, None]

    return _summed(picture, count, (3, 256))


def tissue_share(picture: "da.Array", tissue_grey: float = TISSUE_GREY) -> float:
    """Return the share of px whose mean grey (0..255) lies below `tissue_grey`, as `Detail.tissue_share`.

    Raises: ValueError as `seam_profile`.
    """

    def count(block: NDArray[np.uint8], axis: object = None, keepdims: object = None) -> NDArray[np.int64]:
        return np.array((block.astype(np.float32).mean(axis=0) < tissue_grey).sum(), np.int64).reshape(1, 1, 1)

    return int(_summed(picture, count, (1, 1))[0, 0]) / (picture.shape[1] * picture.shape[2])


def detail(picture: "da.Array", tissue_grey: float = TISSUE_GREY) -> Detail:
    """Measure the fine detail of a picture, as `engine.images.detail.detail_of` does.

    Raises: ValueError as `seam_profile`.
    """
    import dask.array as da

    blocks = _blocks(picture)
    length = DetailSums(tissue_grey).packed().size
    parts = da.map_overlap(
        _detail_sums, blocks, depth={1: 1, 2: 1}, boundary="nearest", trim=False, dtype=np.float64,
        chunks=((length,), (1,) * blocks.numblocks[1], (1,) * blocks.numblocks[2]),
        tissue_grey=tissue_grey, starts=_starts(blocks), meta=np.empty((0, 0, 0)),
    )  # fmt: skip
    return DetailSums.unpacked(parts.sum(axis=(1, 2)).compute(), tissue_grey).result()


def _starts(blocks: "da.Array") -> tuple[list[int], list[int]]:
    """Return the first row of each row of blocks, and the first column of each column of them."""
    ys, xs = (np.cumsum([0, *sizes])[:-1].tolist() for sizes in blocks.chunks[1:])
    return ys, xs


def _detail_sums(
    block: NDArray[np.uint8], tissue_grey: float, starts: tuple[list[int], list[int]], block_info: Any = None
) -> NDArray[np.float64]:
    """Return the packed sums of a block with a rim of one px, (n, 1, 1).

    Its own are the steps to its upper and its left neighbour.
    """
    sums = DetailSums(tissue_grey)
    if not block_info:  # dask asks with nothing what comes out
        return sums.packed()[:, None, None]
    top, left = (starts[i][block_info[0]["chunk-location"][i + 1]] for i in (0, 1))
    inner = block[:, 1:-1, 1:-1]
    for y in range(0, inner.shape[1], PIECE_PX):
        rows = inner[:, y : y + PIECE_PX]
        sums.add(rows, top + y, left)
        if top + y:
            sums.join(block[:, y : y + 1, 1:-1], rows[:, :1], top + y)
    if left:
        sums.join_columns(block[:, 1:-1, :1], inner[:, :, :1], left)
    return sums.packed()[:, None, None]


def difference(a: "da.Array", b: "da.Array") -> Difference:
    """Compare two pictures of one size px by px. Raises: ValueError for two sizes, or as `seam_profile`."""
    import dask.array as da

    if a.shape != b.shape:
        raise ValueError(f"two pictures must have one size to be compared; got {a.shape} and {b.shape}. Crop one.")
    left, right = _blocks(a), _blocks(b)
    gap = abs(left.astype(np.int16) - right.astype(np.int16))
    largest, total, squares, differing = da.compute(
        gap.max(), gap.sum(dtype=np.int64), (gap.astype(np.int32) ** 2).sum(dtype=np.int64), (gap.max(axis=0) > 0).sum()
    )
    px = a.shape[1] * a.shape[2]
    error = int(squares) / (3 * px)
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    return Difference(int(largest), int(total) / (3 * px), psnr, int(differing) / px)


def _summed(picture: "da.Array", count: Any, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Return the sum of what `count` says of each block, (*shape, 1)."""
    import dask.array as da

    blocks = _blocks(picture)
    parts = da.map_blocks(
        count, blocks, dtype=np.int64, meta=np.empty((0, 0, 0), np.int64),
        chunks=((shape[0],), (shape[1],) * blocks.numblocks[1], (1,) * blocks.numblocks[2]),
    )  # fmt: skip
    columns = parts.sum(axis=2)
    return columns.reshape(shape[0], blocks.numblocks[1], shape[1]).sum(axis=1).compute()


def _blocks(picture: "da.Array") -> "da.Array":
    """Return the picture in blocks of at least 2048², all but the last multiples of a piece. Raises: ValueError."""
    if picture.ndim != 3 or picture.shape[0] != 3 or picture.dtype != np.uint8:
        raise ValueError(
            f"a picture must be a dask array uint8 (3, h, w); got {picture.dtype} {picture.shape}. open_picture() "
            "gives one."
        )
    sides = [
        all(n % PIECE_PX == 0 and n >= CHUNK_PX for n in sizes[:-1]) and picture.numblocks[0] == 1
        for sizes in picture.chunks[1:]
    ]
    return picture if all(sides) else picture.rechunk((3, CHUNK_PX, CHUNK_PX))  # type: ignore[arg-type]  # its stub knows "auto" alone
