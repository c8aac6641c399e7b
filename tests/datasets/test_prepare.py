"""Folders of slides become a training set: whole, resumed after any loss, no bad slide in the way of others."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from engine.core.errors import CanvasMismatchError, EngineError, PreparedMismatchError
from engine.core.progress import Progress
from engine.datasets import blocks
from engine.datasets.blocks import read_patch
from engine.datasets.config import PrepareBlocks, PrepareConfig
from engine.datasets.dataset import PreparedSet
from engine.datasets.networks import load_networks
from engine.datasets.prepare import prepare
from engine.datasets.writer import PreparedWriter
from engine.model.encoders.demo import DemoEncoder
from engine.model.encoders.texture import RAW_DIM
from engine.model.zoomldm import ZoomLDM, autoencoder_digest
from engine.pipeline.report import SLIDE_FAILED
from engine.pipeline.stages import local_backend
from engine.prepare import main
from engine.slides.slide import open_slide
from engine.slides.tissue import TissueConfig
from tests.support.forked import exit_code
from tests.support.tiny_run import narrow_config
from tests.support.written_slides import box, overwrite, tile_bytes, tissue, write_tiff

EVERYTHING = TissueConfig("everything")


def die_in_the_second_write(argv: list[str]) -> None:
    """Prepare in this process until one block is written."""
    written, write = [], PreparedWriter.write

    def dying(*arguments: Any) -> Any:
        if len(written) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(write(*arguments))
        return written[-1]

    PreparedWriter.write = dying
    main(argv)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each domain, with an SSL encoder of its own."""
    torch.manual_seed(0)
    folders = {}
    for domain, names, mpp in (("brca", ("20x", "10x", "5x"), 0.5), ("naip", ("1x", "2x"), 1e6)):
        made = ZoomLDM(narrow_config(magnifications=names, base_mpp=mpp, encoder="demo"))
        encoder = DemoEncoder(torch.zeros(RAW_DIM), torch.randn(RAW_DIM, 16) / 10)
        made.extras = {"encoder/model": encoder.tensors()}
        folders[domain] = tmp_path_factory.mktemp("models") / domain
        made.save_pretrained(folders[domain])
    return folders


