"""A prepared set: what is written is read, and whatever is lost or foreign is named."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from engine.core.errors import PreparedError, PreparedMismatchError
from engine.datasets.dataset import PreparedSet
from engine.datasets.schema import SlideFacts
from engine.datasets.writer import PatchPlan, PreparedWriter, open_set
from tests.support.known_prepared import FACTS, write_set, write_slide


def test_examples_are_what_was_written(tmp_path: Path) -> None:
    found = PreparedSet(write_set(tmp_path, images=True))
    assert [found.count(level) for level in range(3)] == [32, 8, 2]
    example = found.example(1, 4 + 2)  # the third 10x patch of the second slide
    assert (example.slide, found.place(1, 6)) == ("slide1", ("slide1", 2, 0))
    assert (example.latent.shape, example.latent.dtype) == ((3, 64, 64), np.float32)
    assert (example.grid.shape, example.grid.dtype) == ((16, 2, 2), np.float32)
    assert np.rint(example.grid.mean(0) / 100).tolist() == [[2, 2], [3, 3]]
    pooled = found.example(2, 0, side=2).grid
    np.testing.assert_allclose(pooled[:, 0, 1], found.example(2, 0).grid[:, :2, 2:].mean((1, 2)), rtol=1e-6)
    assert found.image(0, 31).shape == (256, 256, 3)
    assert found.tissue(0, 0) == 1
    with pytest.raises(IndexError, match="0…7"):
        found.example(1, 8)


def test_a_part_of_the_slides_and_a_copy_in_another_process(tmp_path: Path) -> None:
    found = PreparedSet(write_set(tmp_path), slides=["slide1"])
    assert found.count(0) == 16
    copy = pickle.loads(pickle.dumps(found))
    assert copy.digest == found.digest != PreparedSet(tmp_path).digest
    np.testing.assert_array_equal(copy.example(0, 3).latent, found.example(0, 3).latent)
    with pytest.raises(PreparedError, match="slide7"):
        PreparedSet(tmp_path, ["slide7"])


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    found = PreparedSet(write_set(tmp_path))
    found.require(encoder="demo", magnifications=["20x", "10x", "5x"])
    with pytest.raises(PreparedMismatchError, match=r"encoder_digest is 'e+', not 'f'; magnifications is \('20x'"):
        found.require(encoder_digest="f", magnifications=("20x", "10x"))


def test_an_empty_magnification_is_refused_when_it_is_needed(tmp_path: Path) -> None:
    open_set(tmp_path, FACTS)
    write_slide(tmp_path, FACTS, "a", {"20x": [(0, 0)], "10x": []})
    found = PreparedSet(tmp_path)
    assert (found.count(0), found.count(1), found.count(2)) == (1, 0, 0)
    found.require_patches(0)
    with pytest.raises(PreparedError, match="patches at 5x.*weight 0"):
        found.require_patches(2)


def spoil(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "garbled":
        path.write_bytes(b"no numpy file at all")
    elif how == "shape":
        np.save(path, np.load(path)[:, :-1])
    else:
        np.save(path, np.load(path).astype(np.float64))


@pytest.mark.parametrize("how", ["missing", "short", "garbled", "shape", "type"])
@pytest.mark.parametrize("name", ["cells.npy", "10x/latents.npy", "20x/places.npy", "5x/images.npy"])
def test_what_is_lost_is_named_on_opening(tmp_path: Path, name: str, how: str) -> None:
    folder = write_set(tmp_path, images=True)
    path = folder / "slides" / "slide1" / name
    spoil(path, how)
    with pytest.raises(PreparedError, match=str(path)):
        PreparedSet(folder)


@pytest.mark.parametrize("name", ["dataset.json", "slides/slide0/slide.json"])
def test_damaged_records_are_named(tmp_path: Path, name: str) -> None:
    path = write_set(tmp_path) / name
    good = json.loads(path.read_text())
    for bad in ("{", "[]", json.dumps({**good, "what": 1})):
        path.write_text(bad)
        with pytest.raises(PreparedError, match=str(path)):
            PreparedSet(tmp_path)
    path.unlink()
    if name == "dataset.json":
        with pytest.raises(PreparedError, match="missing"):
            PreparedSet(tmp_path)
        path.write_text(json.dumps({**good, "version": 7}))
        with pytest.raises(PreparedError, match="version 1"):
            PreparedSet(tmp_path)
    else:
        assert PreparedSet(tmp_path).slides == ("slide1",)  # it counts as not finished
        with pytest.raises(PreparedError, match="must hold a whole slide"):
            PreparedSet(tmp_path, [])


@pytest.mark.parametrize("name", ["cells.npy", "20x/latents.npy"])
def test_nan_is_never_returned(tmp_path: Path, name: str) -> None:
    path = write_set(tmp_path) / "slides" / "slide0" / name
    values = np.load(path, mmap_mode="r+")
    values[0] = np.nan
    found = PreparedSet(tmp_path)
    with pytest.raises(PreparedError, match="patch 0"):
        found.example(0, 0)
    assert np.isfinite(found.example(0, 15).latent).all()


def begin(folder: Path, places: list[tuple[int, int]]) -> PreparedWriter:
    facts = SlideFacts("a", "a.tif", (1024, 1024), (0.5, 0.5), "test", "s" * 64, (4, 4), {})
    at = {"20x": np.array(places, np.int32)}
    plan = PatchPlan(np.ones((4, 4), np.bool_), at, {"20x": np.ones(len(places), np.float32)})
    return PreparedWriter(folder, FACTS, facts, plan)


def test_written_blocks_survive_and_another_plan_begins_anew(tmp_path: Path) -> None:
    open_set(tmp_path, FACTS)
    first = begin(tmp_path, [(0, 0), (0, 1)])
    first.write(5, patches=("20x", 1, {"latents": np.ones((1, 3, 64, 64))}))
    with (tmp_path / "slides" / "a" / "journal").open("a") as journal:
        journal.write("1")  # torn: the kill came while 12 was written
    second = begin(tmp_path, [(0, 0), (0, 1)])
    assert second.done == {5}
    second.write(0, cells=(np.argwhere(np.ones((4, 4))), np.ones((16, 16))))
    second.write(1, patches=("20x", 0, {"latents": np.zeros((1, 3, 64, 64))}))
    assert begin(tmp_path, [(0, 0), (0, 1)]).done >= {5, 0}
    second.finish()
    found = PreparedSet(tmp_path)
    assert [float(found.example(0, i).latent.mean()) for i in range(2)] == [0, 1]
    assert begin(tmp_path, [(0, 0)]).done == set()


def test_damaged_patches_and_those_over_damaged_cells_are_left_out(tmp_path: Path) -> None:
    open_set(tmp_path, FACTS)
    writer = begin(tmp_path, [(0, 0), (0, 1), (3, 3)])
    vectors, latents = np.ones((16, 16)), np.ones((3, 3, 64, 64))
    vectors[1], latents[2] = np.nan, np.nan
    writer.write(0, (np.argwhere(np.ones((4, 4))), vectors), ("20x", 0, {"latents": latents}))
    facts = writer.finish()
    assert (facts.counts, facts.dropped) == ({"20x": 1}, {"20x": 2})
    found = PreparedSet(tmp_path)
    assert found.place(0, 0) == ("a", 0, 0)
    assert found.count(0) == 1


def test_what_no_network_returns_is_refused(tmp_path: Path) -> None:
    open_set(tmp_path, FACTS)
    writer = begin(tmp_path, [(0, 0)])
    latents = np.ones((1, 3, 64, 64))
    latents[0, 0, 0, 0] = np.nan
    for bad in (latents, np.full((1, 3, 64, 64), 1e5), np.ones((1, 4, 64, 64))):
        with pytest.raises(PreparedError, match=r"latents.npy"):
            writer.write(0, patches=("20x", 0, {"latents": bad}))
    with pytest.raises(PreparedError, match="row"):
        writer.write(0, patches=("20x", 1, {"latents": np.ones((1, 3, 64, 64))}))
    assert writer.done == set()
    for name in ("..", "a/b", ""):
        with pytest.raises(PreparedError, match="name"):
            write_slide(tmp_path, FACTS, name, {})
    with pytest.raises(PreparedMismatchError, match="ssl_dim"):
        open_set(tmp_path, type(FACTS)(**{**FACTS.__dict__, "ssl_dim": 3}))
