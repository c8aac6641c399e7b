"""Bags without pictures: what they cost, what they say, that they are the same however they are made."""

from pathlib import Path

import numpy as np
import pytest

from engine.cohort.bags import COARSE_FIRST, BagMaker
from engine.cohort.output import Record
from engine.cohort.run import make_alone, make_cohort, rows_of
from engine.cohort.sources import open_reference
from engine.cohort.table import Row
from engine.conditions.patch_sampler import PatchSampler
from engine.core.progress import Progress
from engine.features.bag_reader import BagFile
from engine.features.bag_writer import BagWriter
from engine.generation.run import describe
from tests.support.known_cohort_job import BAGS, job, read_csv, write_inputs

CELLS = np.random.default_rng(0).normal(size=(16, 5, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bags")
    write_inputs(folder)
    np.save(folder / "cells.npy", CELLS)
    return folder


def rows(inputs: Path) -> list[dict[str, object]]:
    return [
        {"name": "of_slide", "reference": "s0", "label": "a", "source_patient": "P0"},
        {"name": "of_vectors", "embeddings": str(inputs / "cells.npy"), "label": "b", "source_patient": "P1"},
        {"name": "of_nothing", "label": "b", "source_patient": "P1"},
    ]


def make(inputs: Path, out: Path, **more: object) -> dict[str, Record]:
    config = job(inputs, out, rows(inputs), **(BAGS | more))
    return {record.name: record for record in make_cohort(config, make_alone, Progress())}


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    records = make(inputs, out)
    assert [r.reason for r in records.values()] == ["", "", "no_conditions"]
    return out


def test_a_bag_says_what_it_is_and_costs_its_tiles(made: Path) -> None:
    with BagFile(made / "features/of_slide.h5") as bag:
        about, scales = bag.attributes, [bag.shape(name) for name in bag.scales]
        assert (about.synthetic, about.source_patient, about.source_slide) == (True, "P0", "s0")
        assert bag.scales == ("20x", "5x")
        assert scales[0] == (6, 120)
        assert all(bag.valid("20x"))
        parents, fine = bag.coords("5x")[bag.parent("20x")], bag.coords("20x")
        assert ((fine - parents >= 0) & (fine - parents < 1024)).all(), "each tile lies in its parent"
    drawn = {row["name"]: row for row in read_csv(made / "cohort.csv")}
    assert drawn["of_slide"]["file"] == "features/of_slide.h5"
    assert {row["slide"]: row["label"] for row in read_csv(made / "labels.csv")} == {"of_slide": "a", "of_vectors": "b"}
    assert not (made / "pictures").exists()


def test_patches_are_drawn_once_each(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """N tiles of both scales cost N patches, but for the last batch of each scale, which is filled up."""
    seen: list[tuple[int, int]] = []
    real = PatchSampler.draw

    def counted(self: PatchSampler, model, cells, magnification, first=0, pictures=None):  # noqa: ANN001, ANN202
        assert pictures is None, "bags.strength 1 begins from noise"
        seen.append((first, len(cells)))
        return real(self, model, cells, magnification, first, pictures)

    monkeypatch.setattr(PatchSampler, "draw", counted)
    records = make(inputs, tmp_path / "out")
    with BagFile(tmp_path / "out/features/of_slide.h5") as bag:
        tiles = sum(bag.shape(name)[0] for name in bag.scales)
    assert records["of_slide"].patches == tiles
    fine = [first for first, _ in seen if first < COARSE_FIRST]
    assert fine == [0, 2, 4] * 2, "six tiles of each bag, in batches of two"


def test_each_tile_is_drawn_on_its_own_vector(inputs: Path) -> None:
    """Stored vectors: the fine tile at (x, y) has that cell's vector, its parent the 4×4 around it."""
    config = job(inputs, inputs / "unused", rows(inputs), **(BAGS | {"bags.tiles": 30}))
    maker = BagMaker(config)
    row = next(row for row in rows_of(config, describe(config.model)) if row.name == "of_vectors")
    assert isinstance(row, Row)
    tiles = maker._tiles(row)
    assert len(tiles.coords) == 30
    for coords, vector in zip(tiles.coords, tiles.own, strict=True):
        x, y = coords // 256
        assert np.array_equal(vector[:, 0, 0], CELLS[:, y, x])
    corner = np.flatnonzero((tiles.parent_coords == 0).all(axis=1))[0]
    assert np.array_equal(tiles.vectors[corner], CELLS[:, :4, :4])


def test_the_source_slide_decides_what_is_drawn_and_the_seed_varies_it(
    inputs: Path, made: Path, tmp_path: Path
) -> None:
    with BagFile(made / "features/of_slide.h5") as bag:
        before, coords = bag.features("20x"), bag.coords("20x")
    config = job(inputs, tmp_path / "out", [rows(inputs)[0] | {"seed": 5}], **BAGS)
    make_cohort(config, make_alone, Progress())
    with BagFile(tmp_path / "out/features/of_slide.h5") as bag:
        assert not np.array_equal(bag.features("20x"), before)
        assert coords.shape == bag.coords("20x").shape


def test_weak_variations_begin_from_the_tiles_of_their_source(
    inputs: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    real = PatchSampler.draw

    def noted(self: PatchSampler, model, cells, magnification, first=0, pictures=None):  # noqa: ANN001, ANN202
        seen.extend(pictures)
        return real(self, model, cells, magnification, first, pictures)

    monkeypatch.setattr(PatchSampler, "draw", noted)
    config = job(inputs, tmp_path / "out", rows(inputs)[:1], **(BAGS | {"bags.strength": 0.5}))
    assert make_cohort(config, make_alone, Progress())[0].reason == ""
    row = next(row for row in rows_of(config, describe(config.model)) if isinstance(row, Row))
    assert row.reference is not None
    slide = open_reference(row.reference, config, config.grid.mpp)
    with BagFile(tmp_path / "out/features/of_slide.h5") as bag, BagFile(made / "features/of_slide.h5") as other:
        fine, coarse = (bag.coords(scale) for scale in bag.scales)
        assert not np.array_equal(bag.features("20x"), other.features("20x"))
    for (x, y), picture in zip(fine, seen, strict=False):
        own = slide.read(float(x), float(y), 256, 256, 0.5).pixels.transpose(2, 0, 1)
        np.testing.assert_allclose((picture + 1) * 127.5, own, atol=1e-3)
    x, y = map(float, coarse[0])
    wide = slide.read(x, y, 1024, 1024, 0.5).pixels.reshape(256, 4, 256, 4, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose((seen[6] + 1) * 127.5, wide, atol=0.51)


def test_stored_vectors_have_no_tile_to_begin_from(inputs: Path, tmp_path: Path) -> None:
    records = make(inputs, tmp_path / "out", **{"bags.strength": 0.5})
    assert (records["of_slide"].reason, records["of_vectors"].reason) == ("", "no_pixels")


class Killed(BaseException):
    """What ends a process at once."""


def test_a_killed_bag_goes_on_to_the_same_bytes(
    inputs: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = BagWriter.write, []

    def dies(self: BagWriter, *more: object) -> None:
        calls.append(more)
        if len(calls) == 3:
            raise Killed
        real(self, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(BagWriter, "write", dies)
    with pytest.raises(Killed):
        make(inputs, tmp_path / "out")
    monkeypatch.setattr(BagWriter, "write", real)
    records = make(inputs, tmp_path / "out")
    assert records["of_slide"].patches is not None
    assert 0 < records["of_slide"].patches < 7, "what was written is not drawn again"
    for name in ("of_slide", "of_vectors"):
        file = f"features/{name}.h5"
        assert (tmp_path / "out" / file).read_bytes() == (made / file).read_bytes(), name


def test_fewer_tiles_than_asked_for_are_said(inputs: Path, tmp_path: Path) -> None:
    records = make(inputs, tmp_path / "out", **{"bags.tiles": 20})
    assert (records["of_slide"].status, records["of_slide"].reason) == ("done", "fewer_tiles")
    assert "16" in records["of_slide"].message
    assert records["of_vectors"].reason == ""


def test_bags_of_the_model_itself(inputs: Path, tmp_path: Path) -> None:
    """The U-Net's features at both scales; its own conditions at 5x are those the tile was drawn on."""
    more = {"bags.encoders": ["zoomldm"], "features.blocks": ["up.1"], "features.condition": "own", "bags.tiles": 2}
    records = make(inputs, tmp_path / "out", **more)
    assert records["of_slide"].status == "done", records["of_slide"]
    with BagFile(tmp_path / "out/features/of_slide.h5") as bag:
        assert bag.attributes.condition == "own"
        assert np.isfinite(bag.features("5x")).all()


def test_a_region_without_tiles_fails_alone(inputs: Path, tmp_path: Path) -> None:
    table = [row | ({"region": "0,0,100,100"} if row["name"] == "of_slide" else {}) for row in rows(inputs)[:2]]
    records = make_cohort(job(inputs, tmp_path / "out", table, **BAGS), make_alone, Progress())
    assert [(r.status, r.reason) for r in records] == [("failed", "no_tiles"), ("done", "")]
