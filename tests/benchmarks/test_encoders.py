"""Vectors of several encoders joined: each tile keeps its own."""

from pathlib import Path

import numpy as np

from benchmarks.mil.encoders import join_bags
from engine.features.bag_reader import BagFile
from tests.support.known_cohort import write_slide


def test_a_join_holds_the_vectors_of_each_tile_behind_each_other(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        write_slide(tmp_path / name, "slide", True, False, seed)
    join_bags([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    bags = [BagFile(tmp_path / name / "slide.h5") for name in ("a", "b", "joined")]
    for scale in bags[0].scales:
        first, second, joined = (bag.features(scale) for bag in bags)
        assert not np.array_equal(first, second)
        np.testing.assert_array_equal(joined, np.concatenate([first, second], axis=1))
        np.testing.assert_array_equal(bags[2].coords(scale), bags[0].coords(scale))
