"""The Python API: its names, what they do on tiny models, and that they neither parse a command line nor exit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import engine
import mil
from engine.api.learning import quality, sample_tiles, train
from engine.api.runs import Run, enlarge, generate, load_config
from engine.api.slides import SlidesFailedError, extract_features, prepare_dataset
from engine.core.cli import PROJECT_ROOT
from engine.core.errors import ConfigError, EngineError
from engine.sampling.config import RunConfig
from tests.support.tiny_run import store_inputs

NAMES = {
    *("Bag", "EngineError", "LazyPicture", "LocalDenoiser", "Run", "RunConfig", "Slide", "TrainingSet", "ZoomLDM"),
    *("enlarge", "extract_features", "generate", "load_config", "open_picture", "open_slide", "prepare_dataset"),
    *("quality", "sample_tiles", "train"),
}
LIGHT = """
import sys, time
start = time.perf_counter()
import engine, mil
assert not {"torch", "zarr", "ray", "numpy"} & set(sys.modules), "an import of the packages must stay light"
for package in (engine, mil):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name).__doc__ or name == "__version__", name
import importlib
for name in ("train", "quality", "extract_features"):  # commands of the same names
    command = importlib.import_module("engine." + name)
    assert callable(command.main) and callable(getattr(engine, name)), name
assert "ray" not in sys.modules
"""


def test_names_are_public_documented_and_loaded_when_used() -> None:
    assert set(engine.__all__) == NAMES | {"__version__"}
    assert set(mil.__all__) == {"MILClassifier", "load_bags"}
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", [engine, mil])
def test_another_name_is_refused_with_those_there_are(package: object) -> None:
    with pytest.raises(AttributeError, match="public names are"):
        package.generat  # noqa: B018


class Told:
    """A progress callback that counts."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self.tile_count = 0
        self.scores: dict[str, object] = {}

    def step(self, name: str, done: int, total: int) -> None:
        self.steps.append((name, done, total))

    def tiles(self, count: int) -> None:
        self.tile_count += count

    def judged(self, scores: dict[str, object]) -> None:  # type: ignore[override]
        self.scores = dict(scores)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("api")
    keys = {key: str(value) for key, value in store_inputs(folder, 2, 2).items()}
    return load_config(
        None,
        **{"model.source": keys["model.source"], "embeddings": keys["embeddings"]},
        canvas={"height": 512, "width": 512},
        sampling={"stride": 500, "weight": 0.0},
        output={"folder": str(folder / "run"), "formats": ["png"]},
    )


@pytest.fixture(scope="module")
def told() -> Told:
    return Told()


@pytest.fixture(scope="module")
def run(config: RunConfig, told: Told) -> Run:
    return generate(config, backend="local", progress=told)


def test_a_run_says_what_it_is(run: Run, config: RunConfig, told: Told) -> None:
    assert (run.image.height, run.image.width) == (512, 512)
    assert run.guide is not None
    assert run.guide.shape[2] == 3
    assert run.report["seam_score"] == told.scores["seam_score"]
    assert told.steps[-1][1:] == (2, 2)
    assert told.tile_count == run.report["tiles"]
    assert run.config.canvas == config.canvas
    assert "20x" in run.plan()
    assert run.thumbnail(100).shape == (100, 100, 3)
    assert np.array_equal(Run.open(run.folder).thumbnail(512), run.image.read(0, 512).transpose(1, 2, 0))


def test_a_run_shows_itself_in_a_notebook(run: Run) -> None:
    page = run._repr_html_()
    assert page.count("data:image/png;base64,") == 2
    assert "seam score" in page
    assert "Synthetic" in page


def test_a_region_again_and_an_export(run: Run) -> None:
    again = run.inpaint((0, 0, 100, 60), seed=3, backend="local", progress=False)
    assert again.folder != run.folder
    assert not np.array_equal(again.thumbnail(512), run.thumbnail(512))
    far = np.s_[:, :, 448:]
    assert np.array_equal(again.image.read(448, 512)[far], run.image.read(448, 512)[far])
    assert again.config.canvas == run.config.canvas
    assert run.export("png", max_px=64).suffix == ".png"


def test_mistakes_raise_and_do_not_exit(run: Run, config: RunConfig, tmp_path: Path) -> None:
    for wrong in (
        lambda: load_config(canvas={"hight": 512}),
        lambda: load_config(tmp_path / "nowhere.yaml"),
        lambda: generate(config, backend="rays"),  # type: ignore[arg-type]
        lambda: run.inpaint((0, 0, 5000, 5), seed=1),
        lambda: run.export("png", level=1, max_px=3),
        lambda: enlarge(np.zeros((8, 8), np.uint8), scale=4),
        lambda: sample_tiles("demo", "7x", count=1),
        lambda: train(tmp_path / "nowhere.yaml"),
        lambda: train("configs/train_demo.yaml", task="sing"),
        lambda: quality(tmp_path, stride=0),
    ):
        with pytest.raises(ConfigError):
            wrong()
    for wrong in (lambda: Run(tmp_path), lambda: extract_features(tmp_path, tmp_path / "out", progress=False)):
        with pytest.raises(EngineError):
            wrong()


def test_single_tiles() -> None:
    tiles = sample_tiles("demo", "5x", count=3, steps=2, sampling={"batch_size": 2})
    assert (tiles.shape, tiles.dtype) == ((3, 256, 256, 3), np.uint8)
    assert np.array_equal(sample_tiles("demo", "5x", count=3, steps=2, sampling={"batch_size": 2}), tiles)


def test_slides_to_bags_and_a_training_set(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    noise = np.random.default_rng(0).integers(90, 200, (640, 640, 3)).astype(np.uint8)
    import PIL.Image

    PIL.Image.fromarray(noise).save(slides / "one.png")
    (slides / "two.png").write_bytes(b"no picture")
    keys = {"mpp": 0.5, "encoders": ["texture"], "backend": "local", "progress": False}
    with pytest.raises(SlidesFailedError, match="two") as caught:
        extract_features(slides, tmp_path / "features", **keys)
    assert set(caught.value.failed) == {"two"}
    bags = extract_features(slides, tmp_path / "features", skip_failed=True, **keys)
    assert [bag.path.stem for bag in bags] == ["one"]
    (stored,) = mil.load_bags(tmp_path / "features" / "features")
    assert stored.read().shape[1] == sum(stored.widths)
    with pytest.raises(SlidesFailedError):
        prepare_dataset(slides, tmp_path / "set", mpp=0.5, backend="local", progress=False, coarsest="20x")


def test_the_readme_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader types it, in a folder where `make demo` has been."""
    snippet = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").write_text("taken")
    names: dict[str, object] = {}
    exec(snippet, names)
    assert isinstance(names["run"], Run)
    assert names["run"].report["consistency_psnr_db"] > 15
    assert getattr(names["tiles"], "shape", None) == (4, 256, 256, 3)
