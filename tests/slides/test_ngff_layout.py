"""OME-Zarr as converters write it: pictures in numbered groups, alpha, lost chunks of one colour."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from engine.core.errors import SlideError
from engine.slides.slide import open_slide
from tests.support.written_slides import ruler

PICTURE = ruler(0.5, 300, 200)
H, W = PICTURE.shape[:2]
KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
XML = """<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{images}</OME>"""
IMAGE = '<Image ID="Image:{i}"><Pixels SizeX="{w}" SizeY="{h}" PhysicalSizeX="{mpp}" PhysicalSizeY="{mpp}"/></Image>'


def write(
    folder: Path, pixels: np.ndarray, version: str = "0.4", unit: str | None = "micrometer", mpp: float = 0.5,
    axes: str = "tczyx", **more: Any,
) -> Path:  # fmt: skip
    """Write (h, w, n) as an OME-Zarr group of one level, a chunk per colour."""
    chunk = {"t": 1, "c": 1, "z": 1, "y": 256, "x": 256}
    array = pixels.transpose(2, 0, 1)
    array = array[None, :, None] if axes == "tczyx" else array
    group = zarr.open_group(str(folder), mode="w", zarr_format=2 if version == "0.4" else 3)
    compressors: Any = {"id": "zlib", "level": 1} if version == "0.4" else "auto"
    level = group.create_array(
        "0", shape=array.shape, dtype=array.dtype, chunks=tuple(chunk[a] for a in axes), fill_value=0,
        compressors=compressors,
    )  # fmt: skip
    level[...] = array
    described = [{"name": a, "type": KINDS[a], **({"unit": unit} if a in "yx" and unit else {})} for a in axes]
    scale = [{"type": "scale", "scale": [mpp if a in "yx" else 1 for a in axes]}]
    said = {
        "multiscales": [{"axes": described, "datasets": [{"path": "0", "coordinateTransformations": scale}]}],
        **more,
    }
    group.attrs.update(said if version == "0.4" else {"ome": {"version": "0.5", **said}})
    return folder


def write_several(
    root: Path, pictures: dict[str, np.ndarray], version: str = "0.4", listed: bool = True, **more: Any
) -> Path:
    """Write the layout of bioformats2raw: each picture in a group of its own."""
    format = 2 if version == "0.4" else 3
    said: dict[str, Any] = {"bioformats2raw.layout": 3}
    zarr.open_group(str(root), mode="w", zarr_format=format).attrs.update(said if format == 2 else {"ome": said})
    series: dict[str, Any] = {"series": list(pictures)} if listed else {}
    side = zarr.open_group(str(root / "OME"), mode="w", zarr_format=format)
    side.attrs.update(series if format == 2 else {"ome": series})
    for place, pixels in pictures.items():
        write(root / place, pixels, version, **more)
    return root


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_picture_in_a_group(tmp_path: Path, version: str, listed: bool) -> None:
    with open_slide(write_several(tmp_path / "a.ome.zarr", {"0": PICTURE}, version, listed)) as slide:
        assert (slide.name, slide.reader, slide.resolution.source) == ("a", "zarr", "OME-NGFF scale")
        region = slide.read(0, 0, W, H, 0.5)
    assert region.valid.all()
    assert np.array_equal(region.pixels, PICTURE)


def test_the_largest_of_several_with_its_own_scale(tmp_path: Path) -> None:
    """Label and macro lie beside the scan; units are in the OME-XML alone, and each picture has its own."""
    path = tmp_path / "a.ome.zarr"
    write_several(path, {"0": PICTURE[:100, :90], "1": PICTURE, "2": PICTURE[:90, :200]}, unit=None)
    sizes = [(100, 90, 9.0), (H, W, 0.25), (90, 200, 8.0)]
    images = "".join(IMAGE.format(i=i, h=h, w=w, mpp=mpp) for i, (h, w, mpp) in enumerate(sizes))
    (path / "OME" / "METADATA.ome.xml").write_text(XML.format(images=images))
    with open_slide(path) as slide:
        assert (slide.reader, slide.width) == ("zarr", W)
        assert slide.choice.told.startswith(f"series 1 (1) {W}x{H}; left out: 0 (0) 90x100")
        assert slide.resolution.mpp == 0.25
        assert slide.resolution.source.startswith("OME-XML PhysicalSize")
    with open_slide(path, series=2) as slide:
        assert (slide.width, slide.height) == (200, 90)
    images = "".join(IMAGE.format(i=i, h=h + 1, w=w, mpp=mpp) for i, (h, w, mpp) in enumerate(sizes))
    (path / "OME" / "METADATA.ome.xml").write_text(XML.format(images=images))
    with pytest.raises(SlideError) as caught:  # it tells of other pictures
        open_slide(path)
    assert caught.value.code == "no_mpp"


def test_a_listed_picture_that_is_lost_is_named(tmp_path: Path) -> None:
    """It may be the scan: the label beside it must not be taken for it."""
    path = write_several(tmp_path / "a.ome.zarr", {"0": PICTURE, "1": PICTURE[:100, :90]})
    (path / "0" / ".zattrs").unlink()
    with pytest.raises(SlideError, match=r"a: all pictures of .* must be readable.*; 0 is not") as caught:
        open_slide(path)
    assert caught.value.code == "not_a_slide"


@pytest.mark.parametrize(
    ("said", "code", "what"),
    [
        ({"plate": {}}, "unsupported", "a plate of wells"), ({"well": {}}, "unsupported", "a well"),
        ({"image-label": {}}, "unsupported", "labels of another picture"),
        ({"bioformats2raw.layout": 3}, "not_a_slide", r"it has none \(bioformats2raw.layout\)"),
        ({}, "not_a_slide", r"it has none \(no attributes\)"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_named(tmp_path: Path, said: dict[str, Any], code: str, what: str) -> None:
    zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=2).attrs.update(said)
    with pytest.raises(SlideError, match=what) as caught:
        open_slide(tmp_path / "a.zarr")
    assert caught.value.code == code


@pytest.mark.parametrize("axes", ["cyx", "tczyx"])
def test_alpha(tmp_path: Path, axes: str) -> None:
    """Chunks that are 0 throughout are not written: a lost alpha is one that hides."""
    alpha = np.full((H, W), 255, np.uint8)
    alpha[:256, :256], alpha[300:310] = 0, 0
    path = write(tmp_path / "a.zarr", np.concatenate([PICTURE, alpha[..., None]], axis=2), axes=axes)
    with open_slide(path) as slide:
        region = slide.read(0, 0, W, H, 0.5)
    assert np.array_equal(region.valid, alpha == 255)
    assert np.array_equal(region.pixels[region.valid], PICTURE[region.valid])


def test_four_stains_are_no_colours_and_a_band_is_left_out(tmp_path: Path) -> None:
    fourth = np.random.default_rng(0).integers(0, 256, (H, W, 1)).astype(np.uint8)
    pixels = np.concatenate([PICTURE, fourth], axis=2)
    with pytest.raises(SlideError, match="the last has the values of a stain or a band") as caught:
        open_slide(write(tmp_path / "a.zarr", pixels))
    assert caught.value.code == "not_rgb"
    omero = {"channels": [{"color": c} for c in ("FF0000", "00FF00", "0000FF", "FFFFFF")]}
    with open_slide(write(tmp_path / "a.zarr", pixels, omero=omero)) as slide:
        assert slide.reader == "zarr, 1 more band(s) left out"
        region = slide.read(0, 0, W, H, 0.5)
    assert region.valid.all()
    assert np.array_equal(region.pixels, PICTURE)


@pytest.mark.parametrize(
    ("pixels", "code", "said"),
    [
        (PICTURE[..., :1], "not_rgb", "greyscale with 1 sample"), (PICTURE[..., :2], "not_rgb", "multichannel with 2"),
        (np.concatenate([PICTURE, PICTURE], 2), "not_rgb", "multichannel with 6"),
        (PICTURE.astype(np.int8), "not_8_bit", "int8"), (PICTURE.astype(np.uint16), "not_8_bit", "16 bits"),
    ],
)  # fmt: skip
def test_other_channels_are_named(tmp_path: Path, pixels: np.ndarray, code: str, said: str) -> None:
    with pytest.raises(SlideError, match=said) as caught:
        open_slide(write(tmp_path / "a.zarr", pixels))
    assert caught.value.code == code


@pytest.mark.parametrize("kind", ["lost", "broken"])
def test_a_chunk_of_one_colour(tmp_path: Path, kind: str) -> None:
    """Green lacks a chunk: the px have no colour, and are not what is left of it."""
    path = write_several(tmp_path / "a.ome.zarr", {"0": PICTURE})
    chunk = path / "0" / "0" / "0.1.0.0.0"
    if kind == "lost":
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    with open_slide(path) as slide:
        region = slide.read(0, 0, W, H, 0.5)
    whole = np.ones((H, W), bool)
    whole[:256, :256] = False
    assert np.array_equal(region.valid, whole)
    assert region.damaged == (0 if kind == "lost" else 1)
    assert (region.pixels[:256, :256] == (255 if kind == "lost" else 128)).all()
