"""Folders of slides become bags: whole, resumed after any loss, one bad slide never in the way of the others."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from engine.core.cli import parse
from engine.core.errors import CanvasError, CanvasMismatchError, EngineError
from engine.core.progress import Progress
from engine.extract_features import main
from engine.features.bag_reader import BagFile
from engine.features.bag_writer import BagWriter
from engine.features.blocks import ExtractTask
from engine.features.config import BlockConfig, ExtractConfig
from engine.features.encoders import describe, extract_alone, load_encoders
from engine.features.extract import extract
from engine.features.tile_encoders import FeatureConfig, TilePixels, encode_all
from engine.model.zoomldm import ZoomLDM
from engine.pipeline.report import SLIDE_FAILED
from engine.pipeline.stages import Backend, Message
from engine.slides.slide import open_slide
from engine.slides.tile_grid import plan_grid, read_parent
from engine.slides.tissue import TissueConfig, find_tissue
from tests.support.forked import exit_code
from tests.support.known_picture import full_disk
from tests.support.tiny_run import narrow_config
from tests.support.written_slides import box, overwrite, tile_bytes, tissue, write_tiff

EVERYTHING = TissueConfig("everything")


def die_in_the_second_block(argv: list[str], by: int = signal.SIGKILL) -> None:
    """Extract in this process until the second block is half written, and end as a command does."""
    written, write = [], BagWriter.write

    def dying(*arguments: Any) -> Any:
        if len(written) == 3:
            os.kill(os.getpid(), by)
        written.append(write(*arguments))
        return written[-1]

    BagWriter.write = dying
    sys.exit(main(argv))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    ZoomLDM(narrow_config()).save_pretrained(folder)
    return folder


def write_slide(path: Path, height: int = 300, width: int = 1400, mpp: float | None = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.asarray(tissue(350, 550).crop((0, 0, width // 4, height // 4)).resize((width, height)))
    return write_tiff(path, [picture], mpp)


def flags(config: ExtractConfig) -> list[str]:
    """Return the command line of a config made by `config_of`."""
    return [
        *("--slides", config.slides, "--out", config.out, "--model.source", config.model.source),
        *("--finder.method", config.finder.method, "--blocks.parents", str(config.blocks.parents)),
        *("--features.blocks", f"[{','.join(config.features.blocks)}]"),
        *("--features.timestep", str(config.features.timestep)),
        *("--features.batch", str(config.features.batch), "--ray.enabled", "false", "--model.device", "cpu"),
        *("--model.dtype", config.model.dtype),
    ]


def config_of(tiny: Path, slides: Path, out: Path) -> ExtractConfig:
    features = FeatureConfig(blocks=("up.1",), timestep=100, batch=2)  # the tiny model has no up.3
    config = ExtractConfig(str(slides), str(out), finder=EVERYTHING, features=features)
    model = replace(config.model, source=str(tiny), device="cpu", dtype="float32")
    return replace(config, blocks=BlockConfig(parents=1), model=model)


def run(config: ExtractConfig, only_failed: bool = False) -> dict[str, str]:
    """Extract here; return the reason code of each slide, "" when it is done."""
    records = extract(config, extract_alone, Progress(), only_failed)
    return {record.slide: record.code if record.status == SLIDE_FAILED else "" for record in records}


def content(path: Path) -> dict[str, np.ndarray]:
    with BagFile(path) as bag:
        found = {f"{s}/{n}": getattr(bag, n)(s) for s in bag.scales for n in ("features", "coords", "valid")}
        return found | {"parent": bag.parent("20x")}


def assert_same(a: Path, b: Path) -> None:
    assert a.read_bytes() == b.read_bytes()


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    """Two slides, one of them glass by its drawn tissue; done without interruption."""
    folder = tmp_path_factory.mktemp("done")
    write_slide(folder / "slides" / "a.tif")
    Image.new("RGB", (700, 600), (245, 245, 246)).save(folder / "slides" / "glass.png")
    config = replace(config_of(tiny, folder / "slides", folder / "out"), mpp=0.5, finder=TissueConfig())
    assert run(config) == {"a": "", "glass": ""}
    return config


def test_a_bag_holds_the_features_of_the_grid(done: ExtractConfig) -> None:
    found, encoders = content(Path(done.out) / "features" / "a.h5"), load_encoders(done, "cpu")
    with open_slide(Path(done.slides) / "a.tif") as slide:
        grid = plan_grid(slide, find_tissue(slide, done.finder), done.grid)
        assert len(grid) > 4
        for name, wanted in (("20x/coords", grid.coords), ("5x/coords", grid.parent_coords), ("parent", grid.parent)):
            np.testing.assert_array_equal(found[name], wanted)
        for i in range(len(grid.parent_coords)):
            pixels, rows = read_parent(slide, grid, i), grid.children(i)
            fine = TilePixels("a", "20x", grid.coords[rows], pixels.children.transpose(0, 3, 1, 2).copy())
            coarse = TilePixels("a", "5x", grid.parent_coords[[i]], pixels.parent.transpose(2, 0, 1)[None].copy())
            np.testing.assert_array_equal(found["20x/features"][rows], encode_all(encoders, fine)["zoomldm"])
            np.testing.assert_array_equal(found["5x/features"][[i]], encode_all(encoders, coarse)["zoomldm"])


def test_the_demos_config_is_one() -> None:
    config = parse(["--config", "configs/demo_features.yaml"], ExtractConfig, "extract", "")
    assert (config.out, config.synthetic, config.encoders) == ("runs/demo_features", True, ("zoomldm",))
    # docs/results/feature_choice.md says why
    assert (config.features.blocks, config.features.timestep) == (("up.3",), 300)


def test_glass_is_an_empty_bag(done: ExtractConfig) -> None:
    with BagFile(Path(done.out) / "features" / "glass.h5") as bag:
        width = describe(done)["zoomldm"].dim
        assert (bag.shape("20x"), bag.shape("5x")) == ((0, width), (0, width))


def test_a_run_leaves_pictures_tissue_and_a_page(done: ExtractConfig) -> None:
    out = Path(done.out)
    with Image.open(out / "thumbnails" / "a.jpg") as thumbnail:
        assert max(thumbnail.size) <= 1024
    report, page = json.loads((out / "report.json").read_text()), (out / "report.html").read_text()
    assert {r["slide"]: (r["status"], r["code"]) for r in report["slides"]} == {
        "a": ("done", ""),
        "glass": ("done", "no_tissue"),  # a note: its bag is empty
    }
    assert "--finder.method everything" in page
    assert set(report["stages"]) == {"plan", "read", "encode", "write"}
    assert 0 <= report["model_waited_share"] <= 1
    assert "http" not in page
    assert page.count("data:image/jpeg") == 2


def test_a_second_run_does_nothing_and_a_lost_or_cut_file_is_made_again(done: ExtractConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done.out, out)
    again, bag, whole = replace(done, out=str(out)), out / "features" / "a.h5", Path(done.out) / "features" / "a.h5"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".h5", ".jpg", ".geojson", ".html")}
    assert run(again) == {"a": "", "glass": ""}
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    bag.write_bytes(bag.read_bytes()[: bag.stat().st_size // 2])
    (out / "thumbnails" / "glass.jpg").unlink()
    assert run(again) == {"a": "", "glass": ""}
    assert_same(bag, whole)
    assert (out / "thumbnails" / "glass.jpg").exists()
    assert (out / "features" / "glass.h5").stat().st_mtime_ns == before[out / "features" / "glass.h5"]


def test_sigterm_ends_it_with_its_code_without_ray_too(tiny: Path, tmp_path: Path) -> None:
    config = config_of(tiny, tmp_path / "slides", tmp_path / "out")
    write_slide(tmp_path / "slides" / "a.tif")
    assert exit_code(die_in_the_second_block, flags(config), signal.SIGTERM) == 143
    assert (tmp_path / "out" / "report.html").is_file()
    assert run(config) == {"a": ""}


def test_a_killed_run_continues_to_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    config = config_of(tiny, tmp_path / "slides", tmp_path / "out")
    write_slide(tmp_path / "slides" / "a.tif")
    whole = replace(config, out=str(tmp_path / "whole"))
    assert run(whole) == {"a": ""}
    assert exit_code(die_in_the_second_block, flags(config)) == -signal.SIGKILL
    blocks = tmp_path / "out" / "features" / "a.h5.blocks"
    assert len(list(blocks.glob("*.npy"))) == 3
    kept = {p: p.stat().st_mtime_ns for p in blocks.glob("*.npy")}
    assert not (tmp_path / "out" / "features" / "a.h5").exists()
    with full_disk(4000), pytest.raises(CanvasError, match="full"):
        run(config)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    # Another block size: what is written counts by its rows.
    assert run(replace(config, blocks=BlockConfig(parents=2))) == {"a": ""}
    assert_same(tmp_path / "out" / "features" / "a.h5", tmp_path / "whole" / "features" / "a.h5")


def test_bad_slides_are_listed_and_tried_again_alone(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides, out = tmp_path / "slides", tmp_path / "slides" / "out"  # its thumbnails are no slides
    for name in ("good.tif", "x/twin.tif", "y/twin.tif"):
        write_slide(slides / name, 300, 300)
    write_slide(slides / "scaleless.tif", 300, 300, mpp=None)
    (slides / "text.svs").write_text("not a slide")
    config = config_of(tiny, slides, out)
    assert main(flags(config)) == 3
    said = capsys.readouterr().out
    codes = {"text": "not_a_slide", "twin": "duplicate_name", "scaleless": "no_mpp"}
    assert all(f"failed ({code}): {name}" in said for name, code in codes.items())
    good = out / "features" / "good.h5"
    good.unlink()
    (slides / "y" / "twin.tif").unlink()
    shutil.copy(slides / "good.tif", slides / "text.svs")
    assert main([*flags(config), "--retry-failed"]) == 3
    assert not good.exists()
    report = {r["slide"]: r["code"] for r in json.loads((out / "report.json").read_text())["slides"]}
    assert report == {"good": "", "scaleless": "no_mpp", "text": "", "twin": ""}
    assert main([*flags(config), "--mpp", "0.5"]) == 0
    assert good.exists()
    assert main([*flags(config), "--dry-run"]) == 3
    assert "no_mpp" in (out / "slides.csv").read_text()


def test_a_slide_that_vanishes_after_its_plan(tiny: Path, tmp_path: Path) -> None:
    config = config_of(tiny, tmp_path / "slides", tmp_path / "out")
    gone, stays = (write_slide(tmp_path / "slides" / name) for name in ("a.tif", "b.tif"))

    @contextmanager
    def start_backend(config: ExtractConfig, names: tuple[str, str]) -> Iterator[Backend]:
        with extract_alone(config, names) as backend:

            def work(tasks: Sequence[ExtractTask], given_up: Collection[str] = ()) -> Iterator[Message]:
                for message in backend.work(tasks, given_up):
                    os.truncate(gone, 0)  # after the plan, before the last block
                    yield message

            yield replace(backend, work=work)

    records = extract(config, start_backend, Progress())
    assert [(r.slide, r.status) for r in records] == [("a", SLIDE_FAILED), ("b", "done")]
    assert records[0].code
    assert stays.exists()


def test_damaged_tiles_are_masked_and_too_many_fail_the_slide(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "slides" / "a.tif"
    path.parent.mkdir()
    picture = np.asarray(tissue(350, 550).crop((0, 0, 256, 128)).resize((1024, 512)))
    write_tiff(path, [picture, box(picture, 4)], 0.5, compression="jpeg")  # the tissue is seen at the whole level
    overwrite(path, tile_bytes(path, 256, 512)[0], bytes(tile_bytes(path, 256, 512)[1]))
    config = config_of(tiny, tmp_path / "slides", tmp_path / "out")
    strict = replace(config, blocks=replace(config.blocks, slide_damage=0.01))
    assert run(strict) == {"a": "damaged"}
    assert run(config) == {"a": ""}
    found = content(tmp_path / "out" / "features" / "a.h5")
    assert found["20x/coords"][~found["20x/valid"]].tolist() == [[512, 256]]
    assert np.isnan(found["20x/features"][~found["20x/valid"]]).all()
    assert np.isfinite(found["20x/features"][found["20x/valid"]]).all()
    assert not found["5x/valid"].any()


def test_edited_tissue_is_read_back(done: ExtractConfig, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    ring = [[0, 0], [1024, 0], [1024, 256], [0, 256], [0, 0]]
    (drawn / "a.geojson").write_text(json.dumps({"type": "Feature", "geometry": {
        "type": "Polygon", "coordinates": [ring]}, "properties": {}}))  # fmt: skip
    config = replace(done, out=str(tmp_path / "out"), tissue=str(drawn))
    assert run(config) == {"a": "", "glass": "bad_tissue"}
    assert content(tmp_path / "out" / "features" / "a.h5")["20x/coords"].max(axis=0).tolist() == [768, 0]


def test_tissue_that_is_drawn_over_a_collar_is_none(tiny: Path, tmp_path: Path) -> None:
    slides, drawn = tmp_path / "slides", tmp_path / "drawn"
    slides.mkdir()
    drawn.mkdir()
    pixels = np.full((512, 1024, 3), (190, 100, 170), np.uint8)
    pixels[:, :512] = 0
    tifffile.imwrite(slides / "a.tif", pixels, tile=(256, 256), photometric="rgb", resolution=(2e4, 2e4), metadata=None,
                     resolutionunit="CENTIMETER", extratags=[(42113, "s", 0, "0", True)])  # fmt: skip
    ring = [[0, 0], [1024, 0], [1024, 512], [0, 512], [0, 0]]
    (drawn / "a.geojson").write_text(json.dumps({"type": "Feature", "geometry": {
        "type": "Polygon", "coordinates": [ring]}, "properties": {}}))  # fmt: skip
    assert run(replace(config_of(tiny, slides, tmp_path / "out"), tissue=str(drawn))) == {"a": ""}
    found = content(tmp_path / "out" / "features" / "a.h5")
    assert found["20x/coords"].tolist() == [[512, 0], [768, 0], [512, 256], [768, 256]]


def test_nothing_is_written_through_a_link(tiny: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    config = config_of(tiny, tmp_path / "slides", tmp_path / "out")
    write_slide(tmp_path / "slides" / "a.tif", 300, 300)
    (tmp_path / "out" / "features").mkdir(parents=True)
    (tmp_path / "out" / "thumbnails").mkdir()
    (tmp_path / "out" / "features" / "a.h5").symlink_to(victim)
    (tmp_path / "out" / "thumbnails" / "a.jpg").symlink_to(victim)
    assert run(config) == {"a": "bad_output"}
    (tmp_path / "out" / "features" / "a.h5").unlink()
    assert run(config) == {"a": ""}
    assert victim.read_text() == "mine"


def test_other_settings_and_empty_folders_are_refused(done: ExtractConfig, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CanvasMismatchError, match=r"features\.timestep was 100, now 50"):
        run(replace(done, features=replace(done.features, timestep=50)))
    with pytest.raises(EngineError, match="holds none"):
        run(config_of(tiny, tmp_path, tmp_path / "out"))
    with pytest.raises(EngineError, match="fit together"):
        run(replace(done, out=str(tmp_path), features=replace(done.features, blocks=("up.9",))))
    with pytest.raises(EngineError, match=r"grid\.mpp"):
        run(replace(done, out=str(tmp_path), grid=replace(done.grid, mpp=0.25)))


def test_own_condition_and_two_encoders_in_one_pass(tmp_path: Path) -> None:
    write_slide(tmp_path / "slides" / "a.tif", 300, 300)
    settings = FeatureConfig(condition="own", batch=2)
    slides, out = str(tmp_path / "slides"), str(tmp_path / "out")
    config = ExtractConfig(slides, out, encoders=("zoomldm", "demo"), finder=EVERYTHING, features=settings)
    config = replace(config, model=replace(config.model, dtype="float32"))  # the encoders below read it, too
    assert run(config) == {"a": ""}
    own, ssl = (content(tmp_path / "out" / f / "a.h5") for f in ("features", "features_demo"))
    np.testing.assert_array_equal(own["20x/coords"], ssl["20x/coords"])
    encoders = load_encoders(config, "cpu")
    with open_slide(tmp_path / "slides" / "a.tif") as slide:
        grid = plan_grid(slide, find_tissue(slide, config.finder), config.grid)
        tiles = TilePixels("a", "20x", grid.coords, read_parent(slide, grid, 0).children.transpose(0, 3, 1, 2).copy())
    expected = encode_all(encoders, tiles)
    np.testing.assert_array_equal(ssl["20x/features"], expected["demo"])
    # The conditioning vectors are computed among others here, which may change their last bits.
    np.testing.assert_allclose(own["20x/features"], expected["zoomldm"], rtol=1e-3, atol=1e-4)
