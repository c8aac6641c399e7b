"""Place nuclei on jittered lattices and draw each one whole, so that a window cuts but never changes them.

It does not know colour: what comes out is a map of haematoxylin (optical density units).
"""

from dataclasses import dataclass

import numpy as np

from engine.slides.phantom.noise import F32, bell, derive_key, grid_noise, uniform
from engine.slides.phantom.tissue import FIELD_UM, TissueFields

REACH_UM = 14.0
"""No nucleus reaches further from its centre; the fields must cover the window and this margin."""
TEXTURE_PX = 256


@dataclass(frozen=True)
class NucleusKind:
    """One population. Sizes in µm; `spread` is the log-spread of size at pleomorphism 0 and what 1 adds."""

    name: str
    cell_um: float
    long_um: float
    short_um: float
    haematoxylin: float
    spread: tuple[float, float]
    jitter: float = 0.7


KINDS = (
    NucleusKind("epithelial", 9.6, 4.3, 3.6, 0.54, (0.06, 0.26)),
    NucleusKind("spindle", 14.0, 6.5, 1.7, 0.62, (0.12, 0.10)),
    NucleusKind("lymphocyte", 7.2, 3.1, 2.9, 0.85, (0.06, 0.0)),
)


def draw_nuclei(
    seed: int, knobs: tuple[float, float], fields: TissueFields, window_px: tuple[int, int, int, int], mpp: float
) -> np.ndarray:
    """Return the nuclei's haematoxylin, float32 (height, width).

    knobs: pleomorphism and chromatin; the window is (top, left, height, width) in px.
    """
    top, left, height, width = window_px
    # Twice the reach: a nucleus centred outside the window that reaches into it must still fit whole.
    pad = 2 * int(np.ceil(REACH_UM / mpp)) + 2
    canvas = np.zeros((height + 2 * pad, width + 2 * pad), F32)
    texture = _chromatin_sheet(seed, mpp, pad)
    for kind in KINDS:
        iy, ix = _lattice_cells(kind, window_px, mpp)
        table = _nuclei_of(seed, knobs, kind, fields, iy, ix)
        origin = (top - pad, left - pad)
        _stamp(canvas, origin, table, texture, mpp)
        if kind.name == "epithelial":
            _stamp(canvas, origin, _nucleoli(table, knobs[1]), texture, mpp)
    return canvas[pad : pad + height, pad : pad + width]


def _lattice_cells(
    kind: NucleusKind, window_px: tuple[int, int, int, int], mpp: float
) -> tuple[np.ndarray, np.ndarray]:
    top, left, height, width = window_px
    margin = REACH_UM
    first_y, last_y = (top * mpp - margin) // kind.cell_um, ((top + height) * mpp + margin) // kind.cell_um
    first_x, last_x = (left * mpp - margin) // kind.cell_um, ((left + width) * mpp + margin) // kind.cell_um
    rows, cols = np.arange(int(first_y), int(last_y) + 1), np.arange(int(first_x), int(last_x) + 1)
    iy, ix = np.meshgrid(rows, cols, indexing="ij")
    return iy.ravel(), ix.ravel()


