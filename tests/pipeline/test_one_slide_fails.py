"""An exception of any type, at any stage of one slide, costs that slide and nobody else; interruption interrupts."""

import lzma
import shutil
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
import torch
import zarr.errors

from engine.core.errors import CanvasError, CheckpointError, EngineError, SlideError
from engine.core.progress import Progress
from engine.datasets import blocks as preparation_blocks
from engine.datasets.blocks import PatchEncoder
from engine.datasets.config import PrepareBlocks, PrepareConfig
from engine.datasets.prepare import prepare
from engine.datasets.writer import PreparedWriter
from engine.evaluation.samples.sets import open_pictures
from engine.extract_features import main
from engine.features import blocks as extraction_blocks
from engine.features.bag_writer import BagWriter
from engine.features.blocks import BlockEncoder, SlideWorker
from engine.features.config import BlockConfig, ExtractConfig
from engine.features.encoders import extract_alone
from engine.features.extract import extract
from engine.features.tile_encoders import FeatureConfig
from engine.model.encoders.demo import DemoEncoder
from engine.model.encoders.texture import RAW_DIM
from engine.model.zoomldm import ZoomLDM
from engine.pipeline.report import SLIDE_FAILED
from engine.pipeline.stages import Backend, SlideFailure, local_backend
from engine.pipeline.writer import SlidesUnderWay
from engine.slides import inspect
from engine.slides import slide as slides
from engine.slides.boundary import one_slide
from engine.slides.tile_grid import GridConfig
from engine.slides.tissue import TissueConfig
from tests.support.tiny_run import narrow_config
from tests.support.written_slides import METRES, tissue, write_geotiff, write_tiff

RAISED: dict[str, Exception] = {
    "os": OSError(5, "Input/output error"), "value": ValueError("bad"), "memory": MemoryError(),
    "key": KeyError("multiscales"), "runtime": RuntimeError("codec"), "struct": struct.error("unpack"),
    "zlib": zlib.error("-3"), "lzma": lzma.LZMAError("corrupt"), "assertion": AssertionError(),
    "recursion": RecursionError("too deep"), "type": TypeError("None"), "attribute": AttributeError("tags"),
    "zero": ZeroDivisionError(), "stop": StopIteration(), "missing": ImportError("codec"), "plain": Exception("own"),
    "unicode": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    "tifffile": tifffile.TiffFileError("not a TIFF"), "openslide": openslide.OpenSlideError("bad tile"),
    "zarr": zarr.errors.MetadataValidationError("no"), "cuda": torch.OutOfMemoryError("CUDA out of memory"),
    "engine": EngineError("what must hold"), "network": CheckpointError("not finite"),
}  # fmt: skip
"""By the name of the slide that raises it."""
CODES = {"memory": "out_of_memory", "cuda": "out_of_memory", "os": "disk_error"}
OWN = ("engine", "network")
"""Errors of ours keep what they say."""


def fail(slide: str) -> None:
    if slide in RAISED:
        raise RAISED[slide]


