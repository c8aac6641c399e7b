"""Whatever colours a TIFF says its samples have, the true ones are read, or the file is refused by name."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from engine.conditions.reference import read_reference
from engine.core.errors import SlideError
from engine.slides.backends.openslide import _check_dicom
from engine.slides.slide import open_slide

H, W = 96, 112
LOSSY = 4.0
"""Mean error of lossy codecs on the picture below; YCbCr taken for RGB is 40 off."""


def picture(h: int = H, w: int = W) -> np.ndarray:
    """Return smooth colours, near those of H&E, uint8 (h, w, 3)."""
    y, x = np.mgrid[:h, :w]
    wave = np.stack([200 + 40 * np.sin(x / 17), 120 + 60 * np.cos(y / 13), 170 + 50 * np.sin((x + y) / 19)], axis=-1)
    return np.rint(wave).astype(np.uint8)


def as_ycbcr(
    rgb: np.ndarray, luma: tuple[float, ...] = (0.299, 0.587, 0.114), codes: tuple[float, ...] = (0, 255, 128, 255)
) -> np.ndarray:
    """Return YCbCr by its definition; `codes` are those of no and full luma, of no and full chroma."""
    r, g, b = np.moveaxis(rgb.astype(float), -1, 0)
    y = luma[0] * r + luma[1] * g + luma[2] * b
    cb, cr = (b - y) / (2 - 2 * luma[2]), (r - y) / (2 - 2 * luma[0])
    black, white, zero, full = codes
    parts = [black + y * (white - black) / 255, *(zero + c * (full - zero) / 127 for c in (cb, cr))]
    return np.clip(np.rint(np.stack(parts, axis=-1)), 0, 255).astype(np.uint8)


def units(ycc: np.ndarray, sx: int, sy: int) -> bytes:
    """Return subsampled data units of a segment: luma of a block row by row, then one Cb and one Cr."""
    h, w = ycc.shape[:2]
    padded = np.pad(ycc.astype(float), ((0, -h % sy), (0, -w % sx), (0, 0)), mode="edge")
    rows, columns = padded.shape[0] // sy, padded.shape[1] // sx
    blocks = padded.reshape(rows, sy, columns, sx, 3).swapaxes(1, 2)
    luma, chroma = blocks[..., 0].reshape(rows, columns, sy * sx), blocks[..., 1:].mean(axis=(2, 3)).round()
    return np.concatenate([luma, chroma], axis=-1).astype(np.uint8).tobytes()


def write_strips(path: Path, strips: list[bytes], h: int, w: int, rows: int, tags: Mapping[int, Any]) -> Path:
    """Write a TIFF of strips; `tags` are lists of SHORT."""
    out = bytearray(b"II*\0\0\0\0\0")
    offsets = []
    for strip in strips:
        offsets.append(len(out))
        out += strip + b"\0" * (len(strip) % 2)
    entries = {256: ("I", [w]), 257: ("I", [h]), 258: ("H", [8] * 3), 277: ("H", [3]), 278: ("I", [rows])}
    entries |= {273: ("I", offsets), 279: ("I", [len(s) for s in strips]), 284: ("H", [1])}
    entries |= {key: ("H", list(values)) for key, values in tags.items()}
    directory = b""
    for key, (kind, values) in sorted(entries.items()):
        value = struct.pack(f"<{len(values)}{kind}", *values)
        if len(value) > 4:
            where, value = len(out), value + b"\0" * (len(value) % 2)
            out += value
            value = struct.pack("<I", where)
        directory += struct.pack("<HHI", key, 3 if kind == "H" else 4, len(values)) + value.ljust(4, b"\0")
    struct.pack_into("<I", out, 4, len(out))
    path.write_bytes(bytes(out) + struct.pack("<H", len(entries)) + directory + bytes(4))
    return path


def error_of(path: Path, true: np.ndarray) -> float:
    """Return the mean error of what slides read; references must read the very same."""
    with open_slide(path, mpp=0.5) as slide:
        region = slide.read(0, 0, slide.width, slide.height, 0.5)
    assert region.valid.all()
    assert region.damaged == 0
    assert np.array_equal(read_reference(path, smallest=16), region.pixels)
    return float(np.abs(region.pixels.astype(int) - true).mean())


def refusal_of(path: Path) -> str:
    """Return the reason code of slides; references must refuse too."""
    with pytest.raises(SlideError) as caught:
        open_slide(path, mpp=0.5)
    assert path.name.partition(".")[0] in str(caught.value)
    with pytest.raises(ValueError, match="must be an 8-bit RGB picture"):
        read_reference(path, smallest=16)
    return caught.value.code


PLAIN = [None, "lzw", "deflate", "packbits", "zstd", "lzma", "lerc"]
OF_THEIR_OWN = ["webp", "png", "jpegxl", "jpegxr"]
JPEG_2000 = [33003, 33004, 33005, 34712]
READ = {
    *((c, kind) for c in (*PLAIN, 33004, 34712, "jpeg") for kind in ("rgb", "ycbcr")),
    *((c, "rgb") for c in OF_THEIR_OWN),
    *((33003, "ycbcr"), (33005, "rgb")),
}
"""Pairs that agree; the others contradict themselves: Aperio's 33003 means YCbCr, 33005 RGB."""


