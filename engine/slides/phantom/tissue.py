"""Say what kind of tissue lies at every position: smooth fields on one absolute grid of FIELD_UM.

It does not know pixels, nuclei or colour. Every field is a function of (seed, position in µm) alone.
"""

from dataclasses import dataclass

import numpy as np

from engine.slides.phantom.noise import bell, derive_key, resample, uniform, value_noise

FIELD_UM = 2.0
"""Grid step of the fields: below the 3 µm rim of a fat cell, the thinnest thing they hold."""
MACRO_STEP = 8
"""Field steps per step of the macro grid, whose shortest wavelength is 300 µm."""
DUCT_CELL_UM = 230.0
FAT_CELL_UM = 72.0


@dataclass(frozen=True)
class TissueFields:
    """Fields on the absolute grid; `first` is the grid index of element [0, 0]. All float32 (rows, cols).

    Distances (µm) are positive inside. `fibre` counts µm across the stroma's fibres, `along` µm along them;
    `angle` is the fibres' direction. The others are shares in [0, 1].
    """

    first: tuple[int, int]
    epithelium: np.ndarray
    rim: np.ndarray
    white_um: np.ndarray
    fat: np.ndarray
    lymphoid: np.ndarray
    necrosis: np.ndarray
    density: np.ndarray
    fibre: np.ndarray
    along: np.ndarray
    angle: np.ndarray


def share(distance: np.ndarray, width: float) -> np.ndarray:
    """Return 0 … 1 across a border `width` wide, one half where the distance is 0."""
    t = np.clip(distance / width + 0.5, 0.0, 1.0)
    return t * t * (3 - 2 * t)


def build_fields(seed: int, knobs: tuple[float, float], first: tuple[int, int], shape: tuple[int, int]) -> TissueFields:
    """Compute the fields of `shape` grid points from grid index `first` on; knobs: architecture and lumina."""
    rows = np.arange(first[0], first[0] + shape[0])
    cols = np.arange(first[1], first[1] + shape[1])
    macro = _macro_on(seed, rows, cols)
    y = (rows * FIELD_UM)[:, None]
    x = (cols * FIELD_UM)[None, :]
    ducts_um, lumen_um = _ducts(seed, knobs, y, x)
    fat_share = share(macro["fat"] - 0.26, 0.05) * (1 - share(ducts_um + 15, 20.0))
    vacuole_um = _vacuoles(seed, y, x)
    epithelium = share(ducts_um, 5.0) * share(-lumen_um, 5.0)
    necrosis = share(macro["necrosis"] - 0.33, 0.06) * share(ducts_um - 30, 20.0) * share(-lumen_um, 5.0)
    white_um = np.maximum(lumen_um, vacuole_um - 40.0 * (1 - fat_share))
    fibre, along = _fibres(seed, y, x, ducts_um)
    slope_y, slope_x = np.gradient(fibre)
    near_tumour = np.exp(-np.abs(ducts_um + 45) / 45) * share(macro["lymphoid"] + 0.05, 0.3)
    lymphoid = np.maximum(share(macro["lymphoid"] - 0.42, 0.30), 0.45 * near_tumour)
    return TissueFields(
        first=first,
        epithelium=epithelium * (1 - necrosis),
        rim=np.exp(-np.abs(ducts_um - 3) / 3),
        white_um=white_um,
        fat=fat_share,
        lymphoid=lymphoid * (1 - share(ducts_um, 8.0)) * (1 - fat_share),
        necrosis=necrosis,
        density=macro["density"],
        fibre=fibre,
        along=along,
        angle=np.arctan2(slope_x, -slope_y),
    )


