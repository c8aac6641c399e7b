"""Files of other tools are read as they are; what is none of them is refused."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from engine.bag_writer import write_bag
from engine.errors import BagError
from mil.cohort import check_scales
from mil.errors import CohortError
from mil.featurefiles import UNKNOWN, find_features, joined_rows, open_features
from tests.known_bag import known_features, known_plan

FEATURES = np.arange(12, dtype=np.float32).reshape(4, 3)
COORDS = np.array([[0, 0], [512, 0], [0, 512], [512, 512]])


def trident(path: Path, rows: int = 4) -> Path:
    """As TRIDENT lays it out: attributes on both data sets, a float tile size, chunks of one row."""
    with h5py.File(path, "w") as file:
        features = file.create_dataset("features", data=FEATURES[:rows].astype(np.float16), chunks=(1, 3))
        features.attrs["encoder"] = "uni_v1"
        coords = file.create_dataset("coords", data=COORDS[:rows], maxshape=(None, 2), chunks=(1, 2))
        sizes = {"patch_size": 256, "patch_size_level0": 512.0, "level0_magnification": 40, "target_magnification": 20}
        coords.attrs.update({**sizes, "overlap": 0, "level0_width": 4000, "level0_height": 3000})
    return path


def clam(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = FEATURES, COORDS.astype(np.int32)
    return path


def stamp(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["feats"], file["coords"] = FEATURES.astype(np.float16), COORDS.astype(np.float32)
        file.attrs.update({"extractor": "ctranspath", "unit": "um", "tile_size_um": 256.0, "feat_type": "tile"})
    return path


def test_trident(tmp_path: Path) -> None:
    file = open_features(trident(tmp_path / "a.h5"))
    assert (file.slide, file.scales, file.encoder) == ("a", ("20x",), "uni_v1")
    np.testing.assert_array_equal(file.features("20x"), FEATURES)
    np.testing.assert_array_equal(file.coords("20x"), COORDS)
    assert file.tile_level0_px("20x") == (512.0, 512.0)
    assert file.level0_size() == (4000, 3000)


def test_trident_without_tiles(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "e.h5", "w") as made:
        made.create_dataset("features", (0, 3), np.float32)
        made.create_dataset("coords", (0, 2), np.int64)
    file = open_features(tmp_path / "e.h5")
    assert file.shape(UNKNOWN) == (0, 3)
    assert len(joined_rows(file, [UNKNOWN])[0]) == 0


def test_clam(tmp_path: Path) -> None:
    file = open_features(clam(tmp_path / "a.h5"))
    assert (file.scales, file.encoder) == ((UNKNOWN,), "")
    np.testing.assert_array_equal(file.features("5x"), FEATURES)  # an unknown scale is what it is said to be
    assert file.coords("5x").dtype == np.int64  # type: ignore[union-attr]
    assert file.tile_level0_px("5x") is None
    torch.save(torch.from_numpy(FEATURES), tmp_path / "b.pt")
    tensor = open_features(tmp_path / "b.pt")
    np.testing.assert_array_equal(tensor.features("20x"), FEATURES)
    assert tensor.coords("20x") is None


def test_stamp(tmp_path: Path) -> None:
    file = open_features(stamp(tmp_path / "a.h5"))
    assert file.encoder == "ctranspath"
    np.testing.assert_array_equal(file.features("20x"), FEATURES)
    assert file.coords("20x") is None  # µm, not px


def test_ours(tmp_path: Path) -> None:
    plan = known_plan()
    valid = {"20x": np.ones(48, bool), "5x": np.array([True, False, True])}
    valid["20x"][5] = False
    file = open_features(write_bag(tmp_path / "S-01.h5", plan, known_features(plan), valid))
    fine, coarse = joined_rows(file, ["20x", "5x"])
    assert list(fine) == [i for i in range(48) if i != 5 and not 16 <= i < 32]
    assert list(coarse) == [i // 16 for i in fine]
    assert list(joined_rows(file, ["5x"])[0]) == [0, 2]


def test_a_renamed_bag_is_refused(tmp_path: Path) -> None:
    plan = known_plan()
    write_bag(tmp_path / "other.h5", plan, known_features(plan))
    with pytest.raises(BagError, match="named after its slide"):
        open_features(tmp_path / "other.h5")


@pytest.mark.parametrize("kind", ["text", "empty file", "coordinates only", "pickle"])
def test_what_is_no_features_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.pt" if kind == "pickle" else "a.h5")
    if kind == "text":
        path.write_text("hello")
    elif kind == "pickle":
        torch.save({"model": Path("x")}, path)
    else:
        with h5py.File(path, "w") as file:
            if kind == "coordinates only":
                file["coords"] = COORDS
    with pytest.raises(BagError, match=str(path)):
        open_features(path)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="there are none"):
        find_features(tmp_path)
    with pytest.raises(BagError, match="Check the path"):
        find_features(tmp_path / "none")
    for job in ("20x_256px_0px_overlap/features_uni_v1", "20x_256px_0px_overlap/features_conch"):
        (tmp_path / job).mkdir(parents=True)
    trident(tmp_path / "20x_256px_0px_overlap/features_uni_v1/a.h5")
    assert list(find_features(tmp_path)) == ["a"]
    trident(tmp_path / "20x_256px_0px_overlap/features_conch/a.h5")
    with pytest.raises(BagError, match="several kinds.*features_conch"):
        find_features(tmp_path)
    (tmp_path / "pt_files").mkdir()
    torch.save(torch.from_numpy(FEATURES), tmp_path / "pt_files" / "c.pt")
    assert list(find_features(tmp_path)) == ["c"]


def test_scales_asked_for(tmp_path: Path) -> None:
    check_scales(tmp_path, (UNKNOWN,), ("5x",))
    with pytest.raises(CohortError, match="unknown magnification"):
        check_scales(tmp_path, (UNKNOWN,), ("20x", "5x"))
    with pytest.raises(CohortError, match="lacks 5x"):
        check_scales(tmp_path, ("20x",), ("20x", "5x"))
