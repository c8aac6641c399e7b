"""Files of other tools are read as they are; what is none of them is refused."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from engine.core.errors import BagError
from engine.features.bag_writer import write_bag
from mil.data.cohort import check_scales
from mil.data.dataset import BagCache, StoredBag, collate
from mil.data.feature_files import UNKNOWN, find_features, joined_rows, open_features
from mil.errors import CohortError
from tests.support.known_bag import known_features, known_plan

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
    assert file.series() is None


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


def save_old(tensor: object, path: Path) -> None:
    torch.save(tensor, path, _use_new_zipfile_serialization=False)


TENSORS = {
    "as it is": torch.from_numpy(FEATURES),
    "one batch": torch.from_numpy(FEATURES)[None],
    "one pixel": torch.from_numpy(FEATURES)[..., None, None],
    "bfloat16": torch.from_numpy(FEATURES).bfloat16(),
    "float8": torch.from_numpy(FEATURES).to(torch.float8_e4m3fn),
    "float16": torch.from_numpy(FEATURES).half(),
    "float64": torch.from_numpy(FEATURES).double(),
    "with a gradient": torch.from_numpy(FEATURES).requires_grad_(),
    "parameter": torch.nn.Parameter(torch.from_numpy(FEATURES)),
    "whole numbers": torch.from_numpy(FEATURES).to(torch.uint8),
    "turned": torch.from_numpy(FEATURES.T.copy()).T,
    "in a dict": {"features": torch.from_numpy(FEATURES), "coords": torch.from_numpy(COORDS)},
}


FORMS = [(kind, form) for kind in TENSORS for form in ("new", "old") if (kind, form) != ("float8", "old")]


@pytest.mark.parametrize(("kind", "form"), FORMS)  # torch cannot write float8 in the old form
def test_tensors_of_other_tools(tmp_path: Path, kind: str, form: str) -> None:
    (torch.save if form == "new" else save_old)(TENSORS[kind], tmp_path / "a.pt")
    bag = StoredBag(tmp_path / "a.pt", ["20x"], (3,), BagCache(0))
    array = bag.read()
    np.testing.assert_array_equal(array, FEATURES)
    assert array.dtype in (np.float16, np.float32)
    assert collate([array, array], [0, 1]).x.shape == (2, 4, 3)


NO_TENSORS = {
    "one vector": (torch.zeros(3), "one vector for the whole slide"),
    "two tables": (torch.zeros(2, 4, 3), r"shape \(2, 4, 3\)"),
    "one tile or many": (torch.zeros(1, 4, 1), r"shape \(1, 4, 1\)"),
    "complex": (torch.zeros(4, 3, dtype=torch.complex64), "real numbers"),
    "truth values": (torch.zeros(4, 3, dtype=torch.bool), "real numbers"),
    "sparse": (torch.eye(3).to_sparse(), "dense tensor"),
    "no data": (torch.zeros(4, 3, device="meta"), "dense tensor"),
    "another dict": ({"state": torch.zeros(4, 3)}, "got dict with state"),
    "array": (FEATURES, "weights_only=True; it fails: it holds a numpy"),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
def test_tensors_that_are_no_bag(tmp_path: Path, kind: str) -> None:
    content, told = NO_TENSORS[kind]
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(BagError, match=told):
        open_features(tmp_path / "a.pt")


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["new", "old"])
def test_nothing_in_a_file_runs(tmp_path: Path, form: str) -> None:
    (torch.save if form == "new" else save_old)(Runs(tmp_path / "ran"), tmp_path / "a.pt")
    with pytest.raises(BagError, match="weights_only"):
        open_features(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["new", "old"])
def test_damaged_tensors_are_named(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.pt"
    (torch.save if form == "new" else save_old)(TENSORS["as it is"], path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for at in range(60):
        data = bytearray(whole if at % 2 else whole[: rng.integers(len(whole))])
        for place in rng.integers(0, max(1, min(len(data), 300)), 3) if data else ():
            data[place] = rng.integers(256)
        path.write_bytes(bytes(data))
        try:  # changed bytes may leave a tensor that can be read; nothing but BagError may come out
            StoredBag(path, ["20x"], (3,), BagCache(0)).read()
        except BagError:
            refused += 1
    assert refused > 30  # every cut one at least


def h5(path: Path, **data: object) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in data.items():
            file[name] = value
    return path


TYPES = (">f4", ">f2", "f8", "i1", ">u2", np.longdouble)


@pytest.mark.parametrize("features", [FEATURES[None], FEATURES[:, None], *(FEATURES.astype(kind) for kind in TYPES)])
def test_h5_of_other_ranks_and_types(tmp_path: Path, features: np.ndarray) -> None:
    path = h5(tmp_path / "a.h5", features=features, coords=COORDS[None])
    array = StoredBag(path, ["20x"], (3,), BagCache(0)).read()
    np.testing.assert_array_equal(array, FEATURES)
    assert collate([array, array], [0, 1]).x.shape == (2, 4, 3)
    np.testing.assert_array_equal(open_features(path).coords("20x"), COORDS)


@pytest.mark.parametrize(
    ("features", "told"),
    [
        (FEATURES[0], "one vector for the whole slide"),
        (np.stack([FEATURES, FEATURES]), r"\(2, 4, 3\)"),
        (np.float32(1), r"shape \(\)"),
        (FEATURES > 1, "real numbers"),
        (FEATURES * 1j, "real numbers"),
        (np.array([[b"a"]]), "real numbers"),
    ],
)
def test_h5_that_is_no_bag(tmp_path: Path, features: np.ndarray, told: str) -> None:
    with pytest.raises(BagError, match=told):
        open_features(h5(tmp_path / "a.h5", features=features))


def test_a_file_that_contradicts_itself(tmp_path: Path) -> None:
    short = open_features(h5(tmp_path / "a.h5", features=FEATURES, coords=COORDS[:3]))
    with pytest.raises(BagError, match="coords has 3 rows for 4 tiles"):
        short.coords("20x")
    lost = open_features(h5(tmp_path / "b.h5", features=FEATURES, coords=COORDS + np.nan))
    with pytest.raises(BagError, match="coords has values that are no numbers"):
        lost.coords("20x")
    assert open_features(h5(tmp_path / "c.h5", features=FEATURES, coords=FEATURES)).coords("20x") is None
    huge = open_features(h5(tmp_path / "d.h5", features=np.full((2, 3), 1e300)))
    with pytest.raises(BagError, match="within float32"):
        huge.features("20x")


@pytest.mark.parametrize(("said", "scale"), [("40x", "40x"), (b"20", "20x"), (np.array([5.0]), "5x")])
def test_magnifications_as_tools_write_them(tmp_path: Path, said: object, scale: str) -> None:
    path = trident(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["coords"].attrs["target_magnification"] = said
    assert open_features(path).scales == (scale,)
    with h5py.File(path, "r+") as file:
        file["coords"].attrs["target_magnification"] = "high"
    with pytest.raises(BagError, match="target_magnification is 'high'"):
        open_features(path)


def test_a_bag_whose_name_has_another_unicode_form(tmp_path: Path) -> None:
    plan = known_plan(slide="M\u00fcller")
    made = write_bag(tmp_path / "M\u00fcller.h5", plan, known_features(plan))
    moved = made.rename(tmp_path / "Mu\u0308ller.h5")
    assert open_features(moved).slide == "Mu\u0308ller"


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    clam(tmp_path / os.fsdecode(b"M\xfcller.h5"))
    with pytest.raises(BagError, match="PYTHONUTF8=1"):
        find_features(tmp_path)


def test_what_macos_leaves_is_no_features_file(tmp_path: Path) -> None:
    clam(tmp_path / "a.h5")
    (tmp_path / "._a.h5").write_bytes(b"\0\5\x16\7")
    assert list(find_features(tmp_path)) == ["a"]