def write_slide(path: Path, height: int = 1100, width: int = 1400, mpp: float | None = 0.5, levels: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.asarray(tissue(350, 550).crop((0, 0, width // 4, height // 4)).resize((width, height)))
    return write_tiff(path, [picture, box(picture, 4)][:levels], mpp)


def config_of(model: Path, slides: Path, out: Path) -> PrepareConfig:
    config = PrepareConfig(str(slides), str(out), coarsest="5x", finder=EVERYTHING, blocks=PrepareBlocks(16, 4))
    return replace(config, model=replace(config.model, source=str(model), device="cpu", dtype="float32"))


def flags(config: PrepareConfig) -> list[str]:
    """Return the command line of a config made by `config_of`."""
    return [
        *("--slides", config.slides, "--out", config.out, "--model.source", config.model.source, "--coarsest", "5x"),
        *("--finder.method", "everything", "--blocks.patches", "16", "--blocks.batch", "4"),
        *("--ray.enabled", "false", "--model.device", "cpu", "--model.dtype", "float32"),
    ]


def run(config: PrepareConfig, only_failed: bool = False) -> dict[str, str]:
    """Prepare here; return the reason code of each slide, "" when it is done."""
    records = prepare(config, local_backend, Progress(), only_failed)
    return {record.slide: record.code if record.status == SLIDE_FAILED else "" for record in records}


def arrays(folder: Path, slide: str) -> dict[str, bytes]:
    found = (folder / "slides" / slide).rglob("*.npy")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def done(model: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> PrepareConfig:
    """A slide of 4 × 5 cells, done without interruption, with pixels."""
    folder = tmp_path_factory.mktemp("done")
    write_slide(folder / "slides" / "a.tif")
    config = replace(config_of(model["brca"], folder / "slides", folder / "out"), keep_images=True)
    assert run(config) == {"a": ""}
    return config


def test_patches_are_the_pixels_latents_and_vectors_of_their_places(done: PrepareConfig) -> None:
    found, (model, ssl) = PreparedSet(done.out), load_networks(done, "cpu")
    assert [found.count(level) for level in range(3)] == [20, 4, 1]
    assert {found.place(1, i)[1:] for i in range(4)} == {(0, 0), (0, 2), (2, 0), (2, 2)}
    found.require(autoencoder_digest=autoencoder_digest(model), encoder_digest=ssl.digest, encoder="demo")
    with open_slide(Path(done.slides) / "a.tif") as slide:
        for level in range(3):
            i, k = found.count(level) - 1, 2**level
            _, y, x = found.place(level, i)
            pixels = slide.read(x * 256, y * 256, 256, 256, 0.5 * k).pixels
            np.testing.assert_array_equal(found.image(level, i), pixels)
            image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
            with torch.inference_mode():
                latent = model.encode(image.float() / 127.5 - 1)[0].numpy()
            example = found.example(level, i)
            np.testing.assert_allclose(example.latent, latent, rtol=2e-3, atol=1e-3)
            cell = slide.read((x + k - 1) * 256, y * 256, 256, 256, 0.5).pixels
            vector = ssl.encode(torch.from_numpy(cell.copy()).permute(2, 0, 1)[None])[0].numpy()
            np.testing.assert_allclose(example.grid[:, 0, k - 1], vector, rtol=2e-3, atol=1e-3)


def test_the_report_counts_and_shows(done: PrepareConfig) -> None:
    page = (Path(done.out) / "report.html").read_text()
    assert "<tr><td>20x</td><td>20</td><td>1</td><td>0</td><td>0</td></tr>" in page
    for name in ("20x", "10x", "5x"):
        assert f'href="samples/{name}/a.jpg"' in page
    assert 'href="thumbnails/a.jpg"' in page
    record = json.loads((Path(done.out) / "report.json").read_text())["slides"][0]
    assert record["counts"] == {"20x": 20, "10x": 4, "5x": 1}


def test_a_kill_costs_the_blocks_in_flight_alone(done: PrepareConfig, tmp_path: Path) -> None:
    config = replace(done, out=str(tmp_path / "out"), keep_images=False)
    assert exit_code(die_in_the_second_write, flags(config)) == -signal.SIGKILL
    journal = (tmp_path / "out" / "slides" / "a" / "journal").read_text().splitlines()
    assert len(journal) == 2
    assert not (tmp_path / "out" / "slides" / "a" / "slide.json").exists()
    assert main(flags(config)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tiles"] == 9  # 16 patches were written before the kill
    whole = {k: v for k, v in arrays(Path(done.out), "a").items() if not k.endswith("images.npy")}
    assert arrays(tmp_path / "out", "a") == whole
    before = os.stat(tmp_path / "out" / "slides" / "a" / "slide.json").st_mtime_ns
    assert main(flags(config)) == 0
    assert os.stat(tmp_path / "out" / "slides" / "a" / "slide.json").st_mtime_ns == before
    for sample in sorted((Path(done.out) / "samples").rglob("*.jpg")):
        assert (Path(config.out) / sample.relative_to(done.out)).read_bytes() == sample.read_bytes(), (
            "the first block's"
        )


def test_bad_slides_stop_nobody(model: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slides = tmp_path / "slides"
    write_slide(slides / "good.tif", 600, 600)
    write_slide(slides / "tiny.tif", 200, 600, levels=1)
    write_slide(slides / "coarse.tif", 300, 300, mpp=2.0, levels=1)
    (slides / "none.svs").write_text("not a slide")
    write_slide(slides / "twice.tif", 600, 600)
    write_slide(slides / "b" / "twice.tif", 600, 600)
    config = config_of(model["brca"], slides, tmp_path / "out")
    assert main(flags(config)) == 3
    said = capsys.readouterr().out
    assert "Patches: 4 at 20x, 1 at 10x, 0 at 5x." in said
    assert "None at 5x: the slides are too small" in said
    records = {r["slide"]: r for r in json.loads((tmp_path / "out" / "report.json").read_text())["slides"]}
    assert {name: r["code"] for name, r in records.items()} == {
        "good": "", "tiny": "too_small", "coarse": "too_coarse", "none": "not_a_slide", "twice": "duplicate_name",
    }  # fmt: skip
    assert records["good"]["too_small"] == ["5x"]  # skipped there, and counted
    assert PreparedSet(tmp_path / "out").count(2) == 0
    write_slide(slides / "good.tif", 600, 700)
    assert run(config)["good"] == "changed"


def test_damaged_cells_and_patches_over_them_are_left_out(model: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "slides" / "a.tif"
    path.parent.mkdir()
    picture = np.asarray(tissue(350, 550).crop((0, 0, 256, 256)).resize((1024, 1024)))
    write_tiff(path, [picture, box(picture, 4)], 0.5, compression="jpeg")
    overwrite(path, tile_bytes(path, 256, 512)[0], bytes(tile_bytes(path, 256, 512)[1]))
    config = config_of(model["brca"], tmp_path / "slides", tmp_path / "out")
    assert run(replace(config, blocks=replace(config.blocks, slide_damage=0.01))) == {"a": "damaged"}
    assert run(config, only_failed=True) == {"a": ""}
    found = PreparedSet(config.out)
    assert [found.count(level) for level in range(3)] == [15, 3, 0]  # 5x reads a level that is whole, its cells do not
    assert ("a", 1, 2) not in {found.place(0, i) for i in range(15)}
    assert found.slide_facts("a").dropped == {"20x": 1, "10x": 1, "5x": 1}
    assert all(np.isfinite(found.example(1, i).grid).all() for i in range(3))


def test_coarse_patches_overlap_on_demand_and_need_tissue(model: dict[str, Path], tmp_path: Path) -> None:
    write_slide(tmp_path / "slides" / "a.tif", 1100, 1600)
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    ring = [[0, 0], [512, 0], [512, 1024], [0, 1024], [0, 0]]  # the left two columns of cells
    (drawn / "a.geojson").write_text(json.dumps({"type": "Feature", "geometry": {
        "type": "Polygon", "coordinates": [ring]}, "properties": {}}))  # fmt: skip
    config = config_of(model["brca"], tmp_path / "slides", tmp_path / "out")
    config = replace(config, finder=TissueConfig(), tissue=str(drawn), stride_cells=1, min_tissue=0.5)
    assert run(config) == {"a": ""}
    found = PreparedSet(config.out)
    places = [{found.place(level, i)[1:] for i in range(found.count(level))} for level in range(3)]
    assert places[0] == {(y, x) for y in range(4) for x in range(2)}
    assert places[1] == {(y, x) for y in range(3) for x in range(2)}  # at x = 1 half of it is tissue
    assert places[2] == {(0, 0)}
    cells = np.load(tmp_path / "out" / "slides" / "a" / "cells.npy")
    assert np.isfinite(cells[:, :4]).all()  # one vector per cell, those of glass under a coarse patch too
    assert np.isnan(cells[:, 4:]).all()
    assert found.tissue(1, [found.place(1, i)[1:] for i in range(6)].index((0, 1))) == pytest.approx(0.5, abs=0.02)


def test_a_coarse_patch_of_a_slide_without_levels_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "PIECE_PX", 300)
    path = write_slide(tmp_path / "a.tif", 1000, 1000, levels=1)
    with open_slide(path) as slide:
        asked: list[tuple[int, int]] = []
        read = slide._levels.window

        def watched(level: int, top: int, left: int, h: int, w: int):  # type: ignore[no-untyped-def]
            asked.append((h, w))
            return read(level, top, left, h, w)

        slide._levels.window = watched  # type: ignore[method-assign]
        whole = slide.read(0, 0, 256, 256, 0.5 * 32)
        assert max(map(max, asked)) == 1000
        asked.clear()
        pieces = read_patch(slide, 0, 0, 0.5 * 32)
        assert max(map(max, asked)) <= 300
        assert len(asked) >= 16, "1000 px in pieces of 256 = 8 px of the patch"
    np.testing.assert_array_equal(pieces.pixels, whole.pixels)
    np.testing.assert_array_equal(pieces.valid, whole.valid)


def test_pictures_from_above(model: dict[str, Path], tmp_path: Path) -> None:
    write_slide(tmp_path / "slides" / "a.tif", 800, 600, mpp=None, levels=1)
    Image.fromarray(np.full((512, 512, 3), 250, np.uint8)).save(tmp_path / "slides" / "snow.jpg")
    config = replace(config_of(model["naip"], tmp_path / "slides", tmp_path / "out"), domain="naip", coarsest="2x")
    config = replace(config, finder=TissueConfig())
    assert run(config) == {"a": "", "snow": ""}
    found = PreparedSet(config.out)
    assert (found.count(0), found.count(1)) == (6 + 4, 1 + 1)  # all of it counts, white ground too
    assert found.facts.base_mpp == 1e6
    with pytest.raises(EngineError, match="domain brca, whose base is 0.5"):
        run(replace(config, domain="brca", coarsest=None, out=str(tmp_path / "other")))


@pytest.mark.parametrize("told", ["nodata", "mask", ""])
def test_the_collar_of_a_picture_from_above_is_left_out(model: dict[str, Path], tmp_path: Path, told: str) -> None:
    """Nodata or a mask tells the black collar; where nothing does, it is ground."""
    (tmp_path / "slides").mkdir()
    pixels = np.clip(np.asarray(tissue(350, 550).crop((0, 0, 256, 256)).resize((1024, 1024))), 1, 255)
    pixels[:, :600] = 0
    tags = [(42113, "s", 0, "0", True)] if told == "nodata" else []
    with tifffile.TiffWriter(tmp_path / "slides" / "a.tif") as tiff:
        tiff.write(pixels, photometric="rgb", tile=(256, 256), extratags=tags, metadata=None)
        if told == "mask":
            tiff.write(pixels.any(axis=2), photometric="mask", subfiletype=4, metadata=None)
    config = replace(config_of(model["naip"], tmp_path / "slides", tmp_path / "out"), domain="naip", coarsest="2x")
    assert run(replace(config, finder=TissueConfig())) == {"a": ""}
    found = PreparedSet(config.out)
    columns = [{found.place(level, i)[2] for i in range(found.count(level))} for level in range(2)]
    # Of the third column 168 of 256 px hold ground.
    assert columns == ([{2, 3}, {2}] if told else [{0, 1, 2, 3}, {0, 2}])
    share = json.loads((tmp_path / "out" / "report.json").read_text())["slides"][0]["tissue_share"]
    assert share == pytest.approx(424 / 1024 if told else 1, abs=0.02)


def test_another_model_or_setting_is_refused(done: PrepareConfig, model: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = ZoomLDM.from_pretrained(model["brca"])
    with torch.no_grad():
        other.vae.encoder.conv_in.weight.mul_(2)
    other.extras["encoder/model"]["center"] += 1
    other.save_pretrained(tmp_path / "other")
    config = replace(done, model=replace(done.model, source=str(tmp_path / "other")))
    with pytest.raises(PreparedMismatchError, match="encoder_digest.*autoencoder_digest"):
        run(config)
    with pytest.raises(PreparedMismatchError, match=r"magnifications is \('20x', '10x', '5x'\)"):
        run(replace(done, coarsest="10x"))
    with pytest.raises(CanvasMismatchError, match="min_tissue was 0.25, now 0.5"):
        run(replace(done, min_tissue=0.5))


def test_a_network_that_returns_nan_fails_the_slide(model: dict[str, Path], tmp_path: Path) -> None:
    broken = ZoomLDM.from_pretrained(model["brca"])
    with torch.no_grad():
        broken.vae.quant_conv.bias[0] = torch.inf
    broken.save_pretrained(tmp_path / "broken")
    write_slide(tmp_path / "slides" / "a.tif", 300, 300)
    assert run(config_of(tmp_path / "broken", tmp_path / "slides", tmp_path / "out")) == {"a": "not_finite"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of slides, import_from and export_to"),
        (["--slides", "a", "--export_to", "b"], "got slides and export_to"),
        (["--slides", "a", "--coarsest", "4x"], "coarsest must be one of 20x"),
        (["--slides", "a", "--stride_cells", "0"], "stride_cells must be at least 1"),
        (["--slides", "a", "--blocks.patches", "20"], "multiple of 16"),
        (["--slides", "a", "--min_tisue", "0"], "min_tissue"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert said in capsys.readouterr().err


def test_a_lost_file_of_a_done_slide_is_named(done: PrepareConfig, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done.out, copy)
    (copy / "slides" / "a" / "5x" / "latents.npy").unlink()
    with pytest.raises(EngineError, match="5x/latents.npy must be there"):
        PreparedSet(copy)