def _nuclei_of(
    seed: int, knobs: tuple[float, float], kind: NucleusKind, fields: TissueFields, iy: np.ndarray, ix: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the nuclei that exist among the lattice cells, as columns; positions and sizes in µm."""
    pleomorphism, chromatin = knobs

    def key(stream: str) -> int:
        return derive_key(seed, f"{kind.name}/{stream}")

    # Odd rows are shifted by half a cell: a hexagonal lattice hides the axes better than a square one.
    shift = (iy % 2) * 0.5 - 0.25
    y = (iy + 0.5 + (uniform(key("y"), iy, ix) - 0.5).astype(np.float64) * kind.jitter) * kind.cell_um
    x = ix + 0.5 + shift * 0.6 + (uniform(key("x"), iy, ix) - 0.5).astype(np.float64) * kind.jitter * 0.8
    x = x * kind.cell_um
    row = np.rint(y / FIELD_UM).astype(np.int64) - fields.first[0]
    col = np.rint(x / FIELD_UM).astype(np.int64) - fields.first[1]
    height, width = fields.epithelium.shape
    # A centre outside the fields lies further than REACH_UM from the window: nothing of it would be seen.
    keep = np.flatnonzero((row >= 0) & (row < height) & (col >= 0) & (col < width))
    exists = uniform(key("exists"), iy[keep], ix[keep]) < _chance(kind, fields, (row[keep], col[keep]))
    keep = keep[exists]
    iy, ix, y, x, at = iy[keep], ix[keep], y[keep], x[keep], (row[keep], col[keep])
    spread = kind.spread[0] + kind.spread[1] * pleomorphism
    # exp(-spread²) holds the mean area while the spread grows: the mean colour must not tell.
    size = np.exp(spread * bell(key("size"), iy, ix) - spread**2)
    ratio = np.exp((0.05 + 0.16 * pleomorphism) * bell(key("ratio"), iy, ix))
    angle = uniform(key("angle"), iy, ix) * np.pi
    if kind.name == "spindle":
        angle = fields.angle[at] + 0.18 * bell(key("angle"), iy, ix)
    stain_spread = 0.06 + 0.12 * pleomorphism
    return {
        "y": y,
        "x": x,
        "long": np.minimum(kind.long_um * size * ratio, REACH_UM - 2),
        "short": kind.short_um * size / ratio,
        "angle": angle,
        "stain": kind.haematoxylin * (1 + stain_spread * bell(key("stain"), iy, ix)),
        "grain": np.full(y.shape, 0.18 + 0.34 * chromatin if kind.name == "epithelial" else 0.2),
        "sheet": (uniform(key("sheet"), iy, ix) * 2**20).astype(np.int64),
    }


def _nucleoli(nuclei: dict[str, np.ndarray], chromatin: float) -> dict[str, np.ndarray]:
    """Return the nucleoli as small, dark, round nuclei inside some of the given ones."""
    luck = nuclei["sheet"] / 2**20
    some = {name: column[luck < 0.1 + 0.5 * chromatin] for name, column in nuclei.items()}
    radius = some["short"] * 0.27
    return some | {
        "y": some["y"] + 0.3 * some["short"] * np.sin(some["angle"] * 7),
        "x": some["x"] + 0.3 * some["short"] * np.cos(some["angle"] * 7),
        "long": radius,
        "short": radius,
        "stain": some["stain"] * 1.6,
        "grain": np.zeros(radius.shape),
    }


def _chance(kind: NucleusKind, fields: TissueFields, at: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return how likely a lattice cell holds a nucleus, by the tissue at its centre."""
    epithelium, necrosis = fields.epithelium[at], fields.necrosis[at]
    solid = fields.white_um[at] < -1.5
    lymphoid, fat = fields.lymphoid[at], fields.fat[at]
    stroma = (1 - epithelium) * (1 - necrosis) * solid
    if kind.name == "epithelial":
        return (epithelium * 0.93 + necrosis * 0.05) * solid
    if kind.name == "spindle":
        return stroma * (1 - 0.8 * lymphoid) * (0.34 + 0.14 * fields.density[at] - 0.1 * fat)
    return (0.88 * lymphoid**1.5 + 0.012) * stroma + 0.02 * epithelium + 0.10 * necrosis


def _chromatin_sheet(seed: int, mpp: float, pad: int) -> np.ndarray:
    """Return a sheet of clumpy noise of mean 0 that every nucleus takes its own cut-out of."""
    index = np.arange(TEXTURE_PX + 2 * pad + 2)
    fine = grid_noise(derive_key(seed, "chromatin"), index * (mpp / 1.7), index * (mpp / 1.7))
    sheet = fine + 0.6 * grid_noise(derive_key(seed, "chromatin/2"), index * (mpp / 0.9), index * (mpp / 0.9))
    return sheet - sheet.mean()


def _stamp(
    canvas: np.ndarray, origin: tuple[int, int], table: dict[str, np.ndarray], texture: np.ndarray, mpp: float
) -> None:
    """Draw the nuclei into the canvas (its corner at px `origin`) by maximum: the order of drawing is irrelevant."""
    reach = np.ceil((np.maximum(table["long"], table["short"]) + 0.6) / mpp).astype(np.int64)
    # Fractions are taken from absolute positions, before the window's origin can change their rounding.
    row, col = np.floor(table["y"] / mpp), np.floor(table["x"] / mpp)
    table = table | {"dy": row * mpp - table["y"], "dx": col * mpp - table["x"]}
    row, col = row.astype(np.int64) - origin[0], col.astype(np.int64) - origin[1]
    inside = (row >= reach) & (row < canvas.shape[0] - reach) & (col >= reach) & (col < canvas.shape[1] - reach)
    for size in np.unique(reach[inside]):
        members = np.flatnonzero(inside & (reach == size))
        for some in np.array_split(members, max(1, len(members) * int(size) ** 2 // 60000)):
            part = {name: column[some] for name, column in table.items()}
            grain, body = _profiles(part, int(size), mpp)
            sheet_y, sheet_x = part["sheet"] % TEXTURE_PX, part["sheet"] // TEXTURE_PX % TEXTURE_PX
            side = 2 * int(size) + 1
            starts = zip(row[some] - size, col[some] - size, sheet_y, sheet_x, strict=True)
            for i, (a, b, c, d) in enumerate(starts):
                drawn = texture[c : c + side, d : d + side] * grain[i]
                drawn += 1
                drawn *= body[i]
                spot = canvas[a : a + side, b : b + side]
                np.maximum(spot, drawn, out=spot)


def _profiles(part: dict[str, np.ndarray], size: int, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (grain per nucleus, body (n, side, side)): ellipses with a soft border, a darker membrane."""
    offset = np.arange(-size, size + 1, dtype=F32) * F32(mpp)
    dy = offset + part["dy"].astype(F32)[:, None]
    dx = offset + part["dx"].astype(F32)[:, None]
    ca, sa = np.cos(part["angle"]).astype(F32), np.sin(part["angle"]).astype(F32)
    long, short = part["long"].astype(F32), part["short"].astype(F32)
    u = (dx * (ca / long)[:, None])[:, None, :] + (dy * (sa / long)[:, None])[:, :, None]
    v = (dx * (-sa / short)[:, None])[:, None, :] + (dy * (ca / short)[:, None])[:, :, None]
    u *= u
    v *= v
    u += v
    body = (1 - u) * (short / F32(1.1))[:, None, None]
    np.clip(body, 0, 1, out=body)
    u *= F32(0.3)
    u += F32(0.82)
    body *= u
    body *= part["stain"].astype(F32)[:, None, None]
    return part["grain"].astype(F32), body
