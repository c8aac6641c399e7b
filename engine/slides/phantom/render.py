"""Render procedural H&E tissue: a pure function of (seed, position in µm) at any µm/px and any window.

It does not know slides, levels or files (phantom_slide.py writes those). Colour: Beer-Lambert mixing of two dyes,
Ruifrok & Johnston, "Quantification of histochemical staining by color deconvolution", 2001.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from engine.slides.phantom.noise import F32, derive_key, grid_noise, resample
from engine.slides.phantom.nuclei import REACH_UM, draw_nuclei
from engine.slides.phantom.tissue import FIELD_UM, TissueFields, build_fields

FINEST_MPP = 0.5
"""Coarser pixels are averages of pixels no larger than this."""
BLOCK_PX = 512
HAEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)
TISSUE_TINT = (0.12, 0.0, 0.28)
"""Added to pure eosin: collagen absorbs more blue than the dye alone (fitted to a TCGA-BRCA picture at 20x)."""
LAMP = 246.0
FIBRE_PX = 1024


@dataclass(frozen=True)
class Phantom:
    """An endless plane of H&E tissue.

    pleomorphism: variation of nuclear size, shape and chromatin; seen at 20x, hardly in the local mean colour.
    architecture: 0 orderly open ducts … 1 ragged solid nests; seen at 5x and below, same nuclei.
    chromatin: coarseness of chromatin, and nucleoli, apart from size and shape: 5x averages it away. None: follows
    pleomorphism.
    lumina: 0 open … 1 none, apart from the ducts' outlines and places: 20x sees it as well. None: follows architecture.
    """

    seed: int
    pleomorphism: float = 0.3
    architecture: float = 0.5
    chromatin: float | None = None
    lumina: float | None = None

    def __post_init__(self) -> None:
        for name in ("pleomorphism", "architecture", "chromatin", "lumina"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {value}. Use 0.5 for a middling slide.")

    @classmethod
    def varied(cls, seed: int) -> Self:
        """Return a phantom whose knobs are drawn from its seed, so that many of them show all there is."""
        rng = np.random.default_rng(np.random.SeedSequence((seed, 77)))
        return cls(seed, pleomorphism=float(rng.uniform()), architecture=float(rng.uniform()))

    @property
    def nuclei(self) -> tuple[float, float]:
        """Pleomorphism and chromatin, each 0..1."""
        return self.pleomorphism, self.pleomorphism if self.chromatin is None else self.chromatin

    @property
    def ducts(self) -> tuple[float, float]:
        """Architecture and lumina, each 0..1."""
        return self.architecture, self.architecture if self.lumina is None else self.lumina

    def render(self, y_um: float, x_um: float, height_px: int, width_px: int, mpp: float) -> np.ndarray:
        """Return transmitted light, uint8 (height_px, width_px, 3), of the window with corner (y_um, x_um).

        The corner is snapped to the grid of the finest pixels (at most FINEST_MPP), so windows tile exactly.
        A pixel coarser than FINEST_MPP is the mean light of the fine pixels inside it.
        """
        if height_px < 1 or width_px < 1 or not mpp > 0:
            raise ValueError(
                f"a window needs at least 1x1 px and mpp > 0 (µm/px); got {height_px}x{width_px} at {mpp}. Enlarge it."
            )
        factor = max(1, int(np.ceil(mpp / FINEST_MPP - 1e-9)))
        fine_mpp = mpp / factor
        top, left = round(y_um / fine_mpp), round(x_um / fine_mpp)
        out = np.empty((height_px, width_px, 3), np.uint8)
        step = max(1, BLOCK_PX // factor)
        for y in range(0, height_px, step):
            for x in range(0, width_px, step):
                h, w = min(step, height_px - y), min(step, width_px - x)
                window = (top + y * factor, left + x * factor, h * factor, w * factor)
                light = _render_light(self, window, fine_mpp)
                if factor > 1:
                    light = _box_mean(light, factor)
                out[y : y + h, x : x + w] = np.rint(light).astype(np.uint8).transpose(1, 2, 0)
        return out


def _box_mean(light: np.ndarray, factor: int) -> np.ndarray:
    """Average boxes of factor x factor px in a fixed order: `mean` orders by shape, and windows must agree."""
    rows = sum(light[:, i::factor] for i in range(1, factor)) + light[:, ::factor]
    total = sum(rows[:, :, i::factor] for i in range(1, factor)) + rows[:, :, ::factor]
    return total * F32(1 / factor**2)


def _render_light(phantom: Phantom, window_px: tuple[int, int, int, int], mpp: float) -> np.ndarray:
    """Return float32 light (3, height, width) of a fine window (top, left, height, width) in px of `mpp`."""
    top, left, height, width = window_px
    fields = _fields_around(phantom, window_px, mpp)
    rows, cols = np.arange(top, top + height), np.arange(left, left + width)
    at_y, at_x = rows * (mpp / FIELD_UM), cols * (mpp / FIELD_UM)

    def to_px(field: np.ndarray) -> np.ndarray:
        return resample(field, fields.first, at_y, at_x)

    nuclei = draw_nuclei(phantom.seed, phantom.nuclei, fields, window_px, mpp)
    base_h, base_e, fibrous = _mean_stain(fields)
    fibres = _fibre_texture(phantom.seed, to_px(fields.fibre), to_px(fields.along))
    fibres *= to_px(fibrous)
    grain = grid_noise(derive_key(phantom.seed, "grain"), rows * (mpp / 1.3), cols * (mpp / 1.3))
    grain += grid_noise(derive_key(phantom.seed, "grain/2"), rows * (mpp / 3.1), cols * (mpp / 3.1))
    grain *= F32(0.13)
    grain += 1
    tissue = np.clip(to_px(fields.white_um) * F32(-1 / 1.2) + F32(0.5), 0, 1)
    eosin = (to_px(base_e) + fibres) * grain
    # Inside a nucleus there is little cytoplasm left to take eosin.
    eosin *= 1 - F32(0.35) * np.minimum(nuclei * F32(2.5), 1)
    haematoxylin = to_px(base_h) * grain
    np.maximum(haematoxylin, nuclei, out=haematoxylin)
    haematoxylin *= tissue
    eosin *= tissue
    return _transmit(phantom.seed, haematoxylin, eosin)


def _fields_around(phantom: Phantom, window_px: tuple[int, int, int, int], mpp: float) -> TissueFields:
    top, left, height, width = window_px
    first = [int(np.floor((start * mpp - REACH_UM) / FIELD_UM)) - 2 for start in (top, left)]
    last = [int(np.ceil((end * mpp + REACH_UM) / FIELD_UM)) + 3 for end in (top + height, left + width)]
    shape = last[0] - first[0], last[1] - first[1]
    return build_fields(phantom.seed, phantom.ducts, (first[0], first[1]), shape)


def _mean_stain(fields: TissueFields) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return haematoxylin, eosin and fibre contrast between nuclei, on the field grid (optical density)."""
    stroma = (1 - fields.epithelium) * (1 - fields.necrosis)
    loose = 1 - 0.45 * fields.lymphoid
    haematoxylin = 0.20 * fields.epithelium + 0.07 * fields.necrosis
    haematoxylin += stroma * (0.03 + 0.12 * fields.lymphoid)
    eosin = 0.20 * fields.epithelium + 0.36 * fields.necrosis
    eosin += stroma * (0.27 + 0.07 * fields.density) * loose + 0.10 * fields.rim * stroma
    return haematoxylin, eosin, stroma * loose * F32(0.14)