@pytest.mark.parametrize("kind", ["rgb", "ycbcr"])
@pytest.mark.parametrize("compression", [*PLAIN, *OF_THEIR_OWN, *JPEG_2000, "jpeg"])
def test_every_compression_gives_the_true_colours_or_is_refused(tmp_path: Path, compression: Any, kind: str) -> None:
    true, path = picture(), tmp_path / "a.tif"
    samples = true if kind == "rgb" or compression == "jpeg" else as_ycbcr(true)
    more: dict[str, Any] = {"compressionargs": {"level": 90}} if compression == "jpeg" else {}
    if compression == "jpeg":
        more["compressionargs"]["outcolorspace"] = kind
    tifffile.imwrite(path, samples, photometric="rgb" if compression == "jpeg" else kind, compression=compression,
                     tile=(32, 32), metadata=None, **more)  # fmt: skip
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages.first.photometric == (2 if kind == "rgb" else 6)
    if (compression, kind) in READ:
        assert error_of(path, true) < (1.0 if compression in PLAIN else LOSSY)
    else:
        assert refusal_of(path) == "not_rgb"


def table() -> str:
    """Return what docs/reference/slide_files.md must say of the pairs above."""
    names = {"jpeg": "JPEG", "jpegxl": "JPEG XL", "jpegxr": "JPEG XR", "webp": "WebP", "png": "PNG", None: "none"}
    groups = [(", ".join(names.get(c, str(c)) for c in PLAIN), [PLAIN[0]]), ("JPEG", ["jpeg"])]
    groups += [(", ".join(names[c] for c in OF_THEIR_OWN), [OF_THEIR_OWN[0]])]
    groups += [(f"JPEG 2000 ({code})", [code]) for code in JPEG_2000]
    lines = ["| compression | RGB | YCbCr |", "|---|---|---|"]
    for name, (one,) in groups:
        said = ["read" if (one, "rgb") in READ else "refused", "converted" if (one, "ycbcr") in READ else "refused"]
        lines.append(f"| {name} | {' | '.join(said)} |")
    return "\n".join(lines)


def test_the_table_in_the_docs_is_what_is_tried() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "reference" / "slide_files.md").read_text()
    assert docs.partition("<!-- colours -->")[2].partition("<!-- /colours -->")[0].strip() == table()


@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("compression", ["lzw", "deflate"])
def test_ycbcr_behind_a_predictor_and_in_strips(tmp_path: Path, compression: str, predictor: bool) -> None:
    true, path = picture(95, 111), tmp_path / "a.tif"
    tifffile.imwrite(path, as_ycbcr(true), photometric="ycbcr", compression=compression, predictor=predictor,
                     rowsperstrip=20, metadata=None)  # fmt: skip
    assert error_of(path, true) < 1


