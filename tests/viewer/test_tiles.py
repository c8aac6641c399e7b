"""Tiles hold the px of their picture at every depth; what cannot be read is grey, counted, and stops nothing."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image as PILImage

from engine.images.dzi import write_dzi
from engine.images.ome_zarr import Image
from engine.slides.slide import open_slide
from engine.viewer.places import look
from engine.viewer.tiles import (
    PIECE_PX,
    TILE_PX,
    DeepZoom,
    FlatPyramid,
    GoneError,
    Makers,
    OurPyramid,
    Pyramid,
    SlidePyramid,
)
from tests.support.known_picture import HEIGHT, PIXELS, WIDTH, image_of
from tests.support.known_view import slide_file
from tests.support.written_slides import box, ruler


def decoded(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB").astype(int)


def whole(pyramid: Pyramid, depth: int) -> np.ndarray:
    """Put a level together from its tiles."""
    factor = 2 ** (pyramid.depths[1] - depth)
    height, width = (-(-side // factor) for side in pyramid.size)
    rows = []
    for row in range(-(-height // TILE_PX)):
        found = [decoded(pyramid.tile(depth, column, row).data) for column in range(-(-width // TILE_PX))]
        rows.append(np.concatenate(found, axis=1))
    picture = np.concatenate(rows)
    assert picture.shape == (height, width, 3)
    return picture


@pytest.fixture
def image(tmp_path: Path) -> Image:
    found = image_of(tmp_path / "p.ome.zarr")
    found.build_pyramid()
    return found


def test_every_level_of_our_picture(image: Image) -> None:
    pyramid = OurPyramid(image)
    assert pyramid.depths == (11 - 2, 11)
    assert np.abs(whole(pyramid, 11) - PIXELS.transpose(1, 2, 0)).mean() < 1
    for depth, level in ((10, 1), (9, 2)):
        stored = image.read(0, image.sizes[level][0], level=level).transpose(1, 2, 0)
        assert np.abs(whole(pyramid, depth) - stored).mean() < 1.5


@pytest.mark.parametrize("place", [(12, 0, 0), (8, 0, 0), (11, 2, 0), (11, 0, 3), (11, -1, 0), (-1, 0, 0)])
def test_tiles_that_are_not_there(image: Image, place: tuple[int, int, int]) -> None:
    pyramids: list[Pyramid] = [OurPyramid(image), FlatPyramid(np.ascontiguousarray(PIXELS.transpose(1, 2, 0)))]
    for pyramid in pyramids:
        if place != (8, 0, 0):
            with pytest.raises(LookupError):
                pyramid.tile(*place)


def test_a_damaged_chunk_is_grey_and_counted(image: Image) -> None:
    chunk = image.path / "0" / "c" / "0" / "1" / "0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 255
    chunk.write_bytes(bytes(data))
    makers, pyramid = Makers(), OurPyramid(image)
    for _ in range(2):
        tile = makers.make("run", "picture", pyramid, (11, 0, 1))
        assert (abs(decoded(tile.data) - 128) < 3).all()
    assert not makers.make("run", "picture", pyramid, (11, 0, 2)).damaged
    assert makers.count("run") == 1
    assert makers.count("another") == 0


def test_a_removed_picture_is_gone_and_not_grey(image: Image) -> None:
    import shutil

    shutil.rmtree(image.path)
    with pytest.raises(GoneError, match="removed while it was viewed"):
        OurPyramid(image).tile(11, 0, 0)


def test_a_slide_at_full_and_reduced_size(tmp_path: Path) -> None:
    with open_slide(slide_file(tmp_path / "s.tiff")) as slide:
        pyramid = SlidePyramid(slide)
        assert pyramid.size == (1400, 2200)
        first, deepest = pyramid.depths
        assert max(-(-side // 2 ** (deepest - first)) for side in pyramid.size) <= TILE_PX
        assert np.abs(whole(pyramid, deepest) - ruler(0.5)).mean() < 2
        half = whole(pyramid, deepest - 1)
        assert np.abs(half - box(ruler(0.5), 2, "up")).mean() < 2
        assert whole(pyramid, first).shape[1] == -(-2200 // 2 ** (deepest - first))


def test_a_slide_without_levels_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its size, no read is larger than PIECE_PX px of the level, and pieces leave no seams."""
    picture = ruler(0.5)
    path = tmp_path / "flat.png"
    PILImage.fromarray(picture).save(path)
    with open_slide(path, mpp=0.5) as slide:
        pyramid, reads = SlidePyramid(slide), []
        original = slide.read

        def noted(x: float, y: float, w: int, h: int, mpp: float, level: int | None = None):  # noqa: ANN202
            reads.append(max(w, h) * mpp / 0.5)
            return original(x, y, w, h, mpp, level)

        monkeypatch.setattr(slide, "read", noted)
        monkeypatch.setattr("engine.viewer.tiles.PIECE_PX", 256)
        first, deepest = pyramid.depths
        pieces = whole(pyramid, first)
        assert max(reads) <= 256
        monkeypatch.setattr("engine.viewer.tiles.PIECE_PX", PIECE_PX)
        assert np.abs(pieces - whole(pyramid, first)).mean() < 1
        assert max(reads) > 256


def test_px_that_are_no_squares_are_shown_as_squares(tmp_path: Path) -> None:
    path = slide_file(tmp_path / "s.tiff")
    with open_slide(path, {"s": (0.25, 1.0)}) as slide:
        assert SlidePyramid(slide).size == (2800, 1100)


def test_damaged_tiles_of_a_slide_are_said(tmp_path: Path) -> None:
    from tests.support.written_slides import overwrite, tile_bytes

    path = slide_file(tmp_path / "s.tiff", compression="jpeg")
    offset, count = tile_bytes(path, 0, 0)
    overwrite(path, offset, b"\0" * count)
    with open_slide(path) as slide:
        pyramid = SlidePyramid(slide)
        assert pyramid.tile(pyramid.depths[1], 0, 0).damaged
        assert not pyramid.tile(pyramid.depths[1], 2, 2).damaged


def test_deep_zoom_tiles_are_passed_on(tmp_path: Path, image: Image) -> None:
    write_dzi(tmp_path / "deep.dzi", image)
    item = next(item for item in look(tmp_path).items if item.kind == "dzi")
    pyramid = DeepZoom.open(item)
    assert pyramid.size == (HEIGHT, WIDTH)
    assert pyramid.tiling == (254, 1)
    stored = tmp_path / "deep_files" / "11" / "1_2.jpeg"
    assert pyramid.tile(11, 1, 2).data == stored.read_bytes()
    stored.unlink()
    assert pyramid.tile(11, 1, 2).damaged
    stored.symlink_to("/etc/passwd")
    with pytest.raises(Exception, match="is a link to /etc/passwd"):
        pyramid.tile(11, 1, 2)
    with pytest.raises(LookupError):
        pyramid.tile(11, 4, 0)


@pytest.mark.parametrize(
    "text", ["", "<Image/>", "<!DOCTYPE a [<!ENTITY b 'c'>]><Image>&b;</Image>", "<Image TileSize='-1'"]
)
def test_a_descriptor_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "deep.dzi").write_text(text)
    with pytest.raises(Exception, match="must be a Deep Zoom descriptor"):
        DeepZoom.open(look(tmp_path).items[0])
