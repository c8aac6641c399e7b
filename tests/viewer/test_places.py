"""What is shown of a path, and that nothing outside of it is."""

from pathlib import Path

import pytest

from engine.core.errors import EngineError
from engine.images.dzi import write_dzi
from engine.viewer.places import OutsideError, item_of, look
from tests.support.known_picture import image_of
from tests.support.known_view import finished_run, run_at_work, slide_file


def names(folder: Path) -> list[tuple[str, str]]:
    return [(item.kind, item.name) for item in look(folder).items]


def test_a_folder_of_runs_slides_and_pictures(tmp_path: Path) -> None:
    finished_run(tmp_path / "cohort" / "a")
    run_at_work(tmp_path / "b")
    slide_file(tmp_path / "slides" / "s.tiff")
    image = image_of(tmp_path / "export.ome.zarr")
    image.build_pyramid()
    write_dzi(tmp_path / "deep.dzi", image)
    assert names(tmp_path) == [
        ("run", "b"), ("run", "cohort/a"), ("dzi", "deep.dzi"), ("picture", "export.ome.zarr"),
        ("slide", "slides/s.tiff"),
    ]  # fmt: skip
    assert names(tmp_path / "b") == [("run", "b")]
    assert names(tmp_path / "slides" / "s.tiff") == [("slide", "s.tiff")]


@pytest.mark.parametrize("name", ["nothing", "empty", "note.txt"])
def test_what_is_no_run_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("text")
    with pytest.raises(EngineError, match=f"{name} must be"):
        look(tmp_path / name)


def test_figures_of_an_extraction_are_no_slides(tmp_path: Path) -> None:
    slide_file(tmp_path / "s.tiff")
    (tmp_path / "features" / "thumbnails").mkdir(parents=True)
    (tmp_path / "features" / "report.json").write_text("{}")
    (tmp_path / "features" / "thumbnails" / "s.jpg").write_bytes(b"\xff\xd8\xff")
    assert names(tmp_path) == [("slide", "s.tiff")]


def test_links_out_of_the_folder_are_left_out_and_said(tmp_path: Path) -> None:
    outside = slide_file(tmp_path / "outside" / "secret.tiff")
    finished_run(tmp_path / "outside" / "run")
    given = tmp_path / "given"
    slide_file(given / "own.tiff")
    (given / "link.tiff").symlink_to(outside)
    (given / "linked").symlink_to(tmp_path / "outside")
    (given / "run").symlink_to(tmp_path / "outside" / "run")
    (given / "inner.tiff").symlink_to(given / "own.tiff")
    found = look(given)
    assert [item.name for item in found.items] == ["inner.tiff", "own.tiff"]
    assert len(found.left_out) == 3
    assert all("link" in line for line in found.left_out)


def test_a_chunk_that_is_a_link_out(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "given" / "run")
    item = item_of(run, "run", run, "run")
    item.hold(run / "image.ome.zarr")
    chunk = run / "image.ome.zarr" / "0" / "c" / "0" / "0" / "1"
    chunk.unlink()
    chunk.symlink_to("/etc/passwd")
    with pytest.raises(OutsideError, match="is a link to /etc/passwd"):
        item.hold(run / "image.ome.zarr")


def test_ids_say_nothing_and_stay(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)> & 'x' \"y\""
    run_at_work(tmp_path / name)
    (first,) = look(tmp_path).items
    (again,) = look(tmp_path).items
    assert first.id == again.id
    assert first.id.isalnum()
    assert first.name == name
