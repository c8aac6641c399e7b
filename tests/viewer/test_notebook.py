"""Run.view(): a frame for notebooks over a server on loopback that ends when it is told to."""

import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import engine
from engine.api.viewing import Viewing
from engine.slides.phantom.render import Phantom
from engine.slides.phantom.slide import write_phantom_slide
from engine.viewer.slides import says_synthetic
from tests.support.known_view import finished_run, slide_file


@pytest.fixture
def viewing(tmp_path: Path) -> Viewing:
    return engine.Run(finished_run(tmp_path / "a 'run'")).view(height=300)


def test_a_frame_that_may_be_shown_in_a_notebook(viewing: Viewing, tmp_path: Path) -> None:
    found = re.search(r'<iframe src="(http://127[.]0[.]0[.]1:[0-9]+/)"', viewing._repr_html_())
    assert found is not None
    assert found[1] == viewing.url
    assert "height:300px" in viewing._repr_html_()
    with urllib.request.urlopen(viewing.url) as answer:
        assert "frame-ancestors 'self' http://127.0.0.1:*" in answer.headers["Content-Security-Policy"]
    assert engine.Run(tmp_path / "a 'run'").view().url == viewing.url
    viewing.stop()
    viewing.stop()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(viewing.url)


def test_phantoms_call_themselves_synthetic(tmp_path: Path) -> None:
    write_phantom_slide(tmp_path / "phantom.tiff", Phantom(0), 512, 512)
    assert says_synthetic(tmp_path / "phantom.tiff")
    assert not says_synthetic(slide_file(tmp_path / "s.tiff"))
    assert not says_synthetic(tmp_path / "nothing")