def _macro_on(seed: int, rows: np.ndarray, cols: np.ndarray) -> dict[str, np.ndarray]:
    """Evaluate the millimetre-scale fields on their coarse grid and bring them to the field grid."""
    top, left = int(rows[0]) // MACRO_STEP, int(cols[0]) // MACRO_STEP
    y = np.arange(top, int(rows[-1]) // MACRO_STEP + 2)[:, None] * (MACRO_STEP * FIELD_UM)
    x = np.arange(left, int(cols[-1]) // MACRO_STEP + 2)[None, :] * (MACRO_STEP * FIELD_UM)
    at_y, at_x = rows / MACRO_STEP, cols / MACRO_STEP
    waves = {"fat": 1900.0, "lymphoid": 800.0, "necrosis": 600.0, "density": 700.0}
    return {name: resample(_blobs(seed, name, y, x, wave), (top, left), at_y, at_x) for name, wave in waves.items()}


def _blobs(seed: int, stream: str, y: np.ndarray, x: np.ndarray, wavelength: float) -> np.ndarray:
    """Return warped noise: the warp takes away the axis-parallel look of value noise."""
    wave = wavelength * 0.6
    shift_y = value_noise(derive_key(seed, stream + "/y"), y, x, wave) * (wavelength * 0.3)
    shift_x = value_noise(derive_key(seed, stream + "/x"), y, x, wave) * (wavelength * 0.3)
    y, x = y + shift_y, x + shift_x
    coarse = value_noise(derive_key(seed, stream), y, x, wavelength)
    return coarse * 0.75 + value_noise(derive_key(seed, stream + "/2"), y, x, wavelength / 2.7) * 0.35


def _ducts(seed: int, knobs: tuple[float, float], y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return signed distances (µm, positive inside) to epithelial structures and to their lumina.

    architecture 0: round ducts on an orderly lattice; 1: ragged, merging nests. lumina 0: open; 1: solid. The
    wall's area per duct is constant (outer² − lumen² = r²): the number of nuclei must not tell one from the other.
    """
    bend = 8.0 + 50.0 * knobs[0]
    # The long wave bends the lattice itself, so that not even orderly ducts stand in ranks.
    v = y + value_noise(derive_key(seed, "bend/y"), y, x, 90.0) * bend
    u = x + value_noise(derive_key(seed, "bend/x"), y, x, 90.0) * bend
    v += value_noise(derive_key(seed, "row/y"), y, x, 650.0) * 130.0
    u += value_noise(derive_key(seed, "row/x"), y, x, 650.0) * 130.0
    base_y, base_x = np.floor(v / DUCT_CELL_UM).astype(np.int64), np.floor(u / DUCT_CELL_UM).astype(np.int64)
    rows = np.arange(base_y.min() - 1, base_y.max() + 2)
    cols = np.arange(base_x.min() - 1, base_x.max() + 2)
    centre_y, centre_x, outer, lumen, turn, squeeze = _duct_table(seed, knobs, rows, cols)
    width = len(cols)
    ducts = np.full(v.shape, -400.0, np.float32)
    lumina = ducts.copy()
    at = (base_y - rows[0]) * width + (base_x - cols[0])
    for step in (a * width + b for a in (-1, 0, 1) for b in (-1, 0, 1)):
        near = at + step
        dy = (v - centre_y[near]).astype(np.float32)
        dx = (u - centre_x[near]).astype(np.float32)
        ca, sa, k = np.cos(turn)[near], np.sin(turn)[near], squeeze[near]
        distance = np.hypot((dy * ca + dx * sa) * k, (dx * ca - dy * sa) / k)
        np.maximum(ducts, outer[near] - distance, out=ducts)
        np.maximum(lumina, lumen[near] - distance, out=lumina)
    return ducts, lumina


def _duct_table(seed: int, knobs: tuple[float, float], rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the ducts of a range of lattice cells, raveled: centre y, x; outer, lumen radius; angle; squeeze."""
    architecture, lumina = knobs
    iy, ix = np.broadcast_arrays(rows[:, None], cols[None, :])
    jitter = 0.3 + 0.4 * architecture
    shift = (iy % 2) * 0.5 - 0.25
    centre_y = (iy + 0.5 + (uniform(derive_key(seed, "duct/y"), iy, ix) - 0.5) * jitter) * DUCT_CELL_UM
    centre_x = (ix + 0.5 + shift + (uniform(derive_key(seed, "duct/x"), iy, ix) - 0.5) * jitter) * DUCT_CELL_UM
    spread = 0.10 + 0.16 * architecture
    radius = 78.0 * (1 + spread * bell(derive_key(seed, "duct/r"), iy, ix)) / np.sqrt(1 + spread**2)
    open_share = (1 - lumina) * (0.45 + 0.25 * uniform(derive_key(seed, "duct/open"), iy, ix))
    outer = radius / np.sqrt(1 - open_share**2)
    lumen = np.where(open_share * outer > 9, open_share * outer, -400.0)
    tumour = _blobs(seed, "tumour", centre_y, centre_x, 1500.0)
    outer = np.where(tumour > -0.2, outer, -400.0)
    lumen = np.where(outer > 0, lumen, -400.0)
    turn = uniform(derive_key(seed, "duct/turn"), iy, ix) * np.pi
    squeeze = np.exp((0.10 + 0.10 * architecture) * bell(derive_key(seed, "duct/squeeze"), iy, ix))
    return tuple(a.ravel().astype(np.float64) for a in (centre_y, centre_x, outer, lumen, turn, squeeze))


def _vacuoles(seed: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the signed distance (µm, positive inside) to fat vacuoles: rounded cells of a jittered lattice.

    Source: cellular texture, Worley 1996 (F2 − F1).
    """
    v, u = y / FAT_CELL_UM, x / FAT_CELL_UM
    base_y, base_x = np.floor(v).astype(np.int64), np.floor(u).astype(np.int64)
    rows = np.arange(base_y.min() - 1, base_y.max() + 2)[:, None]
    cols = np.arange(base_x.min() - 1, base_x.max() + 2)[None, :]
    centre_y = (rows + 0.1 + 0.8 * uniform(derive_key(seed, "fat/y"), rows, cols)).ravel()
    centre_x = (cols + 0.1 + 0.8 * uniform(derive_key(seed, "fat/x"), rows, cols)).ravel()
    at = (base_y - rows[0]) * cols.shape[1] + (base_x - cols[0, 0])
    nearest = np.full(at.shape, 9.0, np.float32)
    second = nearest.copy()
    for step in (a * cols.shape[1] + b for a in (-1, 0, 1) for b in (-1, 0, 1)):
        near = at + step
        distance = np.hypot(v - centre_y[near], u - centre_x[near]).astype(np.float32)
        np.minimum(second, np.maximum(distance, nearest), out=second)
        np.minimum(nearest, distance, out=nearest)
    wall = (second - nearest) * (FAT_CELL_UM / 2) - 1.3
    return np.minimum(wall, (0.62 - nearest) * FAT_CELL_UM)


def _fibres(seed: int, y: np.ndarray, x: np.ndarray, ducts_um: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates (µm) across and along the fibres: parallel, wavy, bending around ducts."""
    turn = derive_key(seed, "fibre/turn") / 2**32 * np.pi
    ca, sa = np.cos(turn), np.sin(turn)
    wide = value_noise(derive_key(seed, "fibre/wide"), y, x, 420.0) * 150.0
    wavy = value_noise(derive_key(seed, "fibre/wavy"), y, x, 75.0) * 12.0
    wavy += value_noise(derive_key(seed, "fibre/crimp"), y, x, 29.0) * 4.0
    around = np.exp(np.minimum(ducts_um, 0.0) / 25.0) * 25.0
    across = (y * ca + x * sa) * 0.7 + (wide + wavy + around)
    along = x * ca - y * sa + value_noise(derive_key(seed, "fibre/along"), y, x, 200.0) * 40.0
    return across, along
