"""Keep randomness a pure function of (key, integer lattice cell), so any window agrees with any other.

It does not know tissue. Hash finaliser: "lowbias32", Ch. Wellons, nullprogram.com/blog/2018/07/31.
"""

import hashlib

import numpy as np

F32 = np.float32


def derive_key(seed: int, stream: str) -> int:
    """Return a 32-bit key for one named stream of randomness of one seed."""
    return int.from_bytes(hashlib.blake2s(f"{seed}/{stream}".encode(), digest_size=4).digest(), "little")


def hash_cells(key: int, cell_y: np.ndarray, cell_x: np.ndarray) -> np.ndarray:
    """Hash integer lattice cells to uint32; the two arrays broadcast."""
    bits = cell_y.astype(np.uint32) * 0x9E3779B1 ^ cell_x.astype(np.uint32) * 0x85EBCA77 ^ key
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    return bits


def uniform(key: int, cell_y: np.ndarray, cell_x: np.ndarray) -> np.ndarray:
    """Return float32 in [0, 1), one per lattice cell."""
    return (hash_cells(key, cell_y, cell_x) >> 8).astype(F32) * F32(2.0**-24)


def bell(key: int, cell_y: np.ndarray, cell_x: np.ndarray) -> np.ndarray:
    """Return float32 of mean 0 and variance 1, bounded by ±3: bounded, so a nucleus never leaves its tile."""
    draws = [uniform(key ^ i, cell_y, cell_x) for i in (1, 2, 3)]
    return (draws[0] + draws[1] + draws[2] - F32(1.5)) * F32(2.0)


def value_noise(key: int, y: np.ndarray, x: np.ndarray, wavelength: float) -> np.ndarray:
    """Return smooth noise in [-1, 1] at positions (y, x); `wavelength` is in the unit of the positions.

    The lattice of the covered area is hashed once and gathered from: few hashes instead of four per position.
    """
    y, x = np.broadcast_arrays(y, x)
    v, u = y / wavelength, x / wavelength
    fv, fu = np.floor(v), np.floor(u)
    iy, ix = fv.astype(np.int64), fu.astype(np.int64)
    y0, x0 = int(iy.min()), int(ix.min())
    rows = np.arange(y0, int(iy.max()) + 2)[:, None]
    cols = np.arange(x0, int(ix.max()) + 2)[None, :]
    lattice = (uniform(key, rows, cols) * 2 - 1).ravel()
    width = cols.shape[1]
    at = (iy - y0) * width + (ix - x0)
    wy, wx = _fade((v - fv).astype(F32)), _fade((u - fu).astype(F32))
    top = lattice[at]
    top += (lattice[at + 1] - top) * wx
    low = lattice[at + width]
    low += (lattice[at + width + 1] - low) * wx
    low -= top
    low *= wy
    low += top
    return low


def _fade(t: np.ndarray) -> np.ndarray:
    return t * t * (3 - 2 * t)


def grid_noise(key: int, y: np.ndarray, x: np.ndarray, period: tuple[int, int] | None = None) -> np.ndarray:
    """Return value noise on a regular grid, shape (rows, cols), given its 1-D coordinates in wavelengths.

    Same kind of noise as `value_noise`, ten times cheaper: rows and columns are interpolated separately.
    `period`, in wavelengths, makes it repeat without a seam.
    """
    iy, wy = _taps(y)
    ix, wx = _taps(x)
    rows = np.arange(iy[0], iy[-1] + 2)[:, None]
    cols = np.arange(ix[0], ix[-1] + 2)[None, :]
    first = (rows[0, 0], cols[0, 0])
    if period is not None:
        rows, cols = rows % period[0], cols % period[1]
    lattice = uniform(key, rows, cols) * 2 - 1
    return _interpolate(lattice, (iy - first[0], _fade(wy)), (ix - first[1], _fade(wx)))


def resample(field: np.ndarray, first: tuple[int, int], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Interpolate a field linearly at rows `y` and columns `x`, in the unit of the field's absolute grid.

    `first` is the absolute index of field[0, 0]; the positions must lie inside the field.
    """
    iy, wy = _taps(y)
    ix, wx = _taps(x)
    return _interpolate(field, (iy - first[0], wy), (ix - first[1], wx))


def _taps(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cell = np.floor(position)
    return cell.astype(np.int64), (position - cell).astype(F32)


def _interpolate(lattice: np.ndarray, y: tuple[np.ndarray, np.ndarray], x: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    step = np.diff(lattice, axis=1)
    wide = step[:, x[0]]
    wide *= x[1]
    wide += lattice[:, x[0]]
    out = np.diff(wide, axis=0)[y[0]]
    out *= y[1][:, None]
    out += wide[y[0]]
    return out
