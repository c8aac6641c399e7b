"""Every source of µm/px with every type and unit it may carry gives the value, or claims nothing."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr

from engine.core.errors import SlideError
from engine.slides.slide import open_slide
from engine.slides.units import microns_per, number
from tests.support.written_slides import METRES, write_geotiff

PICTURE = np.full((64, 64, 3), 200, np.uint8)


def mpp_of(path: Path) -> tuple[float, float] | None:
    """Return the µm/px that a file claims; None for none, or for one that nobody believes."""
    try:
        with open_slide(path) as slide:
            assert not slide.resolution.estimated
            return slide.resolution.mpp_x, slide.resolution.mpp_y
    except SlideError as error:
        if error.code in ("no_mpp", "absurd_mpp"):
            return None
        raise


def near(pair: tuple[float, float] | None) -> Any:
    return None if pair is None else pytest.approx(pair, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0.25", 0.25), ("0,25", 0.25), (" 5e-1 ", 0.5), (4, 4.0), ((1, 4), 0.25), (np.float32(0.5), 0.5),
        ("0", None), ("-1", None), ("nan", None), ("inf", None), ("n/a", None), ("", None), (None, None), (0, None),
        ((1, 0), None), ((0, 1), None), ((0, 0), None), ((-1, 4), None), ([1, 4], None), ((1, 2, 3), None),
    ],
)  # fmt: skip
def test_numbers(value: object, expected: float | None) -> None:
    assert number(value) == expected


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("µm", 1.0), ("μm", 1.0), ("um", 1.0), ("\\u00B5m", 1.0), ("micron", 1.0), ("Microns", 1.0),
        ("MICROMETER", 1.0), ("micrometre", 1.0), ("nm", 1e-3), ("pm", 1e-6), ("fm", 1e-9), ("Å", 1e-4),
        ("\N{ANGSTROM SIGN}", 1e-4), ("Mm", 1e12), ("Pm", 1e21), ("mm", 1e3), ("cm", 1e4), ("m", 1e6), ("km", 1e9),
        ("Meters", 1e6), ("millimeters", 1e3), ("inch", 25400.0), ("in", 25400.0), ("thou", 25.4), ("ft", 304800.0),
        ("pixel", None), ("pixels", None), ("reference frame", None), ("", None), (" ", None), (None, None), (1, None),
        ("MM", None), ("PM", None), ("NM", None), ("sec", None), ("degree", None),
    ],
)  # fmt: skip
def test_units_of_length(unit: object, expected: float | None) -> None:
    assert microns_per(unit) == (None if expected is None else pytest.approx(expected))


def rational(n: int, d: int) -> bytes:
    return struct.pack("<II", n, d)


@pytest.mark.parametrize(
    ("kind", "x", "y", "unit", "expected"),
    [
        (5, rational(40000, 1), rational(20000, 1), 3, (0.25, 0.5)),
        (5, rational(50800, 1), rational(50800, 1), 2, (0.5, 0.5)),
        (5, rational(50800, 1), rational(50800, 1), None, (0.5, 0.5)),  # TIFF 6.0: no tag is inch
        (5, rational(4000, 1), rational(4000, 1), 4, (0.25, 0.25)),
        (5, rational(4, 1), rational(4, 1), 5, (0.25, 0.25)),
        (5, rational(40000, 1), rational(40000, 1), 1, None),
        (5, rational(40000, 1), rational(40000, 1), 0, None),
        (5, rational(40000, 1), rational(40000, 1), 9, None),
        (5, rational(40000, 0), rational(40000, 1), 3, None),
        (5, rational(0, 1), rational(0, 1), 3, None),
        (5, rational(0, 0), rational(0, 0), 3, None),
        (5, rational(1, 1), rational(1, 1), 3, None),
        (10, struct.pack("<ii", -40000, 1), struct.pack("<ii", 40000, 1), 3, None),
        (11, struct.pack("<f", 40000), struct.pack("<f", 20000), 3, (0.25, 0.5)),
        (12, struct.pack("<d", 40000), struct.pack("<d", 20000), 3, (0.25, 0.5)),
        (11, struct.pack("<f", float("nan")), struct.pack("<f", 20000), 3, None),
        (11, struct.pack("<f", 1), struct.pack("<f", 1), 3, None),
        (4, struct.pack("<I", 40000), struct.pack("<I", 20000), 3, (0.25, 0.5)),
        (2, b"40000\0", b"40000\0", 3, (0.25, 0.25)),
        (2, b"n/a\0", b"n/a\0", 3, None),
    ],
)
def test_tiff_resolution(
    tmp_path: Path, kind: int, x: bytes, y: bytes, unit: int | None, expected: tuple[float, float] | None
) -> None:
    path = tmp_path / "a.tif"
    tags = [(282, kind, len(x) if kind == 2 else 1, x, True), (283, kind, len(y) if kind == 2 else 1, y, True)]
    tags += [] if unit is None else [(296, 3, 1, unit, True)]
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(PICTURE, photometric="rgb", metadata=None, resolution=(1, 1), resolutionunit="NONE")
    replaced(path, tags, unit is None)
    assert mpp_of(path) == near(expected)


def replaced(path: Path, tags: list[tuple[Any, ...]], no_unit: bool) -> None:
    """Overwrite tags of the first page where they stand; without a unit, its tag becomes one that means nothing."""
    sizes = {2: 1, 3: 2, 4: 4, 5: 8, 10: 8, 11: 4, 12: 8}
    data = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", data, 4)[0]
    at = {struct.unpack_from("<H", data, p)[0]: p for p in range(start + 2, start + 2 + 12 * data[start], 12)}
    for code, kind, count, value, _ in tags:
        raw = struct.pack("<H", value) if isinstance(value, int) else value
        if sizes[kind] * count > 4:
            data += b"\0" * (len(data) % 2)
            raw, where = struct.pack("<I", len(data)), raw
            data += where
        struct.pack_into("<HHI", data, at[code], code, kind, count)
        data[at[code] + 8 : at[code] + 12] = raw.ljust(4, b"\0")
    if no_unit:
        struct.pack_into("<H", data, at[296], 297)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("unit", "px_per_unit", "expected"),
    [
        ("micron", 2, 0.5), ("um", 2, 0.5), ("\\u00B5m", 4, 0.25), ("mm", 4000, 0.25),
        ("cm", 40000, 0.25), ("inch", 101600, 0.25), ("nm", 0.004, 0.25), ("pixel", 2, None), ("", 2, None),
        (None, 2, None), ("sec", 2, None),
    ],
)  # fmt: skip
def test_imagej(tmp_path: Path, unit: str | None, px_per_unit: float, expected: float | None) -> None:
    path = tmp_path / "a.tif"
    metadata = {"axes": "YXS"} if unit is None else {"axes": "YXS", "unit": unit}
    tifffile.imwrite(path, PICTURE, imagej=True, resolution=(px_per_unit, px_per_unit), metadata=metadata)
    assert mpp_of(path) == near(None if expected is None else (expected, expected))


@pytest.mark.parametrize(
    ("size", "unit", "expected"),
    [
        (0.25, "µm", 0.25), (0.25, None, 0.25), (250, "nm", 0.25), (250_000, "pm", 0.25), (2500, "Å", 0.25),
        (0.00025, "mm", 0.25), (0.25e-6, "m", 0.25), (1e-5, "in", 0.254), (0.25, "pixel", None),
        (0.25, "reference frame", None), (0.25, "", None), (0.25, "Pm", None), (250, "Mm", None), (0, "µm", None),
        ("nan", "µm", None), (-1, "µm", None),
    ],
)  # fmt: skip
def test_ome_xml(tmp_path: Path, size: Any, unit: str | None, expected: float | None) -> None:
    path = tmp_path / "a.ome.tif"
    one = "".join(
        f' PhysicalSize{a}="{size}"' + ("" if unit is None else f' PhysicalSize{a}Unit="{unit}"') for a in "XY"
    )
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="64" SizeY="64" SizeC="3" '
        f'SizeZ="1" SizeT="1"{one}><Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/>'
        "</Pixels></Image></OME>"
    )
    tifffile.imwrite(path, PICTURE, photometric="rgb", description=xml.encode(), metadata=None)
    assert mpp_of(path) == near(None if expected is None else (expected, expected))


SCALE = [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]


@pytest.mark.parametrize(
    ("unit", "steps", "expected"),
    [
        ("micrometer", SCALE, 0.5), ("micrometers", SCALE, 0.5), ("µm", SCALE, 0.5), ("um", SCALE, 0.5),
        ("Micron", SCALE, 0.5), (None, SCALE, None), ("", SCALE, None), ("pixel", SCALE, None), (3, SCALE, None),
        ("millimeter", [{"type": "scale", "scale": [1, 0.0005, 0.0005]}], 0.5),
        ("picometer", [{"type": "scale", "scale": [1, 5e5, 5e5]}], 0.5),
        ("nanometer", [{"type": "scale", "scale": [1, "500", "500"]}], 0.5),
        ("micrometer", [*SCALE, {"type": "translation", "translation": [0, 9, 9]}], 0.5),
        ("micrometer", [{"type": "identity"}], None),
        ("micrometer", [{"type": "scale", "path": "scales"}], None),
        ("micrometer", [{"type": "scale", "scale": [0.5, 0.5]}], None),
        ("micrometer", [{"type": "scale", "scale": [1, 0, 0]}], None),
        ("micrometer", [{"type": "scale", "scale": [1, "x", 0.5]}], None),
        ("micrometer", [*SCALE, {"type": "rotation", "rotation": [[0, 1], [1, 0]]}], None),
        ("micrometer", None, None),
    ],
)  # fmt: skip
def test_ngff(tmp_path: Path, unit: Any, steps: Any, expected: float | None) -> None:
    write_ngff(tmp_path / "a.ome.zarr", [("", PICTURE, steps, unit)])
    assert mpp_of(tmp_path / "a.ome.zarr") == near(None if expected is None else (expected, expected))


def write_ngff(path: Path, pictures: list[tuple[str, np.ndarray, Any, Any]], omero: Any = None) -> None:
    """Write an OME-Zarr 0.4 of several pictures: (name, uint8 (h, w, 3), transformations, unit)."""
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    scales = []
    for i, (name, pixels, steps, unit) in enumerate(pictures):
        group.create_array(str(i), data=np.ascontiguousarray(pixels.transpose(2, 0, 1)), chunks=(1, 64, 64))
        axes = [{"name": "c", "type": "channel"}]
        axes += [{"name": a, "type": "space"} | ({} if unit is None else {"unit": unit}) for a in "yx"]
        dataset = {"path": str(i)} | ({} if steps is None else {"coordinateTransformations": steps})
        scales.append({"version": "0.4", "name": name, "axes": axes, "datasets": [dataset]})
    group.attrs["multiscales"] = scales
    if omero is not None:
        group.attrs["omero"] = omero


@pytest.mark.parametrize(
    ("keys", "metres"),
    [
        (METRES, 0.6), ({1024: 1, 3072: 26917}, 0.6), ({1024: 1, 3072: 32633}, 0.6), ({1024: 1, 3072: 3067}, 0.6),
        (METRES | {3076: 9002}, 0.6 * 0.3048), ({1024: 1, 3072: 2263, 3076: 9003}, 0.6 * 1200 / 3937),
        (METRES | {3076: 9036}, 600), (METRES | {3076: 9096}, 0.6 * 0.9144),
        ({1024: 1, 3072: 2263}, None), ({1024: 1, 3072: 32767}, None), (METRES | {3076: 9102}, None),
        (METRES | {3076: 32767}, None), ({1024: 2, 2048: 4326}, None), ({1024: 2, 2048: 4326, 3076: 9001}, None),
        (METRES | {3072: 3857}, None), (METRES | {3072: 3395}, None), (METRES | {3072: 32767, 3075: 7}, None),
    ],
)  # fmt: skip
def test_geotiff(tmp_path: Path, keys: dict[int, int], metres: float | None) -> None:
    path = write_geotiff(tmp_path / "a.tif", keys, (0.6, 0.6, 0.0))
    assert mpp_of(path) == near(None if metres is None else (metres * 1e6, metres * 1e6))


def test_a_unit_of_ones_own_states_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    directory = (1, 1, 0, 4, 1024, 0, 1, 1, 3072, 0, 1, 32767, 3076, 0, 1, 32767, 3077, 34736, 1, 0)
    tags = [
        (33550, 12, 3, (2.0, 2.0, 0.0), True),
        (34735, 3, len(directory), directory, True),
        (34736, 12, 1, 0.3, True),
    ]
    tifffile.imwrite(path, PICTURE, photometric="rgb", metadata=None, extratags=tags)
    assert mpp_of(path) == near((0.6e6, 0.6e6))


@pytest.mark.parametrize(("said", "expected"), [("0.2513", 0.2513), ("0,2513", 0.2513), ("0", None), ("n/a", None)])
def test_aperio(tmp_path: Path, said: str, expected: float | None) -> None:
    path = tmp_path / "a.svs"
    tifffile.imwrite(path, PICTURE, photometric="rgb", tile=(64, 64), compression="jpeg", metadata=None,
                     description=f"Aperio Image Library\n64x64|MPP = {said}")  # fmt: skip
    assert mpp_of(path) == near(None if expected is None else (expected, expected))
