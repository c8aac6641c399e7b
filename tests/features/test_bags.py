"""Bags: what is written is read, blocks survive, and what is damaged, foreign or misnamed is refused."""

import os
import pickle
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from engine.core.errors import BagError, BagMismatchError, CanvasError
from engine.features.bag_reader import BagFile, BagPlan, bag_path, bag_paths, find_bags, is_finished
from engine.features.bag_writer import BagWriter, write_bag
from tests.support.known_bag import known_features, known_plan


def write_blocks(writer: BagWriter, plan: BagPlan, sizes: int, order: random.Random) -> None:
    """Write all that is missing in blocks of `sizes` rows, in a random order."""
    features = known_features(plan)
    blocks = [
        (scale.name, at, min(at + sizes, stop))
        for scale in plan.scales
        for start, stop in writer.missing(scale.name)
        for at in range(start, stop, sizes)
    ]
    order.shuffle(blocks)
    for name, start, stop in blocks:
        writer.write(name, start, features[name][start:stop])


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    plan = known_plan()
    features = known_features(plan)
    with BagFile(write_bag(tmp_path / "S-01.h5", plan, features)) as bag:
        assert bag.attributes == plan.attributes
        assert bag.scales == ("20x", "5x")
        assert bag.shape("20x") == (48, 4)
        for scale in plan.scales:
            np.testing.assert_array_equal(bag.features(scale.name), features[scale.name])
            np.testing.assert_array_equal(bag.coords(scale.name), scale.coords)
            assert bag.valid(scale.name).all()
        np.testing.assert_array_equal(bag.parent("20x"), plan.scales[0].parent)
        assert bag.features("20x").dtype == np.float32
        assert bag.scale_of("20x").tile_level0_px == (512.0, 512.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["S-01.h5"]
    assert is_finished(tmp_path / "S-01.h5", plan)


def test_the_names_on_disk(tmp_path: Path) -> None:
    with h5py.File(write_bag(tmp_path / "a.h5", known_plan(), known_features(known_plan()))) as file:
        types = [np.asarray(file[f"20x/{name}"]).dtype for name in ("features", "coords", "parent", "valid")]
        assert types == [np.float32, np.int64, np.int64, np.uint8]
        assert "5x/parent" not in file
        assert (file.attrs["synthetic"], file.attrs["mpp_source"], file.attrs["timestep"]) == (True, "openslide", 100)


def test_rows_are_read_lazily_and_in_any_order(tmp_path: Path) -> None:
    plan = known_plan()
    features = known_features(plan)["20x"]
    bag: BagFile = pickle.loads(pickle.dumps(BagFile(write_bag(tmp_path / "a.h5", plan, known_features(plan)))))
    with bag:
        np.testing.assert_array_equal(bag.features("20x", slice(5, 9)), features[5:9])
        np.testing.assert_array_equal(bag.features("20x", np.array([7, 1, 7])), features[[7, 1, 7]])
        assert bag.features("20x", np.array([], int)).shape == (0, 4)
        with pytest.raises(BagError, match="holds 20x, 5x; got '10x'"):
            bag.features("10x")
        with pytest.raises(BagError, match="coarsest"):
            bag.parent("5x")


def test_a_slide_without_tissue_is_a_valid_bag(tmp_path: Path) -> None:
    plan = known_plan(parents=0)
    with BagFile(write_bag(tmp_path / "a.h5", plan, known_features(plan))) as bag:
        assert bag.features("20x").shape == bag.features("5x").shape == (0, 4)
        assert bag.coords("20x").shape == (0, 2)
        assert bag.parent("20x").shape == (0,)


def test_unreadable_tiles_are_nan_and_marked(tmp_path: Path) -> None:
    plan = known_plan(parents=1)
    valid = np.ones(16, np.uint8)
    valid[3] = 0
    features = known_features(plan)
    with BagFile(write_bag(tmp_path / "a.h5", plan, features, {"20x": valid})) as bag:
        assert np.isnan(bag.features("20x")[3]).all()
        np.testing.assert_array_equal(bag.valid("20x"), valid.astype(bool))
        np.testing.assert_array_equal(bag.features("20x")[4:], features["20x"][4:])


@pytest.mark.parametrize("size", [1, 5, 48])
def test_the_bytes_do_not_depend_on_blocks_or_their_order(tmp_path: Path, size: int) -> None:
    plan = known_plan()
    whole = write_bag(tmp_path / "whole.h5", plan, known_features(plan)).read_bytes()
    writer = BagWriter(tmp_path / "S-01.h5", plan)
    write_blocks(writer, plan, size, random.Random(size))
    assert writer.finish().read_bytes() == whole


def test_blocks_that_overlap_are_joined(tmp_path: Path) -> None:
    plan = known_plan()
    features = known_features(plan)
    writer = BagWriter(tmp_path / "a.h5", plan)
    for start, stop in ((0, 20), (4, 10), (18, 48)):
        writer.write("20x", start, features["20x"][start:stop])
    writer.write("5x", 0, features["5x"])
    with BagFile(writer.finish()) as bag:
        np.testing.assert_array_equal(bag.features("20x"), features["20x"])


def test_a_second_writer_continues_and_only_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    plan = known_plan()
    features = known_features(plan)
    first = BagWriter(tmp_path / "a.h5", plan)
    first.write("20x", 16, features["20x"][16:30])
    first.write("5x", 0, features["5x"])
    second = BagWriter(tmp_path / "a.h5", known_plan(code_version="0.2.0"))
    assert second.missing("20x") == [(0, 16), (30, 48)]
    assert second.missing("5x") == []
    with pytest.raises(BagError, match="2 ranges are missing, the first is 0 to 16"):
        second.finish()
    write_blocks(second, plan, 7, random.Random(1))
    with BagFile(second.finish()) as bag:
        np.testing.assert_array_equal(bag.features("20x"), features["20x"])


KILLED = """
import sys, numpy as np
from pathlib import Path
from engine.features.bag_writer import BagWriter
from tests.support.known_bag import known_features, known_plan
plan = known_plan(parents=200)
writer = BagWriter(Path(sys.argv[1]), plan)
features = known_features(plan)["20x"]
for start in range(0, len(features), 8):
    writer.write("20x", start, features[start:start + 8])
    print(start + 8, flush=True)
"""


def test_a_kill_loses_at_most_the_block_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(12)][-1]
        os.kill(process.pid, signal.SIGKILL)
    plan = known_plan(parents=200)
    writer = BagWriter(path, plan)
    assert not path.exists()
    assert not is_finished(path, plan)
    assert writer.missing("20x")[0][0] >= said
    write_blocks(writer, plan, 500, random.Random(0))
    with BagFile(writer.finish()) as bag:
        np.testing.assert_array_equal(bag.features("20x"), known_features(plan)["20x"])


