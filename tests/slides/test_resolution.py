"""µm/px come from a named source, in a stated order, or the slide is refused."""

from pathlib import Path

import pytest

from engine.core.errors import EngineError, SlideError
from engine.slides.resolution import Claim, Claims, ome_xml_claims, read_overrides, resolve, tiff_claim
from engine.slides.slide import open_slide
from engine.slides.units import microns
from tests.support.written_slides import METRES, ruler, write_geotiff, write_tiff

VENDOR, OME, TIFF = Claim("aperio.MPP", 0.25, 0.25), Claim("OME-XML", 0.3, 0.31), Claim("TIFF resolution", 0.4, 0.4)
DPI_72 = Claim("TIFF resolution", 352.8, 352.8)


@pytest.mark.parametrize(
    ("claims", "overrides", "mpp", "expected"),
    [
        (Claims((VENDOR, OME, TIFF), 40), {"a": (0.6, 0.7)}, 0.9, (0.6, 0.7, "overrides table")),
        (Claims((VENDOR,)), {"a.svs": (0.6, 0.6)}, None, (0.6, 0.6, "overrides table")),
        (Claims((VENDOR, OME, TIFF), 20), {"b": (1, 1)}, 0.9, (0.25, 0.25, "aperio.MPP")),
        (Claims((OME, TIFF)), {}, 0.9, (0.3, 0.31, "OME-XML")),
        (Claims((DPI_72,), 20), {}, 0.9, (0.9, 0.9, "given for slides without (mpp)")),
        (Claims((DPI_72, OME)), {}, None, (0.3, 0.31, "OME-XML")),
        (Claims((), 40), {}, None, (0.25, 0.25, "objective power 40 (estimated)")),
    ],
)
def test_order(claims: Claims, overrides: dict, mpp: float | None, expected: tuple) -> None:  # type: ignore[type-arg]
    found = resolve("a", "a.svs", claims, overrides, mpp)
    assert (found.mpp_x, found.mpp_y, found.source) == expected
    assert found.estimated == ("estimated" in found.source)


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        (Claims(), "no_mpp"),
        (Claims((DPI_72,)), "absurd_mpp"),
        (Claims((Claim("x", 0.01, 0.01),)), "absurd_mpp"),
        (Claims((Claim("x", 0.25, 0.9),)), "absurd_mpp"),
        (Claims((), 0.1), "no_mpp"),
    ],
)
def test_refuses_rather_than_guesses(claims: Claims, code: str) -> None:
    with pytest.raises(SlideError, match=r"slide-7.*mpp.*`slide-7,0.25`.*overrides table") as caught:
        resolve("slide-7", "slide-7.svs", claims, {}, None)
    assert caught.value.code == code


@pytest.mark.parametrize(("dpi", "code"), [(None, "no_mpp"), (72, "absurd_mpp"), (96, "absurd_mpp")])
def test_a_file_without_a_scale_or_of_72_dpi(tmp_path: Path, dpi: int | None, code: str) -> None:
    path = write_tiff(tmp_path / "a.tif", [ruler(0.5, 200, 200)], None if dpi is None else 25400 / dpi)
    with pytest.raises(SlideError) as caught:
        open_slide(path)
    assert caught.value.code == code
    assert open_slide(path, mpp=0.5).resolution.mpp_x == 0.5


def test_units() -> None:
    assert [microns(0.25, u) for u in ("µm", "micrometer", "micron")] == [0.25] * 3
    assert [microns(0.25, u) for u in ("", " ", None, 1)] == [None] * 4
    assert [microns(250, "nm"), microns(0.00025, "mm"), microns(1, "pixel")] == pytest.approx([0.25, 0.25, None])
    claim = tiff_claim((40000, 1), (20000, 1), 3)
    assert claim is not None
    assert (claim.mpp_x, claim.mpp_y) == (0.25, 0.5)
    inch = tiff_claim((50800, 1), (50800, 1), 2)
    assert inch is not None
    assert inch.mpp_x == 0.5
    assert tiff_claim((1, 1), (1, 1), 1) is tiff_claim((0, 1), (1, 1), 2) is tiff_claim(None, None, 2) is None