@pytest.mark.parametrize("sub", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("compression", [1, 5, 8])
def test_subsampled_ycbcr(tmp_path: Path, compression: int, sub: tuple[int, int]) -> None:
    h, w, rows = 93, 109, 32
    true = picture(h, w)
    pack: Any = {1: bytes, 5: imagecodecs.lzw_encode, 8: imagecodecs.zlib_encode}[compression]
    strips = [pack(units(as_ycbcr(true)[y : y + rows], *sub)) for y in range(0, h, rows)]
    path = write_strips(tmp_path / "a.tif", strips, h, w, rows, {259: [compression], 262: [6], 530: sub})
    assert error_of(path, true) < 3


@pytest.mark.parametrize(("sub", "stored"), [((2, 2), None), ((1, 1), None)])
def test_without_its_tag_ycbcr_is_2x2_unless_it_is_longer(
    tmp_path: Path, sub: tuple[int, int], stored: tuple[int, int] | None
) -> None:
    true = picture(64, 80)
    path = write_strips(tmp_path / "a.tif", [units(as_ycbcr(true), *sub)], 64, 80, 64, {259: [1], 262: [6]})
    assert error_of(path, true) < 2


@pytest.mark.parametrize("short", [1, 500])
def test_a_subsampled_segment_that_is_too_short_is_damaged(tmp_path: Path, short: int) -> None:
    data = units(as_ycbcr(picture(64, 80)), 2, 2)
    path = write_strips(tmp_path / "a.tif", [data[:-short]], 64, 80, 64, {259: [1], 262: [6], 530: [2, 2]})
    with open_slide(path, mpp=0.5) as slide:
        region = slide.read(0, 0, 80, 64, 0.5)
    assert (region.damaged, region.valid.any()) == (1, False)


@pytest.mark.parametrize(("sub", "predictor"), [((2, 2), 2), ((3, 1), 1), ((0, 2), 1)])
def test_subsampling_that_cannot_be_is_refused(tmp_path: Path, sub: tuple[int, int], predictor: int) -> None:
    data = units(as_ycbcr(picture(64, 80)), 2, 2)
    tags = {259: [5], 262: [6], 317: [predictor], 530: sub}
    path = write_strips(tmp_path / "a.tif", [imagecodecs.lzw_encode(data)], 64, 80, 64, tags)
    assert refusal_of(path) in ("unsupported", "not_rgb")


def test_coefficients_and_range_of_ycbcr_are_those_of_the_file(tmp_path: Path) -> None:
    true, luma, codes = picture(), (0.2126, 0.7152, 0.0722), (16, 235, 128, 240)
    fractions = [int(v) for share in luma for v in (round(share * 10_000), 10_000)]
    scale = [v for pair in ((16, 235), (128, 240), (128, 240)) for v in (pair[0], 1, pair[1], 1)]
    tags = [(529, 5, 3, tuple(fractions), True), (532, 5, 6, tuple(scale), True)]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, as_ycbcr(true, luma, codes), photometric="ycbcr", compression="lzw", extratags=tags,
                     metadata=None)  # fmt: skip
    assert error_of(path, true) < 1.5


@pytest.mark.parametrize("tag", [(529, 5, 3, (1, 0, 1, 1, 1, 1)), (532, 5, 6, (0, 1) * 6)])
def test_numbers_of_ycbcr_that_cannot_be_are_refused(tmp_path: Path, tag: tuple[Any, ...]) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, as_ycbcr(picture()), photometric="ycbcr", compression="lzw", extratags=[(*tag, True)],
                     metadata=None)  # fmt: skip
    assert refusal_of(path) == "not_rgb"


def test_jpeg_2000_that_says_ycbcr_itself_is_converted_once(tmp_path: Path) -> None:
    true = picture(64, 64)
    stream = imagecodecs.jpeg2k_encode(as_ycbcr(true), level=0, reversible=True, codecformat=2, colorspace=3, mct=False)
    for kind in ([2], [6]):
        path = write_strips(tmp_path / f"a{kind[0]}.tif", [stream], 64, 64, 64, {259: [34712], 262: kind, 530: [1, 1]})
        assert error_of(path, true) < LOSSY