def test_a_block_that_lost_its_end_is_asked_for_again(tmp_path: Path) -> None:
    plan = known_plan()
    writer = BagWriter(tmp_path / "a.h5", plan)
    writer.write("20x", 0, known_features(plan)["20x"])
    block = next(writer.folder.glob("*.npy"))
    os.truncate(block, block.stat().st_size - 1)
    assert writer.missing("20x") == [(0, 48)]


def test_a_file_cut_in_half_is_found_and_redone(tmp_path: Path) -> None:
    plan = known_plan()
    path = write_bag(tmp_path / "a.h5", plan, known_features(plan))
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    with pytest.raises(BagError, match="it is damaged"):
        BagFile(path)
    assert not is_finished(path, plan)
    assert write_bag(path, plan, known_features(plan)).read_bytes() == whole
    assert is_finished(path, plan)


def test_a_flipped_bit_is_not_a_feature(tmp_path: Path) -> None:
    plan = known_plan()
    path = write_bag(tmp_path / "a.h5", plan, known_features(plan))
    whole = bytearray(path.read_bytes())
    at = whole.index(known_features(plan)["20x"].tobytes())
    whole[at + 3] ^= 1
    path.write_bytes(whole)
    with BagFile(path) as bag, pytest.raises(BagError, match="damaged"):
        bag.features("20x")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    writer = BagWriter(tmp_path / "a.h5", known_plan())
    features = np.zeros((4, 4), np.float32)
    features[2, 1] = value
    with pytest.raises(BagError, match="must be finite in float32; row 12 is not"):
        writer.write("20x", 10, features)
    writer.write("20x", 10, features, np.array([1, 1, 0, 1]))


