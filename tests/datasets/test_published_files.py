"""The published per-file form: taken over and given back without a number changing; what is wrong in it is named."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.core.errors import PreparedError, PreparedMismatchError
from engine.datasets.dataset import PreparedSet
from engine.datasets.zoomldm_files import export_set, import_set
from tests.support.known_prepared import FACTS, write_set

NAIP = replace(FACTS, domain="naip", magnifications=("1x", "2x"), base_mpp=1e6)


def write_published(folder: Path, domain: str, counts: dict[str, int], with_images: bool = False) -> Path:
    """Write a set as its published loader reads it: channels first for BRCA, cells first for NAIP."""
    rng = np.random.default_rng(0)
    for level, (name, n) in enumerate(counts.items()):
        for i in range(n):
            here = folder / name / "0" if domain == "brca" else folder / name
            here.mkdir(parents=True, exist_ok=True)
            np.save(here / f"{i}_vae.npy", rng.standard_normal((3, 64, 64)).astype(np.float32))
            cells = rng.standard_normal((16, 4**level)).astype(np.float16)
            if domain == "naip":
                np.save(here / f"{i}_dino_grid.npy", cells.T)
            else:
                np.save(here / f"{i}_uni_grid.npy", cells[:, 0] if level == 0 else cells)
            if with_images:
                file = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(file, "PNG")
                np.save(here / f"{i}_img.npy", np.frombuffer(file.getvalue(), np.uint8))
    return folder


def test_brca_is_taken_over_number_by_number(tmp_path: Path) -> None:
    source = write_published(tmp_path / "published", "brca", {"20x": 3, "10x": 2}, with_images=True)
    assert import_set(source, tmp_path / "out", FACTS) == {"20x": 3, "10x": 2, "5x": 0}
    found = PreparedSet(tmp_path / "out")
    for level, name, k in ((0, "20x", 1), (1, "10x", 2)):
        latent, grid, _ = found.example(level, 1)
        np.testing.assert_array_equal(latent, np.load(source / name / "0" / "1_vae.npy").astype(np.float16))
        np.testing.assert_array_equal(
            grid.reshape(16, -1), np.load(source / name / "0" / "1_uni_grid.npy").reshape(16, -1)
        )
        assert grid.shape == (16, k, k)
    with Image.open(io.BytesIO(np.load(source / "10x" / "0" / "1_img.npy").tobytes())) as picture:
        np.testing.assert_array_equal(found.image(1, 1), np.asarray(picture))
    assert import_set(source, tmp_path / "out", FACTS) == {"20x": 3, "10x": 2, "5x": 0}  # nothing is done twice


def test_naip_has_its_own_form(tmp_path: Path) -> None:
    source = write_published(tmp_path / "published", "naip", {"1x": 2, "2x": 1})
    assert import_set(source, tmp_path / "out", NAIP) == {"1x": 2, "2x": 1}
    grid = PreparedSet(tmp_path / "out").example(1, 0).grid
    np.testing.assert_array_equal(grid[:, 1, 0], np.load(source / "2x" / "0_dino_grid.npy")[2])


@pytest.mark.parametrize("shared", [FACTS, NAIP], ids=["brca", "naip"])
def test_a_set_comes_back_from_its_export(tmp_path: Path, shared: type) -> None:
    prepared = PreparedSet(write_set(tmp_path / "set", shared, slides=1, images=True))
    counts = export_set(tmp_path / "set", tmp_path / "files")
    assert counts == {name: prepared.count(level) for level, name in enumerate(prepared.magnifications)}
    if shared is FACTS:
        assert np.load(tmp_path / "files" / "10x" / "0" / "3_uni_grid.npy").shape == (16, 4)
    else:
        assert np.load(tmp_path / "files" / "2x" / "3_dino_grid.npy").shape == (4, 16)
    import_set(tmp_path / "files", tmp_path / "again", shared)
    again = PreparedSet(tmp_path / "again")
    for level in range(len(prepared.magnifications)):
        for i in range(prepared.count(level)):
            np.testing.assert_array_equal(again.example(level, i).latent, prepared.example(level, i).latent)
            np.testing.assert_array_equal(again.example(level, i).grid, prepared.example(level, i).grid)
    if shared is FACTS:
        np.testing.assert_array_equal(again.image(0, 5), prepared.image(0, 5))


def test_an_export_goes_on_and_mixes_with_nothing(tmp_path: Path) -> None:
    write_set(tmp_path / "set", slides=1)
    out = tmp_path / "files"
    export_set(tmp_path / "set", out)
    lost, kept = out / "20x" / "0" / "3_vae.npy", out / "20x" / "0" / "2_vae.npy"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    export_set(tmp_path / "set", out)
    assert lost.exists()
    assert kept.stat().st_mtime_ns == before
    write_set(tmp_path / "other", slides=2)
    with pytest.raises(PreparedError, match="must be empty or hold an export of the same set"):
        export_set(tmp_path / "other", out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(PreparedError, match=r"notes\.txt"):
        export_set(tmp_path / "set", tmp_path / "mine")


def test_unusable_latents_are_left_out_up_to_a_share(tmp_path: Path) -> None:
    source = write_published(tmp_path / "published", "brca", {"20x": 8})
    here = source / "20x" / "0"
    np.save(here / "1_vae.npy", np.zeros((3, 32, 32), np.float32))
    np.save(here / "6_vae.npy", np.full((3, 64, 64), np.nan, np.float32))
    assert import_set(source, tmp_path / "out", FACTS)["20x"] == 6
    found = PreparedSet(tmp_path / "out")
    assert [found.place(0, i)[1] for i in range(6)] == [0, 2, 3, 4, 5, 7]
    assert found.slide_facts("published_20x_00000").dropped == {"20x": 2}
    (here / "2_vae.npy").write_bytes(b"")
    with pytest.raises(PreparedError, match="25% of the latents may be unusable; 38%"):
        import_set(source, tmp_path / "strict", FACTS)


def test_foreign_and_missing_grids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PreparedError, match="must hold folders 20x, 10x, 5x"):
        import_set(tmp_path, tmp_path / "out", FACTS)
    source = write_published(tmp_path / "published", "brca", {"20x": 2, "10x": 2})
    with pytest.raises(PreparedMismatchError, match="48 wide; they are 16 wide"):
        import_set(source, tmp_path / "wide", replace(FACTS, ssl_dim=48))
    grid = source / "10x" / "0" / "1_uni_grid.npy"
    np.save(grid, np.zeros((16, 1), np.float16))
    with pytest.raises(PreparedError, match="2x2 cells, as the first grid does, finite; it holds 1"):
        import_set(source, tmp_path / "out", FACTS)
    grid.unlink()
    with pytest.raises(PreparedError, match="1_uni_grid.npy must be a readable"):
        import_set(source, tmp_path / "out", FACTS)
    np.save(source / "20x" / "0" / "0_uni_grid.npy", np.zeros((16, 4), np.float16))
    with pytest.raises(PreparedError, match="at most 1 cells on each axis at 20x; it has 2"):
        import_set(source, tmp_path / "other", FACTS)


def test_patches_that_came_after_an_import_are_not_passed_over(tmp_path: Path) -> None:
    source = write_published(tmp_path / "published", "brca", {"20x": 3})
    assert import_set(source, tmp_path / "out", FACTS)["20x"] == 3
    source = source.rename(tmp_path / "moved")  # in another place it is the same set
    assert import_set(source, tmp_path / "out", FACTS)["20x"] == 3
    write_published(source, "brca", {"20x": 4})
    again = "they are others now, 4 from 0 to 3. Remove .*published_20x_00000"
    with pytest.raises(PreparedError, match=again):
        import_set(source, tmp_path / "out", FACTS)
    other = write_published(tmp_path / "other", "brca", {"20x": 3})
    np.save(other / "20x" / "0" / "0_vae.npy", np.ones((3, 64, 64), np.float32))
    with pytest.raises(PreparedError, match="they are others now, 3 from 0 to 2"):
        import_set(other, tmp_path / "out", FACTS)


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    source = write_published(tmp_path / "published", "brca", {"20x": 3}, with_images=True)
    (source / "20x" / "0" / "1_img.npy").unlink()
    with pytest.raises(PreparedError, match=r"1 of 3 have none, the first .*1_img\.npy"):
        import_set(source, tmp_path / "out", FACTS)
    for number in (0, 2):
        (source / "20x" / "0" / f"{number}_img.npy").unlink()
    import_set(source, tmp_path / "out", FACTS)
    assert not PreparedSet(tmp_path / "out").has_images
