"""What --dry-run shows: one row per slide, a reason code for a bad one, and none stops the others."""

import csv
from pathlib import Path

import numpy as np

from engine.slides.inspect import format_table, inspect_slides, write_csv
from engine.slides.slide import find_slides
from engine.slides.tile_grid import GridConfig
from engine.slides.tissue import TissueConfig
from tests.support.written_slides import box, ruler, write_tiff


def test_every_slide_has_a_row(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    picture = ruler(0.5)
    write_tiff(folder / "good.tif", [picture, box(picture, 4)], 0.5)
    write_tiff(folder / "glass.tif", [np.full((600, 600, 3), 244, np.uint8)], 0.5)
    write_tiff(folder / "coarse.tif", [picture], 2.0)
    write_tiff(folder / "unknown.tif", [picture], None)
    write_tiff(folder / "power.svs", [picture], None, description="Aperio Image\n|AppMag = 20")
    (folder / "empty.svs").touch()
    (folder / "twin.svs").touch()
    (folder / "twin.ndpi").touch()
    rows = list(inspect_slides(find_slides(folder), TissueConfig(), GridConfig()))
    assert {row.slide: row.problem for row in rows} == {
        "good": "", "glass": "no_tissue", "coarse": "too_coarse", "unknown": "no_mpp", "power": "estimated_mpp",
        "empty": "empty_file", "twin": "duplicate_name",
    }  # fmt: skip
    found = {row.slide: row for row in rows}
    assert len(rows) == 8
    assert [row.slide for row in rows if row.usable] == ["glass", "good", "power"]
    good = found["good"]
    assert (good.width, good.height, good.levels, good.reader) == (2200, 1400, "1 4", "tifffile")
    assert (good.mpp_x, good.mpp_y, good.mpp_source) == (0.5, 0.5, "TIFF resolution")
    assert good.tissue_share is not None
    assert 0.5 < good.tissue_share < 1
    assert good.tiles_20x is not None
    assert good.tiles_20x > 30
    assert good.tiles_5x == 6
    assert (found["glass"].tiles_20x, found["glass"].tissue_share) == (0, 0)
    assert found["power"].objective == 20
    assert found["coarse"].mpp_x == 2  # what is known is shown
    assert all(row.message for row in rows if row.problem)

    text = format_table(rows)
    assert text.splitlines()[0].split()[:2] == ["slide", "size"]
    assert "2200x1400" in text
    assert "no_mpp: unknown: µm/px must be known" in text
    write_csv(tmp_path / "table.csv", rows)
    with (tmp_path / "table.csv").open(newline="") as file:
        back = list(csv.DictReader(file))
    assert [row["slide"] for row in back] == [row.slide for row in rows]
    assert {row["slide"]: row["mpp_source"] for row in back}["good"] == "TIFF resolution"
