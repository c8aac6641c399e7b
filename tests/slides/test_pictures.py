"""Of a file that holds several pictures, px and µm/px are those of one and the same, and which one is said."""

import csv
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from engine.conditions.reference import read_reference
from engine.core.errors import SlideError
from engine.extract_features import main
from engine.slides.inspect import inspect_slide
from engine.slides.slide import open_slide
from engine.slides.tile_grid import GridConfig
from engine.slides.tissue import TissueConfig
from tests.slides.test_units import write_ngff

SCAN = np.random.default_rng(0).integers(100, 250, (320, 384, 3), dtype=np.uint8)
SMALL = np.random.default_rng(1).integers(100, 250, (288, 256, 3), dtype=np.uint8)


def ome(path: Path, pictures: list[tuple[np.ndarray, str | None, float | None]]) -> Path:
    """Write an OME-TIFF of pictures (px, name, µm/px)."""
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for pixels, name, mpp in pictures:
            sizes = {} if mpp is None else {f"PhysicalSize{a}": mpp for a in "XY"}
            more = {} if name is None else {"Name": name}
            tiff.write(pixels, photometric="rgb", tile=(64, 64), metadata={"axes": "YXS", **sizes, **more})
    return path


def seen(path: Path, series: int | None = None, mpp: float | None = None) -> tuple[np.ndarray, float, str]:
    """Return px, µm/px and what is said of the choice."""
    with open_slide(path, mpp=mpp, series=series) as slide:
        at = slide.resolution
        pixels = slide.read(0, 0, slide.width, slide.height, at.mpp).pixels
        return pixels, at.mpp_x, slide.choice.told


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", ["macro image", "Overview", "label", None])
def test_ome_tiff_gives_the_scan_and_its_own_scale(tmp_path: Path, name: str | None, order: int) -> None:
    parts = [(SMALL, name, 4.0), (SCAN, None, 0.25)]
    path = ome(tmp_path / "a.ome.tiff", parts if order else parts[::-1])
    pixels, mpp, told = seen(path)
    assert np.array_equal(pixels, SCAN)
    assert mpp == 0.25
    assert told.startswith(f"series {order} (")
    assert f"left out: {1 - order} (" in told
    assert "256x288" in told
    other, mpp, _ = seen(path, series=1 - order)
    assert np.array_equal(other, SMALL)
    assert mpp == 4.0


def test_a_macro_larger_than_the_scan_is_not_the_slide(tmp_path: Path) -> None:
    path = ome(tmp_path / "a.ome.tiff", [(SCAN, "macro", 4.0), (SMALL, "scan", 0.25)])
    pixels, mpp, _ = seen(path)
    assert np.array_equal(pixels, SMALL)
    assert mpp == 0.25


def test_of_two_scans_of_one_size_each_has_its_own_scale(tmp_path: Path) -> None:
    path = ome(tmp_path / "a.ome.tiff", [(SCAN, None, 0.5), (SCAN[::-1].copy(), None, 0.25)])
    for series, pixels, mpp in ((None, SCAN, 0.5), (0, SCAN, 0.5), (1, SCAN[::-1], 0.25)):
        found = seen(path, series)
        assert np.array_equal(found[0], pixels)
        assert found[1] == mpp


def test_a_picture_without_a_scale_takes_none_from_another(tmp_path: Path) -> None:
    path = ome(tmp_path / "a.ome.tiff", [(SMALL, None, 4.0), (SCAN, None, None)])
    with pytest.raises(SlideError) as caught:
        open_slide(path)
    assert caught.value.code == "no_mpp"
    assert seen(path, mpp=0.5)[1] == 0.5


def test_ome_xml_of_another_picture_is_named_and_not_taken(tmp_path: Path) -> None:
    xml = tifffile.tiffcomment(ome(tmp_path / "a.ome.tiff", [(SCAN, None, 0.25)]))
    path = tmp_path / "b.ome.tiff"  # reduced by a program that keeps the text
    tifffile.imwrite(path, SCAN[::2, ::2], photometric="rgb", description=xml.encode(), metadata=None)
    with pytest.raises(SlideError, match="its OME-XML describes no picture of this size") as caught:
        open_slide(path)
    assert caught.value.code == "no_mpp"