def test_float16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    plan = known_plan(dtype="float16")
    writer = BagWriter(tmp_path / "a.h5", plan)
    with pytest.raises(BagError, match="finite in float16; row 0 is not"):
        writer.write("20x", 0, np.full((1, 4), 1e5, np.float32))
    path = write_bag(tmp_path / "b.h5", plan, known_features(plan))
    with BagFile(path) as bag:
        assert bag.features("5x").dtype == np.float16
        assert bag.plan().dtype == "float16"


@pytest.mark.parametrize(
    ("start", "shape"),
    [(0, (4, 5)), (46, (3, 4)), (-1, (3, 4)), (0, (4,))],
)
def test_a_wrong_width_or_place_is_refused(tmp_path: Path, start: int, shape: tuple[int, ...]) -> None:
    writer = BagWriter(tmp_path / "a.h5", known_plan())
    with pytest.raises(BagError, match=r"must be \(n, 4\) within 48 rows"):
        writer.write("20x", start, np.zeros(shape, np.float32))


def test_another_plan_is_refused_and_named(tmp_path: Path) -> None:
    path, plan = tmp_path / "a.h5", known_plan()
    BagWriter(path, plan).write("5x", 0, known_features(plan)["5x"])
    with pytest.raises(BagMismatchError, match="timestep was 100, now 200"):
        BagWriter(path, known_plan(timestep=200))
    with pytest.raises(BagMismatchError, match="scales was"):
        BagWriter(path, known_plan(parents=2))
    write_bag(path, plan, known_features(plan))
    with pytest.raises(BagMismatchError, match="block was 'up.1', now 'mid'"):
        is_finished(path, known_plan(block="mid"))
    with pytest.raises(BagMismatchError, match="20x had 48 tiles, now 32"):
        is_finished(path, known_plan(parents=2))
    assert is_finished(path, known_plan(code_version="0.9.0"))


def test_a_foreign_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((3, 4))
    with pytest.raises(BagMismatchError, match="its version is None"):
        is_finished(path, known_plan())


def test_a_bag_that_lost_an_attribute_is_damaged(tmp_path: Path) -> None:
    plan = known_plan()
    path = write_bag(tmp_path / "a.h5", plan, known_features(plan))
    with h5py.File(path, "a") as file:
        del file["20x"].attrs["mpp"]
    assert not is_finished(path, plan)
    with h5py.File(path, "a") as file:
        del file.attrs["mpp_x"]
    with pytest.raises(BagError, match="damaged"):
        BagFile(path)


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/b", "..", ".hidden", "", "a\0b", "a\nb", "x" * 201])
def test_a_name_that_would_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BagError, match="a slide's name must"):
        bag_path(tmp_path, name)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    (tmp_path / "precious").write_text("mine")
    (folder / "a.h5").symlink_to(tmp_path / "precious")
    with pytest.raises(BagError, match="it is a link"):
        bag_path(folder, "a")
    assert bag_path(folder, "TCGA-A1.v2") == folder / "TCGA-A1.v2.h5"


def test_two_slides_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="b comes more than once"):
        bag_paths(tmp_path, ["a", "b", "c", "b"])
    assert [path.name for path in bag_paths(tmp_path, ["b", "a"])] == ["b.h5", "a.h5"]


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(CanvasError, match="cannot be written"):
        BagWriter(tmp_path / "out" / "a.h5", known_plan())


def test_find_bags_leaves_unfinished_ones_out(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_bag(tmp_path / f"{name}.h5", known_plan(), known_features(known_plan()))
    BagWriter(tmp_path / "c.h5", known_plan())
    assert [path.name for path in find_bags(tmp_path)] == ["a.h5", "b.h5"]
    with pytest.raises(BagError, match="there is none"):
        find_bags(tmp_path / "absent")


def test_parents_must_be_rows_of_the_coarser_scale() -> None:
    plan = known_plan()
    fine, coarse = plan.scales
    assert fine.parent is not None
    with pytest.raises(ValueError, match=r"rows of 5x, 0 to 2; got 1 to 3"):
        replace(plan, scales=(replace(fine, parent=fine.parent + 1), coarse))
    with pytest.raises(ValueError, match="every scale but the coarsest needs parents; 20x breaks"):
        replace(plan, scales=(replace(fine, parent=None), coarse))
    with pytest.raises(ValueError, match=r"parent must be int64 \(48,\)"):
        replace(fine, parent=fine.parent[1:])