def test_bio_formats_writes_rgb_under_aperios_code(tmp_path: Path) -> None:
    """In OME-TIFF the stream's own transform shows that 33003 holds RGB; elsewhere nobody can tell."""
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, picture(), photometric="rgb", compression=33003, tile=(32, 32))
    assert error_of(path, picture()) < LOSSY
    tifffile.imwrite(path, picture(), photometric="rgb", compression=33003, compressionargs={"mct": False})
    assert refusal_of(path) == "not_rgb"


@pytest.mark.parametrize("mct", [True, False])
@pytest.mark.parametrize("kind", ["rgb", "ycbcr"])
@pytest.mark.parametrize("code", JPEG_2000)
def test_jpeg_2000_of_aperio(tmp_path: Path, code: int, kind: str, mct: bool) -> None:
    """Aperio writes YCbCr of 33003 without a transform of the stream and under a tag that says RGB."""
    true, path = picture(128, 128), tmp_path / "a.svs"
    samples = as_ycbcr(true) if kind == "ycbcr" or (code == 33003 and not mct) else true
    tifffile.imwrite(path, samples, photometric=kind, compression=code, tile=(64, 64), metadata=None,
                     compressionargs={"mct": mct}, description="Aperio Image Library\n128x128|MPP = 0.5")  # fmt: skip
    if (code, kind) == (33005, "ycbcr") or (code, kind, mct) == (33003, "rgb", True):
        with pytest.raises(SlideError, match="what the file says of its colours must agree"):
            open_slide(path)
    else:
        with open_slide(path) as slide:
            assert slide.reader == ("openslide" if code in (33003, 33005) else "tifffile")
            assert np.abs(slide.read(0, 0, 128, 128, 0.5).pixels.astype(int) - true).mean() < LOSSY


def test_dicom_whose_colours_openslide_gets_wrong_is_refused() -> None:
    _check_dicom("a", {"dicom.PhotometricInterpretation": "YBR_FULL_422"})
    with pytest.raises(SlideError, match="of YBR_ICT it gives wrong ones"):
        _check_dicom("a", {"dicom.PhotometricInterpretation": "YBR_ICT"})


