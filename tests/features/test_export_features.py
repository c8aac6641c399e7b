"""Exports of features: names, dtypes, chunks, attributes and frames as the other programs have them."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from engine.export_features import main
from engine.features.bag_reader import BagFile
from engine.features.bag_writer import BagWriter, write_bag
from engine.features.export import MANIFEST
from tests.support.known_bag import known_features, known_plan

INVALID = 5
"""The row of S-01 at 20x that could not be read."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of an extraction: one slide with tissue and one without."""
    folder = tmp_path / "run"
    (folder / "features").mkdir(parents=True)
    plan = known_plan()
    valid = np.ones(48, np.uint8)
    valid[INVALID] = 0
    write_bag(folder / "features" / "S-01.h5", plan, known_features(plan), {"20x": valid})
    empty = known_plan(parents=0, slide="S-02")
    write_bag(folder / "features" / "S-02.h5", empty, known_features(empty))
    return folder


def opened(path: Path) -> Any:
    return h5py.File(path, "r")


def attributes(node: Any) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.generic | np.ndarray) else v for k, v in node.attrs.items()}


def expected(run: Path, scale: str = "20x") -> tuple[np.ndarray, np.ndarray]:
    """The valid features and their coordinates."""
    with BagFile(run / "features" / "S-01.h5") as bag:
        valid = bag.valid(scale)
        return bag.features(scale)[valid], bag.coords(scale)[valid]


def described(dataset: Any) -> tuple:
    return dataset.dtype, dataset.shape, dataset.chunks, dataset.maxshape


def test_unfinished_slides_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--layout", "clam"]) == 0
    assert "Left out" not in capsys.readouterr().out
    BagWriter(run / "features" / "S-03.h5", known_plan(slide="S-03"))
    assert main([str(run), "--layout", "clam"]) == 0
    assert "2 slides" in (said := capsys.readouterr().out)
    assert "Left out: 1 unfinished slides (S-03)" in said


def test_trident(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--layout", "trident", "--magnification", "20"]) == 0
    assert "2 slides at 20x in the layout of trident" in capsys.readouterr().out
    folder = run / "exports/trident/20x_256px_0px_overlap"
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert files == [
        "features_zoomldm/S-01.h5",
        "features_zoomldm/S-02.h5",
        "patches/S-01_patches.h5",
        "patches/S-02_patches.h5",
    ]
    features, coords = expected(run)
    about = {
        "patch_size": 256,
        "patch_size_level0": 512,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": "S-01",
        "savetodir": str(folder),
        "level0_width": 40_000,
        "level0_height": 30_000,
    }
    with opened(folder / "patches/S-01_patches.h5") as patches, opened(folder / files[0]) as store:
        assert list(patches) == ["coords"]
        assert sorted(store) == ["coords", "features"]
        assert not dict(store.attrs)
        assert not dict(patches.attrs)
        for table in (patches["coords"], store["coords"]):
            assert described(table) == (np.int64, (47, 2), (1, 2), (None, 2))
            assert attributes(table) == about
            np.testing.assert_array_equal(table[:], coords)
        assert described(store["features"])[:3] == (np.float32, (47, 4), (1, 4))
        named = {"name": "S-01", "savetodir": str(folder / "features_zoomldm"), "encoder": "zoomldm"}
        assert attributes(store["features"]) == named
        np.testing.assert_array_equal(store["features"][:], features)
    with opened(folder / "patches/S-02_patches.h5") as patches, opened(folder / files[1]) as store:
        assert patches["coords"].shape == (0, 2)
        assert store["features"].shape == (0, 4)
        assert store["coords"].shape == (0, 2)


def test_trident_on_a_scanner_that_is_not_nominal(tmp_path: Path) -> None:
    plan = known_plan(mpp_x=0.29, mpp_y=0.29)
    side = 256 * 0.5 / 0.29
    plan = replace(plan, scales=(replace(plan.scales[0], tile_level0_px=(side, side)), plan.scales[1]))
    write_bag(tmp_path / "features" / "S-01.h5", plan, known_features(plan))
    assert main([str(tmp_path), "--layout", "trident"]) == 0
    file = tmp_path / "exports/trident/20x_256px_0px_overlap/patches/S-01_patches.h5"
    with opened(file) as patches:
        about = attributes(patches["coords"])
    assert about["patch_size_level0"] == pytest.approx(441.379, abs=1e-3)
    # What a reader computes from the ratio of magnifications is the true field of view.
    assert 256 * about["level0_magnification"] / about["target_magnification"] == pytest.approx(side)


def test_clam(run: Path) -> None:
    out = run / "clam"
    assert main([str(run), "--layout", "clam", "--magnification", "5", "--out", str(out)]) == 0
    features, coords = expected(run, "5x")
    with opened(out / "patches/S-01.h5") as patches:
        assert list(patches) == ["coords"]
        assert described(patches["coords"]) == (np.int64, (3, 2), (1, 2), (None, 2))
        np.testing.assert_array_equal(patches["coords"][:], coords)
        assert attributes(patches["coords"]) == {
            "patch_size": 2048,
            "patch_level": 0,
            "downsample": [1.0, 1.0],
            "downsampled_level_dim": [40_000, 30_000],
            "level_dim": [40_000, 30_000],
            "name": "S-01",
            "save_path": str(out / "patches"),
        }
    with opened(out / "h5_files/S-01.h5") as store:
        assert sorted(store) == ["coords", "features"]
        assert described(store["features"])[:3] == (np.float32, (3, 4), (32, 4))
        assert store["coords"].dtype == np.int32
        np.testing.assert_array_equal(store["features"][:], features)
        np.testing.assert_array_equal(store["coords"][:], coords)
        assert not dict(store.attrs)
        assert not dict(store["features"].attrs)
        assert not dict(store["coords"].attrs)
    tensor = torch.load(out / "pt_files/S-01.pt", weights_only=True)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), features)
    assert torch.load(out / "pt_files/S-02.pt", weights_only=True).shape == (0, 4)