def test_the_objective_is_that_of_the_picture(tmp_path: Path) -> None:
    path = ome(tmp_path / "a.ome.tiff", [(SMALL, None, 4.0), (SCAN, None, 0.25)])
    xml = tifffile.tiffcomment(path)
    lenses = "".join(f'<Objective ID="Objective:0:{i}" NominalMagnification="{p}"/>' for i, p in enumerate((2, 40)))
    xml = xml.replace("<Image ", f'<Instrument ID="Instrument:0">{lenses}</Instrument><Image ', 1)
    for image in (0, 1):
        at = xml.index("<Pixels", xml.index(f'ID="Image:{image}"'))
        xml = f'{xml[:at]}<ObjectiveSettings ID="Objective:0:{image}"/>{xml[at:]}'
    tifffile.tiffcomment(path, xml.encode())
    for series, power in ((None, 40), (0, 2)):
        with open_slide(path, series=series) as slide:
            assert slide.objective == power


def test_px_in_another_file_of_a_set_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "b.ome.tiff", SCAN, photometric="rgb", metadata=None)
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="384" SizeY="320" SizeC="3" SizeZ="1" '
        'SizeT="1" PhysicalSizeX="0.25" PhysicalSizeY="0.25"><Channel ID="Channel:0:0" SamplesPerPixel="3"/>'
        '<TiffData IFD="0" PlaneCount="1"><UUID FileName="b.ome.tiff">urn:uuid:2</UUID></TiffData></Pixels></Image>'
        "</OME>"
    )
    path = tmp_path / "a.ome.tiff"
    tifffile.imwrite(path, SMALL, photometric="rgb", description=xml.encode(), metadata=None)
    with pytest.raises(SlideError, match="lie in another file of a set") as caught:
        open_slide(path)
    assert caught.value.code == "unsupported"


def svs(path: Path) -> Path:
    """Write what Aperio writes: the scan, a thumbnail, a level, a label and a macro that is as large as the scan."""
    lines = "Aperio Image Library v12\n{}\n|AppMag = 40|MPP = 0.2513"
    with tifffile.TiffWriter(path) as tiff:

        def page(pixels: np.ndarray, text: str, tile: bool, kind: int = 0) -> None:
            shape: dict[str, Any] = {"tile": (64, 64)} if tile else {}
            tiff.write(pixels, photometric="rgb", description=text, subfiletype=kind, metadata=None, **shape)

        page(SCAN, lines.format("384x320"), True)
        page(SCAN[::4, ::4], "Aperio Image Library v12\n96x80", False)
        page(SCAN[::2, ::2], "Aperio Image Library v12\n192x160", True)
        page(SMALL[:, :64], "Aperio Image Library v12\nlabel 64x288", False, 1)
        page(np.tile(SMALL, (2, 2, 1)), "Aperio Image Library v12\nmacro 512x576", False, 9)
    return path


def test_svs_with_label_and_macro(tmp_path: Path) -> None:
    path = svs(tmp_path / "a.svs")
    pixels, mpp, told = seen(path)
    assert np.array_equal(pixels, SCAN)
    assert mpp == 0.2513
    assert "left out: 1 (Thumbnail) 96x80, 2 (Label) 64x288, 3 (Macro) 512x576" in told
    with open_slide(path) as slide:
        assert (slide.choice.doubtful, slide.resolution.source, len(slide.sizes)) == (False, "aperio.MPP", 2)
    with pytest.raises(SlideError) as caught:
        open_slide(path, series=3)
    assert caught.value.code == "no_mpp"  # a macro has no scale, and the scan's is not its own


@pytest.mark.parametrize("scaled", [True, False])
def test_a_generic_tiff_of_several_pages(tmp_path: Path, scaled: bool) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        scale: Any = {"resolutionunit": "CENTIMETER", "metadata": None, "photometric": "rgb"}
        tiff.write(SMALL, resolution=(2500, 2500), **scale)
        tiff.write(SCAN, resolution=(40000, 40000) if scaled else None, **scale)
    if not scaled:
        with pytest.raises(SlideError) as caught:
            open_slide(path)
        assert caught.value.code == "no_mpp"
        return
    pixels, mpp, told = seen(path)
    assert np.array_equal(pixels, SCAN)
    assert mpp == 0.25
    assert told == "series 1 384x320; left out: 0 256x288"
    assert seen(path, series=0)[1] == 4.0


