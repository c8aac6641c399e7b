"""Every kind of file is read right or refused by name, as the table of docs/reference/slide_files.md says."""

from pathlib import Path

import numpy as np
import openslide
import pytest

from engine.core.errors import SlideError
from engine.slides.slide import open_slide
from tests.slides.file_kinds import ESTIMATED, KINDS, MASKED, READ, REAL_FILES, TRUE, Kind, RealFile


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
def test_a_kind_of_file(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / kind.name
    kind.write(path)
    if kind.outcome not in (READ, ESTIMATED, MASKED):
        with pytest.raises(SlideError) as refused:
            open_slide(path)
        assert refused.value.code == kind.outcome, str(refused.value)
        return
    with open_slide(path) as slide:
        assert slide.resolution.mpp_x == pytest.approx(kind.mpp)
        assert slide.resolution.estimated == (kind.outcome == ESTIMATED)
        window = slide.read(0, 0, slide.width, slide.height, slide.resolution.mpp)
    assert window.pixels.shape == TRUE.shape
    assert np.abs(window.pixels.astype(int) - TRUE).mean() <= kind.error
    assert bool(window.damaged) == (kind.outcome == MASKED)


@pytest.mark.parametrize("file", REAL_FILES, ids=lambda file: file.title)
def test_a_real_file(tmp_path: Path, file: RealFile) -> None:
    if not file.archive.is_file():
        pytest.skip(f"{file.archive.name} is not there; `make test` fetches it where there is a network")
    path = file.extract(tmp_path)
    if file.mpp is None:
        with pytest.raises(SlideError) as refused:
            open_slide(path)
        assert refused.value.code == file.outcome, str(refused.value)
        return
    with open_slide(path) as slide:
        assert slide.resolution.mpp_x == pytest.approx(file.mpp)
        window = slide.read(0, 0, slide.width, slide.height, slide.resolution.mpp)
    assert bool(window.damaged) == (file.outcome == MASKED)
    if file.outcome == READ:
        with openslide.open_slide(path) as reader:
            region = np.asarray(reader.read_region((0, 0), 0, reader.dimensions))
        np.testing.assert_array_equal(window.pixels, region[..., :3])