def test_stamp(run: Path) -> None:
    assert main([str(run), "--layout", "stamp"]) == 0
    features, coords = expected(run)
    with opened(run / "exports/stamp/zoomldm/S-01.h5") as store:
        assert sorted(store) == ["coords", "feats"]
        assert store["feats"].dtype == np.float16
        assert store["coords"].dtype == np.float32
        np.testing.assert_array_equal(store["feats"][:], features.astype(np.float16))
        np.testing.assert_allclose(store["coords"][:], coords * 0.25)
        assert attributes(store) == {
            "stamp_version": "2.4.0",
            "extractor": "zoomldm",
            "unit": "um",
            "tile_size_um": 128.0,
            "tile_size_px": 256,
            "code_hash": "zoomldm-engine-0.1.0",
            "feat_type": "tile",
        }


def test_stamp_refuses_what_half_precision_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = known_plan()
    write_bag(tmp_path / "features" / "S-01.h5", plan, {k: v * 1e4 for k, v in known_features(plan).items()})
    assert main([str(tmp_path), "--layout", "stamp"]) == 1
    assert "float16, up to 65504" in capsys.readouterr().err
    assert not list((tmp_path / "exports/stamp").rglob("*.h5*"))


def test_torchmil_reads_the_trident_layout(run: Path) -> None:
    # Not among the development packages: its wheel (1.0.2) brings top-level packages "tests" and "docs".
    datasets = pytest.importorskip("torchmil.datasets", reason="torchmil is not installed")
    assert main([str(run), "--layout", "trident"]) == 0
    labels = run / "labels.csv"
    labels.write_text("slide,label\nS-01,1\n")
    dataset = datasets.TridentWSIDataset(
        base_path=f"{run}/exports/trident/20x_256px_0px_overlap/",
        labels_path=str(labels),
        feature_extractor="zoomldm",
        wsi_names=["S-01"],
        bag_keys=["X", "Y", "coords"],
        patch_size=512,
        wsi_name_col="slide",
        wsi_label_col="label",
    )
    bag = dataset[0]
    features, coords = expected(run)
    np.testing.assert_array_equal(bag["X"].numpy(), features)
    np.testing.assert_array_equal(bag["coords"].numpy(), coords // 512)


def test_a_second_export_replaces_its_own_files_and_nobody_elses(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "theirs"
    patches = out / "20x_256px_0px_overlap/patches/S-01_patches.h5"
    patches.parent.mkdir(parents=True)
    patches.write_text("segmented for a week")
    assert main([str(run), "--layout", "trident", "--out", str(out)]) == 1
    assert "must not hold 20x_256px_0px_overlap/patches/S-01_patches.h5" in capsys.readouterr().err
    assert patches.read_text() == "segmented for a week"
    assert not (out / MANIFEST).exists()
    for _ in range(2):
        assert main([str(run), "--layout", "trident"]) == 0
    assert not list((run / "exports").rglob("*.partial"))


def test_two_slides_of_one_name_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(run / "features" / "S-01.h5", run / "features" / "copy.h5")
    assert main([str(run), "--layout", "clam"]) == 1
    assert "S-01.h5 and copy.h5 are both of 'S-01'" in capsys.readouterr().err
    assert not (run / "exports").exists()


def test_a_name_that_would_leave_the_folder_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(run / "features" / "S-01.h5", "a") as bag:
        bag.attrs["slide"] = "../../S-01"
    assert main([str(run), "--layout", "clam"]) == 1
    assert "a slide's name must be one visible file name" in capsys.readouterr().err


def test_bags_of_several_encoders_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = known_plan(slide="S-03", encoder="uni", block=None, timestep=None, condition=None)
    write_bag(run / "features" / "S-03.h5", plan, known_features(plan))
    assert main([str(run), "--layout", "stamp"]) == 1
    assert "must come from one encoder" in capsys.readouterr().err


def test_a_damaged_bag_stops_the_export_before_it_starts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag = run / "features" / "S-02.h5"
    os.truncate(bag, bag.stat().st_size // 2)
    assert main([str(run), "--layout", "trident"]) == 1
    assert "S-02.h5 must be a whole bag; it is damaged" in capsys.readouterr().err
    assert not (run / "exports").exists()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--magnification", "10"], 1, "holds 20x, 5x; got '10x'"),
        (["--magnification", "0"], 2, "magnification must be positive"),
        (["--features", "../elsewhere"], 2, "the name of a folder in RUN"),
        (["--features", "features_uni"], 1, "must be a folder of bags"),
        (["--layouts", "x"], 2, "did you mean --layout?"),
    ],
)
def test_wrong_usage(run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str) -> None:
    try:
        found = main([str(run), "--layout", "trident", *flags])
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert message in capsys.readouterr().err


def test_a_run_without_bags_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "features").mkdir()
    assert main([str(tmp_path), "--layout", "clam"]) == 1
    assert "must hold bags (*.h5); it holds none" in capsys.readouterr().err