@pytest.mark.parametrize(
    ("text", "mpp", "objective"),
    [
        ('<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Instrument><Objective NominalMagnification='
         '"40"/></Instrument><Pixels PhysicalSizeX="0.25" PhysicalSizeY="250" PhysicalSizeYUnit="nm"/></OME>',
         (0.25, 0.25), 40),
        ('<OME><Pixels PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1"/></OME>', None, None),
        ('<OME><Pixels PhysicalSizeX="0" PhysicalSizeY="nan"/></OME>', None, None),
        ("no XML <", None, None),
    ],
)  # fmt: skip
def test_ome_xml(text: str, mpp: tuple[float, float] | None, objective: float | None) -> None:
    claims = ome_xml_claims(text)
    assert [(c.mpp_x, c.mpp_y) for c in claims.mpp] == ([mpp] if mpp else [])
    assert claims.objective == objective


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    path.write_text("slide,mpp\na,0.25\nb.svs, 0.5\n", encoding="utf-8-sig")
    assert read_overrides(path) == {"a": (0.25, 0.25), "b.svs": (0.5, 0.5)}
    path.write_text("slide,mpp_x,mpp_y,note\na,0.25,0.26,x\n")
    assert read_overrides(path) == {"a": (0.25, 0.26)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have the columns slide,mpp"),
        ("slide,um\na,1\n", "must have the columns"),
        ("slide,mpp\na,0.25\na,0.5\n", "line 3 must name a slide, once"),
        ("slide,mpp\n,0.25\n", "line 2 must name"),
        ("slide,mpp\na,0\n", "line 2 must be a positive number"),
        ("slide,mpp\na,inf\n", "positive number"),
        ("slide,mpp\na,fine\n", "line 2 must give µm/px as a number"),
        ("slide,mpp\na\n", "as a number"),
    ],
)
def test_wrong_overrides(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "o.csv"
    path.write_text(text)
    with pytest.raises(EngineError, match=message):
        read_overrides(path)
    with pytest.raises(EngineError, match="must be a readable CSV"):
        read_overrides(tmp_path / "none.csv")


@pytest.mark.parametrize(("unit", "metres"), [(9001, 1), (9002, 0.3048), (9003, 0.3048006096)])
def test_a_projected_geotiff_says_its_scale(tmp_path: Path, unit: int, metres: float) -> None:
    path = write_geotiff(tmp_path / "a.tif", METRES | {3076: unit}, (0.6, 0.5, 0.0))
    with open_slide(path, mpp=1e6) as slide:
        found = slide.resolution
    assert (found.mpp_x, found.mpp_y) == pytest.approx((0.6e6 * metres, 0.5e6 * metres))
    assert (found.source, found.estimated) == ("GeoTIFF pixel scale", False)
    with open_slide(path, overrides={"a": (7.0, 7.0)}) as slide:
        assert slide.resolution.source == "overrides table"


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({1024: 2, 2048: 4326}, (6e-6, 6e-6, 0.0)),  # degrees
        (METRES | {3072: 3857}, (0.6, 0.6, 0.0)),  # Web Mercator
        ({1024: 1}, (0.6, 0.6, 0.0)),  # no unit
        (METRES | {3076: 32767}, (0.6, 0.6, 0.0)),  # a unit of its own
        (METRES, (0.0, 0.6, 0.0)),
    ],
)
def test_a_geotiff_that_does_not_say_metres_on_the_ground_is_refused(
    tmp_path: Path, keys: dict[int, int], scale: tuple[float, ...]
) -> None:
    path = write_geotiff(tmp_path / "a.tif", keys, scale)
    with pytest.raises(SlideError) as caught:
        open_slide(path)
    assert caught.value.code == "no_mpp"
    with open_slide(path, mpp=1e6) as slide:
        assert slide.resolution.source == "given for slides without (mpp)"


def test_a_geotiff_of_absurd_scale_is_passed_over(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"GeoTIFF pixel scale says 0.25 x 0.25 \(1000 … 1e\+10 is believed\)"):
        open_slide(write_geotiff(tmp_path / "a.tif", METRES, (0.25e-6, 0.25e-6, 0.0)))