def _fibre_texture(seed: int, across: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Return streaks in about [-1, 1]: a periodic sheet of noise looked up in fibre coordinates.

    One lookup per pixel instead of four hashes; the sheet repeats after 0.6 mm across and 2.6 mm along, where the
    bends of the fibres hide it.
    """
    index = np.arange(FIBRE_PX)
    sheet = grid_noise(derive_key(seed, "fibre/sheet"), index / 4, index / 16, (FIBRE_PX // 4, FIBRE_PX // 16))
    broad = grid_noise(derive_key(seed, "fibre/broad"), index / 16, index / 32, (FIBRE_PX // 16, FIBRE_PX // 32))
    sheet += broad * F32(0.7)
    row = np.floor(across * F32(1 / 0.6)).astype(np.int32) & (FIBRE_PX - 1)
    row *= FIBRE_PX
    row += np.floor(along * F32(1 / 2.5)).astype(np.int32) & (FIBRE_PX - 1)
    return sheet.ravel()[row]


def _transmit(seed: int, haematoxylin: np.ndarray, eosin: np.ndarray) -> np.ndarray:
    """Turn dye amounts (optical density) into light, float32 (3, height, width): Beer-Lambert."""
    vary = [derive_key(seed, f"stain/{i}") / 2**31 - 1 for i in range(5)]
    h_vector = np.array(HAEMATOXYLIN) + np.array([0.05, 0.0, 0.06]) * vary[0]
    e_vector = np.array(EOSIN) + np.array(TISSUE_TINT) * (1 + 0.35 * vary[1])
    h_vector *= (1 + 0.10 * vary[2]) / np.linalg.norm(h_vector)
    e_vector *= (1 + 0.12 * vary[3]) / np.linalg.norm(e_vector)
    light = np.empty((3, *eosin.shape), F32)
    for channel in range(3):
        density = haematoxylin * F32(-np.log(10) * h_vector[channel])
        density += eosin * F32(-np.log(10) * e_vector[channel])
        np.exp(density, out=density)
        density *= F32(LAMP + 3 * vary[4])
        light[channel] = density
    return light
