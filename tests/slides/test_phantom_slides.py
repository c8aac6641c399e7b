"""The folder of synthetic slides: which tissue a slide shows, and what is wrong usage."""

from pathlib import Path

import pytest
import tifffile

from engine.phantom_slides import main
from engine.slides.phantom.folder import PhantomSlidesConfig, write_slides
from engine.slides.phantom.render import Phantom
from engine.slides.phantom.slide import write_phantom_slide


@pytest.mark.parametrize("varied", [False, True])
def test_a_slide_shows_the_phantom_of_its_seed(tmp_path: Path, varied: bool) -> None:
    config = PhantomSlidesConfig(str(tmp_path / "slides"), 2, 300, 256, seed=3, varied=varied, pen_every=0)
    paths = write_slides(config)
    assert [path.name for path in paths] == ["phantom_003.tiff", "phantom_004.tiff"]
    expected = Phantom.varied(4) if varied else Phantom(4)
    write_phantom_slide(tmp_path / "expected.tiff", expected, 300, 256)
    assert (tifffile.imread(paths[1], key=0) == tifffile.imread(tmp_path / "expected.tiff", key=0)).all()
    knobs = {(p.pleomorphism, p.architecture) for p in map(Phantom.varied, range(20))}
    assert len(knobs) == 20


def test_pen_marks_come_as_often_as_asked(tmp_path: Path) -> None:
    plain, marked = (
        write_slides(PhantomSlidesConfig(str(tmp_path / str(every)), 2, 512, 512, pen_every=every)) for every in (0, 2)
    )
    same = [(tifffile.imread(a, key=0) == tifffile.imread(b, key=0)).all() for a, b in zip(plain, marked, strict=True)]
    assert same == [True, False]


def test_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main([f"--out={tmp_path}", "--pen_every=-1"])
    assert stop.value.code == 2
