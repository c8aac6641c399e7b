"""Bags come joined, sampled by (seed, epoch, bag), padded, and within the cache's limit."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from engine.core.errors import BagError
from engine.features.bag_writer import write_bag
from mil.data.dataset import ArrayBag, BagCache, StoredBag, as_bags, batches, collate, epoch_order, sample_rows
from mil.errors import CohortError
from tests.support.known_bag import known_features, known_plan


@pytest.fixture
def bag_file(tmp_path: Path) -> Path:
    plan = known_plan()
    return write_bag(tmp_path / "S-01.h5", plan, known_features(plan))


def test_instances_are_joined_with_their_parents(bag_file: Path) -> None:
    array = StoredBag(bag_file, ("20x", "5x"), (4, 4), BagCache(0)).read()
    features = known_features(known_plan())
    np.testing.assert_array_equal(array[:, :4], features["20x"])
    np.testing.assert_array_equal(array[:, 4:], np.repeat(features["5x"], 16, axis=0))
    coarse = StoredBag(bag_file, ("5x",), (4,), BagCache(0)).read()
    np.testing.assert_array_equal(coarse, features["5x"])


def test_the_cache_keeps_its_limit(bag_file: Path) -> None:
    cache = BagCache(4 * 48 * 8 + 10)
    joined = StoredBag(bag_file, ("20x", "5x"), (4, 4), cache)
    coarse = StoredBag(bag_file, ("5x",), (4,), cache)
    assert joined.read() is joined.read()
    assert coarse.read() is not coarse.read()  # no room
    assert cache.held_bytes == 4 * 48 * 8
    assert pickle.loads(pickle.dumps(cache)).held_bytes == 0


def test_nan_in_a_readable_tile_is_named(bag_file: Path) -> None:
    with h5py.File(bag_file, "r+") as file:
        file["20x/features"][7, 1] = np.nan  # type: ignore[index]
    with pytest.raises(BagError, match=r"S-01.h5.*1 of 48 rows.*row 7"):
        StoredBag(bag_file, ("20x",), (4,), BagCache(0)).read()


def test_a_file_that_changed_is_refused(bag_file: Path) -> None:
    with pytest.raises(BagError, match="changed"):
        StoredBag(bag_file, ("20x",), (9,), BagCache(0)).read()


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 3), int), np.full((2, 3), np.inf)])
def test_arrays_that_are_no_bags(array: np.ndarray) -> None:
    with pytest.raises((CohortError, BagError), match="bag 0"):
        as_bags([array])


def test_mixed_widths_are_named() -> None:
    with pytest.raises(CohortError, match="bag 1"):
        as_bags([np.zeros((2, 3)), np.zeros((2, 4))])


def test_sampling_is_a_function_of_its_arguments() -> None:
    rows = [
        sample_rows(1000, 20, seed, epoch, bag) for seed, epoch, bag in ((0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert all(r is not None and len(set(r.tolist())) == 20 and (np.diff(r) > 0).all() for r in rows)
    same = [np.array_equal(rows[0], r) for r in rows]  # type: ignore[arg-type]
    assert same == [True, True, False, False]
    assert sample_rows(20, 20, 0, 0, 0) is None
    assert sorted(epoch_order(9, 1, 2)) == list(range(9))


def test_batches_are_padded_and_in_order() -> None:
    bags = as_bags([np.full((n, 2), n, np.float16) for n in (1, 5, 3, 8, 2)])
    found = list(batches(bags, [[0, 1], [2], [3, 4]], limit=4))
    assert [b.index.tolist() for b in found] == [[0, 1], [2], [3, 4]]
    assert [tuple(b.x.shape) for b in found] == [(2, 4, 2), (1, 3, 2), (2, 4, 2)]
    assert found[0].mask.sum(dim=1).tolist() == [1, 4]
    assert found[0].x.dtype == torch.float32
    assert (found[2].x[1] == torch.tensor([[2.0, 2], [2, 2], [0, 0], [0, 0]])).all()


def test_an_empty_bag_has_no_batch() -> None:
    with pytest.raises(CohortError, match="bag number 3"):
        collate([np.zeros((2, 2)), np.zeros((0, 2))], [1, 3])


def test_a_failing_read_stops_the_epoch(tmp_path: Path) -> None:
    bags = [ArrayBag(np.zeros((2, 2))), StoredBag(tmp_path / "none.h5", ("20x",), (2,), BagCache(0))]
    with pytest.raises(BagError, match="none.h5"):
        list(batches(bags, [[0], [1]]))
