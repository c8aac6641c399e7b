"""Linked folders are looked through once; what is not looked through is named."""

import os
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from engine.core.errors import EngineError
from engine.evaluation.samples.sets import open_pictures
from engine.features.config import ExtractConfig
from engine.pipeline.run import slides_of
from engine.slides.slide import find_slides


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_slides(folder)]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder of slides, and one elsewhere."""
    touch(tmp_path / "elsewhere" / "case" / "b.tif")
    touch(tmp_path / "slides" / "a.tif")
    return tmp_path / "slides"


def test_linked_folders_are_followed(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "case_A").symlink_to(here.parent / "elsewhere" / "case")
    (here / "c.tif").symlink_to(here / "case_A" / "b.tif")
    touch(here.parent / "far" / "d.svs")
    (here.parent / "elsewhere" / "case" / "further").symlink_to(here.parent / "far")  # a link in a linked folder
    assert names(here) == ["a.tif", "case_A/b.tif", "c.tif", "case_A/further/d.svs"]
    assert not caplog.messages


def test_each_real_folder_once_under_its_own_name(here: Path) -> None:
    """Links sort before and behind what they lead to; two lead to one folder; some lead in a circle."""
    touch(here / "m" / "e.tif")
    for link, to in (("b", "m"), ("z", "m"), ("m/up", "."), ("m/self", "m")):
        (here / link).symlink_to(here / to)
    (here / "one").symlink_to(here.parent / "elsewhere")
    (here / "two").symlink_to(here.parent / "elsewhere")
    (here.parent / "elsewhere" / "back").symlink_to(here)
    assert names(here) == ["a.tif", "one/case/b.tif", "m/e.tif"]


def test_what_is_not_looked_through_is_named(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "gone").symlink_to(here.parent / "nowhere")
    (here / "loop").symlink_to(here / "loop")
    (here / "top").symlink_to(here.parent)  # all of it again, and the elsewhere that nobody asked for
    assert names(here) == ["a.tif"]
    told = sorted(message.removeprefix(f"left out: {here}/") for message in caplog.messages)
    assert told[0] == f"gone: a link to {here.parent}/nowhere, which is not there"
    assert told[1].startswith("loop: ")
    assert told[2] == f"top: a link to a folder that holds {here} itself"
    (here / "a.tif").unlink()
    with pytest.raises(EngineError, match=r"it holds none\. Check the path\. Left out: .*gone: a link to"):
        find_slides(here)


def test_a_folder_that_may_not_be_read_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        Path(name).chmod(0o755)
        touch(Path(name) / "a.tif")
        touch(Path(name) / "closed" / "b.tif").parent.chmod(0)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)  # root reads everything
        try:
            assert names(Path(name)) == ["a.tif"]
        finally:
            os.seteuid(me)
            (Path(name) / "closed").chmod(0o755)
        assert caplog.messages == [f"left out: {name}/closed: Permission denied"]


def test_the_run_below_a_linked_folder_is_no_slide(here: Path) -> None:
    """Thumbnails of an earlier run are pictures; they are left out under whatever name the folder is given."""
    touch(here / "out" / "thumbnails" / "a.jpg")
    link = here.parent / "link"
    link.symlink_to(here)
    for slides, out in ((link, here / "out"), (here, link / "out"), (link, link / "out")):
        assert [p.name for p in slides_of(ExtractConfig(str(slides), str(out)))] == ["a.tif"]
        assert slides_of(ExtractConfig(str(slides), str(out)))[0].parent == slides


def test_sets_of_pictures_follow_links_too(here: Path) -> None:
    Image.new("RGB", (300, 300)).save(here.parent / "elsewhere" / "case" / "p.png")
    (here / "case_A").symlink_to(here.parent / "elsewhere" / "case")
    (here / "gone").symlink_to(here.parent / "nowhere")
    found = open_pictures(here, mpp=0.5)
    assert [source.name for source in found.sources] == ["p"]
    assert sorted(u.code for u in found.unusable) == ["empty_file", "empty_file", "left_out"]