ONE, DEEP = picture()[..., 0], picture().astype(np.uint16) * 257
OTHERS = {
    "miniswhite": (ONE, {"photometric": "miniswhite"}, "not_rgb"),
    "minisblack": (ONE, {"photometric": "minisblack"}, "not_rgb"),
    "three grey samples": (picture(), {"photometric": "minisblack", "planarconfig": "contig"}, "not_rgb"),
    "three white samples": (picture(), {"photometric": "miniswhite", "planarconfig": "contig"}, "not_rgb"),
    "palette": (ONE, {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "not_rgb"),
    "cmyk": (np.dstack([picture(), ONE]), {"photometric": "separated"}, "not_rgb"),
    "cielab": (picture(), {"photometric": "cielab"}, "not_rgb"),
    "icclab": (picture(), {"photometric": "icclab", "compression": "lzw"}, "not_rgb"),
    "16 bit": (DEEP, {"photometric": "rgb"}, "not_8_bit"),
    "16 bit ycbcr": (DEEP, {"photometric": "ycbcr"}, "not_8_bit"),
    "float": (picture().astype(np.float32) / 255, {"photometric": "rgb"}, "not_8_bit"),
    "signed": (picture().astype(np.int8), {"photometric": "rgb"}, "not_8_bit"),
    "planes of white": (picture().transpose(2, 0, 1), {"photometric": "miniswhite", "axes": "CYX"}, "not_rgb"),
    "planes of ycbcr": (picture().transpose(2, 0, 1), {"photometric": "ycbcr", "planarconfig": "separate"}, "not_rgb"),
    "planes of lab": (picture().transpose(2, 0, 1), {"photometric": "cielab", "planarconfig": "separate"}, "not_rgb"),
    "signed planes": (
        picture().transpose(2, 0, 1).astype(np.int8), {"photometric": "rgb", "planarconfig": "separate"}, "not_8_bit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_colours_are_refused(tmp_path: Path, kind: str) -> None:
    pixels, options, code = OTHERS[kind]
    options = dict(options)
    metadata = {"axes": options.pop("axes")} if "axes" in options else None
    path = tmp_path / ("a.ome.tif" if metadata else "a.tif")
    tifffile.imwrite(path, pixels, metadata=metadata, tile=(32, 32), **options)
    assert refusal_of(path) == code


@pytest.mark.parametrize(
    ("channels", "stains"),
    [
        ({}, False),
        ({"Name": ["Red", "Green", "Blue"]}, False),
        ({"Name": ["Channel 0", "C1", "2"]}, False),
        ({"Color": [-16776961, 16711935, 65535]}, False),  # RGBA as a signed number
        ({"Name": ["DAPI", "CD3", "CD8"]}, True),
        ({"Name": ["Blue", "Green", "Red"]}, True),
        ({"Color": [65535, 16711935, -16776961]}, True),
        ({"Fluor": ["DAPI", "FITC", "Cy5"], "Name": ["0", "1", "2"]}, True),
    ],
)
def test_three_channels_are_red_green_and_blue_unless_they_say_otherwise(
    tmp_path: Path, channels: dict[str, list[Any]], stains: bool
) -> None:
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "CYX", "Channel": channels} if channels else {"axes": "CYX"}
    tifffile.imwrite(path, picture().transpose(2, 0, 1), photometric="minisblack", metadata=metadata)
    if stains:
        with pytest.raises(SlideError, match="three channels must be red, green and blue; they are ") as caught:
            open_slide(path, mpp=0.5)
        assert caught.value.code == "not_rgb"
    else:
        with open_slide(path, mpp=0.5) as slide:
            assert np.array_equal(slide.read(0, 0, W, H, 0.5).pixels, picture())


@pytest.mark.parametrize(("order", "stains"), [((0, 1, 2), False), ((2, 1, 0), True), ((0, 1, 1), True)])
def test_channels_of_imagej_are_those_of_their_tables(tmp_path: Path, order: tuple[int, ...], stains: bool) -> None:
    tables = [np.zeros((3, 256), np.uint8) for _ in order]
    for lookup, colour in zip(tables, order, strict=True):
        lookup[colour] = np.arange(256)
    path = tmp_path / "a.tif"
    metadata = {"axes": "CYX", "LUTs": tables, "mode": "composite"}
    tifffile.imwrite(path, picture().transpose(2, 0, 1), imagej=True, metadata=metadata)
    if stains:
        with pytest.raises(SlideError, match="three channels must be red, green and blue"):
            open_slide(path, mpp=0.5)
    else:
        open_slide(path, mpp=0.5).close()


def test_a_level_of_other_colours_is_left_out(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(picture(), photometric="rgb", tile=(32, 32), metadata=None)
        tiff.write(picture()[::2, ::2], photometric="cielab", subfiletype=1, tile=(32, 32), metadata=None)
    with open_slide(tmp_path / "a.tif", mpp=0.5) as slide:
        assert slide.sizes == ((H, W),)


def test_an_unknown_compression_is_refused(tmp_path: Path) -> None:
    path = write_strips(tmp_path / "a.tif", [bytes(500)], H, W, H, {259: [34676], 262: [2]})
    assert refusal_of(path) == "unsupported"


def test_the_yardstick_sees_ycbcr_taken_for_rgb() -> None:
    assert np.abs(as_ycbcr(picture()).astype(int) - picture()).mean() > 10 * LOSSY - 10
    assert np.abs(np.asarray(Image.fromarray(picture()).convert("YCbCr")).astype(int) - as_ycbcr(picture())).max() <= 1