def test_a_generic_macro_larger_than_the_scan_is_told_by_its_description(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(SCAN, photometric="rgb", metadata=None, description="macro image")
        tiff.write(SMALL, photometric="rgb", metadata=None)
    pixels, _, told = seen(path, mpp=0.5)
    assert np.array_equal(pixels, SMALL)
    assert told == "series 1 256x288; left out: 0 (macro image) 384x320"


def test_pages_that_are_smaller_copies_are_no_other_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        for factor in (1, 2, 4):
            tiff.write(SCAN[::factor, ::factor], photometric="rgb", metadata=None)
    with open_slide(path, mpp=0.5) as slide:
        assert (slide.choice.doubtful, slide.height) == (False, 320)


def test_a_mask_is_no_other_picture(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(SCAN, photometric="rgb", metadata=None)
        tiff.write(np.ones(SCAN.shape[:2], np.bool_), photometric="mask", subfiletype=4, metadata=None)
    with open_slide(tmp_path / "a.tif", mpp=0.5) as slide:
        assert not slide.choice.doubtful


STEPS = [{"type": "scale", "scale": [1.0, 0.25, 0.25]}], [{"type": "scale", "scale": [1.0, 4.0, 4.0]}]


def test_ome_zarr_of_several_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.zarr"
    write_ngff(path, [("macro", np.tile(SMALL, (2, 2, 1)), STEPS[1], "micrometer"), ("", SMALL, STEPS[1], "micrometer"),
                      ("scan", SCAN, STEPS[0], "micrometer")])  # fmt: skip
    pixels, mpp, told = seen(path)
    assert np.array_equal(pixels, SCAN)
    assert mpp == 0.25
    assert told == "series 2 (scan) 384x320; left out: 0 (macro) 512x576, 1 256x288"
    assert seen(path, series=1)[1] == 4.0


@pytest.mark.parametrize("said", [{"label": "DAPI"}, {"color": "FFFF00"}])
def test_ome_zarr_of_three_stains_is_refused(tmp_path: Path, said: dict[str, str]) -> None:
    path = tmp_path / "a.ome.zarr"
    write_ngff(path, [("", SCAN, STEPS[0], "micrometer")], {"channels": [said, {}, {}]})
    with pytest.raises(SlideError, match="three channels must be red, green and blue"):
        open_slide(path)


def test_a_number_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = ome(tmp_path / "a.ome.tiff", [(SMALL, "macro", 4.0), (SCAN, None, 0.25)])
    Image.fromarray(SCAN).save(tmp_path / "b.png")
    for file, series, text in ((path, 2, r"0 \(macro\) 256x288; 1 .*384x320"), (tmp_path / "b.png", 1, "one picture")):
        with pytest.raises(SlideError, match=text) as caught:
            open_slide(file, mpp=0.5, series=series)
        assert caught.value.code == "no_such_series"
    assert np.array_equal(seen(tmp_path / "b.png", series=0, mpp=0.5)[0], SCAN)


def test_what_is_left_out_is_a_note(tmp_path: Path) -> None:
    everything = TissueConfig("everything", mpp=1.0), GridConfig()
    two = ome(tmp_path / "two.ome.tiff", [(SMALL, None, 0.5), (SCAN, None, 0.25)])
    labelled = ome(tmp_path / "labelled.ome.tiff", [(SMALL, "label", None), (SCAN, None, 0.25)])
    row = inspect_slide(two, *everything)
    assert (row.problem, row.usable, row.mpp_source) == ("one_of_several", True, "OME-XML PhysicalSize, series 1")
    assert "--series" in row.message
    assert row.picture == "series 1 (Image1) 384x320; left out: 0 (Image0) 256x288"
    chosen = inspect_slide(two, *everything, series=0)
    assert (chosen.problem, chosen.mpp_x, chosen.width) == ("", 0.5, 256)
    assert inspect_slide(labelled, *everything).problem == ""


def test_series_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ome(tmp_path / "slides.ome.tiff", [(SMALL, None, 0.5), (SCAN, None, 0.25)])
    out = ["--slides", str(tmp_path), "--out", str(tmp_path / "out"), "--dry-run", "--finder.method", "everything"]
    for series, width in (("0", "256"), ("1", "384")):
        assert main([*out, "--series", series]) == 0
        with (tmp_path / "out" / "slides.csv").open(newline="") as file:
            assert [row["width"] for row in csv.DictReader(file)] == [width]
    assert main([*out, "--series", "7"]) == 3
    assert "no_such_series" in capsys.readouterr().out


def test_a_reference_is_the_scan_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = ome(tmp_path / "a.ome.tiff", [(SMALL, None, 4.0), (SCAN, None, 0.25)])
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_reference(path), SCAN)
    assert "this one is read: series 1 (Image1) 384x320; left out: 0 (Image0) 256x288" in caplog.text
    caplog.clear()
    assert np.array_equal(read_reference(f"{path}:0"), SMALL)
    assert not caplog.text
    with pytest.raises(ValueError, match="series must be the number of a picture that the file holds"):
        read_reference(f"{path}:2")