def failing(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
    """Return a function that first raises what belongs to the slide that `name` finds in its arguments."""

    def wrapped(*arguments: Any, **more: Any) -> Any:
        fail(name(*arguments))
        return function(*arguments, **more)

    return wrapped


def of_slide(slide: Any, *_: Any) -> str:
    return slide.name


OPEN = (slides, "_open_levels", lambda path, name, *_: name)
EXTRACTION = {
    "open": OPEN,
    "tissue": (extraction_blocks, "tissue_of", of_slide),
    "plan": (extraction_blocks, "plan_grid", of_slide),
    "read": (extraction_blocks, "read_parent", of_slide),
    "encode": (BlockEncoder, "encode", lambda encoder, pixels: pixels.block.slide),
    "write": (BagWriter, "write", lambda writer, *_: writer.plan.attributes.slide),
    "finish": (BagWriter, "finish", lambda writer: writer.plan.attributes.slide),
}
PREPARATION = {
    "open": OPEN,
    "tissue": (preparation_blocks, "read_overview", of_slide),
    "plan": (preparation_blocks, "plan_patches", of_slide),
    "read": (preparation_blocks, "_read_cells", of_slide),
    "encode": (PatchEncoder, "encode", lambda encoder, pixels: pixels.block.slide),
    "write": (PreparedWriter, "write", lambda writer, *_: writer.folder.name),
    "finish": (PreparedWriter, "finish", lambda writer: writer.folder.name),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good slide before, between and behind one for every exception."""
    folder = tmp_path_factory.mktemp("slides")
    picture = np.asarray(tissue(350, 550).crop((0, 0, 128, 128)).resize((256, 256)))
    first = write_tiff(folder / "a_good.tif", [picture], 0.5)
    for name in (*RAISED, "n_good", "zz_good"):
        shutil.copy(first, folder / f"{name}.tif")
    return folder


def inject(patch: pytest.MonkeyPatch, where: Any, function: str, name: Callable[..., str]) -> None:
    patch.setattr(where, function, failing(getattr(where, function), name))


def check(records: list[Any]) -> None:
    """The good ones are done; each bad one is listed with a code, what came, and what to do."""
    found = {record.slide: record for record in records}
    assert len(found) == len(RAISED) + 3
    assert [found[name].status for name in ("a_good", "n_good", "zz_good")] == ["done"] * 3
    for name, raised in RAISED.items():
        record = found[name]
        assert record.status == SLIDE_FAILED, name
        assert record.code, name
        if name in OWN:
            assert str(raised) in record.message
            continue
        assert record.code == CODES.get(name, "unexpected"), name
        assert f"{name}: " in record.message
        if name == "stop":
            continue  # Python makes a RuntimeError of it wherever a generator is left by it
        assert type(raised).__name__ in record.message
        assert "test_one_slide_fails.py" in record.message, "where it came from"
        assert record.message.endswith((".", ")"))


def features_of(slides: Path, out: Path) -> ExtractConfig:
    config = ExtractConfig(str(slides), str(out), encoders=("texture",), finder=TissueConfig("everything"))
    model = replace(config.model, device="cpu", dtype="float32")
    return replace(config, model=model, features=FeatureConfig(batch=1))


@pytest.mark.parametrize("stage", EXTRACTION)
def test_extraction(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    inject(monkeypatch, *EXTRACTION[stage])
    config = features_of(folder, tmp_path)
    check(extract(config, extract_alone, Progress()))
    assert {p.stem for p in (tmp_path / "features").glob("*.h5")} == {"a_good", "n_good", "zz_good"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = ZoomLDM(narrow_config(magnifications=("20x",), base_mpp=0.5, encoder="demo"))
    made.extras = {"encoder/model": DemoEncoder(torch.zeros(RAW_DIM), torch.randn(RAW_DIM, 16) / 10).tensors()}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage", PREPARATION)
def test_preparation(folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    inject(monkeypatch, *PREPARATION[stage])
    config = PrepareConfig(str(folder), str(tmp_path), coarsest="20x", finder=TissueConfig("everything"))
    config = replace(config, blocks=PrepareBlocks(16, 1))
    config = replace(config, model=replace(config.model, source=str(model), device="cpu", dtype="float32"))
    check(prepare(config, local_backend, Progress()))
    assert {p.parent.name for p in tmp_path.glob("slides/*/slide.json")} == {"a_good", "n_good", "zz_good"}


@pytest.mark.parametrize("stage", ["open", "tissue", "plan"])
def test_the_dry_run(folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    inject(
        monkeypatch,
        *{"open": OPEN, "tissue": (inspect, "find_tissue", of_slide), "plan": (inspect, "plan_grid", of_slide)}[stage],
    )
    rows = {
        r.slide: r for r in inspect.inspect_slides(sorted(folder.iterdir()), TissueConfig("everything"), GridConfig())
    }
    assert {name for name, row in rows.items() if row.usable} == {"a_good", "n_good", "zz_good"}
    assert {rows[name].problem for name in CODES} == {"out_of_memory", "disk_error"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interruption_passes(stop: type[BaseException]) -> None:
    with pytest.raises(stop), one_slide("a", Path("a.tif"), "read"):
        raise stop


def test_a_full_disk_is_no_fault_of_a_slide_but_a_name_too_long_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = features_of(folder, tmp_path)
    for number, stops in ((28, True), (36, False)):  # ENOSPC, ENAMETOOLONG
        with monkeypatch.context() as patch:
            patch.setitem(RAISED, "n_good", OSError(number, "no"))
            inject(patch, *EXTRACTION["write"])
            if stops:
                with pytest.raises(CanvasError, match="is full"):
                    extract(config, extract_alone, Progress())
            else:
                codes = {record.slide: record.code for record in extract(config, extract_alone, Progress())}
                assert (codes["n_good"], codes["zz_good"]) == ("disk_error", "")


def test_a_picture_from_above_among_slides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At 8 µm/px the overview of 64 px of 0.6 m would have 16 PiB: it is refused before any px."""
    write_geotiff(tmp_path / "slides.tif", METRES).rename(tmp_path / "above.tif")
    arguments = ["--slides", str(tmp_path), "--out", str(tmp_path / "out"), "--encoders", "[texture]"]
    write_tiff(tmp_path / "good.tif", [np.asarray(tissue(350, 550).crop((0, 0, 256, 256)))], 0.5)
    assert main([*arguments, "--ray.enabled", "false", "--dry-run"]) == 3
    assert "too_coarse: above: for tiles of 0.5 µm/px" in capsys.readouterr().out
    assert main([*arguments, "--ray.enabled", "false", "--model.device", "cpu", "--finder.method", "everything"]) == 3
    assert capsys.readouterr().out.endswith(
        "failed (too_coarse): above\nMend them, then run the command with --retry-failed.\n"
    )
    assert (tmp_path / "out" / "features" / "good.h5").exists()


def test_a_failure_that_overtakes_its_plan_is_not_waited_for(folder: Path, tmp_path: Path) -> None:
    """On Ray Data the block that failed may arrive before the plan it belongs to."""
    config = features_of(folder, tmp_path)

    @contextmanager
    def start_backend(config: ExtractConfig, names: tuple[str, str]) -> Iterator[Backend]:
        def work(tasks: Sequence[Any], given_up: Collection[str] = ()) -> Iterator[Any]:
            for task in tasks:
                if task.slide == "n_good":
                    yield SlideFailure(task.slide, task.path, "vanished", "n_good: gone.")
                yield from backend.work([task])  # unaware of what was given up

        with extract_alone(config, names) as backend:
            yield replace(backend, work=work)

    codes = {record.slide: record.code for record in extract(config, start_backend, Progress())}
    assert codes.pop("n_good") == "vanished"
    assert set(codes.values()) == {""}


@pytest.mark.parametrize("stage", ["read", "encode", "write"])
def test_of_a_slide_that_failed_nothing_more_is_read_or_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """But for the block that is on its way."""
    picture = np.asarray(tissue(350, 550))[:256]
    (tmp_path / "slides").mkdir()
    for name in ("a", "b"):
        write_tiff(tmp_path / "slides" / f"{name}.tif", [np.concatenate([picture] * 12, axis=1)], 0.5)
    config = replace(features_of(tmp_path / "slides", tmp_path / "out"), blocks=BlockConfig(parents=1))
    done: dict[str, list[str]] = {"read": [], "encode": [], "write": []}

    def count(owner: type, method: str, kind: str, slide_of: Callable[[Any], str]) -> None:
        original = getattr(owner, method)

        def counted(self: Any, item: Any) -> Any:
            done[kind].append(slide_of(item))
            if kind == stage and done[kind].count("a") == 2 and slide_of(item) == "a":
                raise SlideError("bad", "a: broken on purpose.")
            return original(self, item)

        monkeypatch.setattr(owner, method, counted)

    count(SlideWorker, "read", "read", lambda block: block.slide)
    count(BlockEncoder, "encode", "encode", lambda pixels: pixels.block.slide)
    count(SlidesUnderWay, "take", "write", lambda block: block.slide)
    records = extract(config, extract_alone, Progress())
    assert [(r.slide, r.code) for r in records] == [("a", "bad"), ("b", "")]
    blocks = done["read"].count("b")
    assert blocks >= 6
    assert done["encode"].count("b") == blocks
    assert max(done[kind].count("a") for kind in done) <= 4


def test_a_set_of_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, *OPEN)
    found = open_pictures(folder)
    assert [source.name for source in found.sources] == ["a_good", "n_good", "zz_good"]
    assert {Path(one.path).stem for one in found.unusable} == set(RAISED)
