"""Preparation on Ray: the arrays of the local run, though an encoder is killed on the way."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.slide_pipeline import slides_on_ray
from engine.core.config import RayConfig
from engine.core.progress import Progress
from engine.datasets.blocks import PrepareStages
from engine.datasets.config import PrepareBlocks, PrepareConfig
from engine.datasets.dataset import PreparedSet
from engine.datasets.prepare import StartBackend, prepare
from engine.model.encoders.demo import DemoEncoder
from engine.model.encoders.texture import RAW_DIM
from engine.model.zoomldm import ZoomLDM
from engine.pipeline.stages import Backend, local_backend
from engine.slides.tissue import TissueConfig
from tests.support.killing import killing
from tests.support.tiny_run import narrow_config
from tests.support.written_slides import box, tissue, write_tiff

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
CODES = {"a": "", "none": "not_a_slide"}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> PrepareConfig:
    """A slide of 8 × 4 cells and one that is none, done without Ray."""
    folder = tmp_path_factory.mktemp("preparation")
    torch.manual_seed(0)
    model = ZoomLDM(narrow_config(encoder="demo"))
    model.extras = {"encoder/model": DemoEncoder(torch.zeros(RAW_DIM), torch.randn(RAW_DIM, 16) / 10).tensors()}
    model.save_pretrained(folder / "tiny")
    (folder / "slides").mkdir()
    picture = np.asarray(tissue(350, 550).crop((0, 0, 256, 512)).resize((1024, 2048)))
    write_tiff(folder / "slides" / "a.tif", [picture, box(picture, 4)], 0.5)
    (folder / "slides" / "none.svs").write_text("not a slide")
    config = PrepareConfig(str(folder / "slides"), str(folder / "local"), coarsest="5x")
    config = replace(config, finder=TissueConfig("everything"), blocks=PrepareBlocks(16, 4), keep_images=True)
    section = replace(config.model, source=str(folder / "tiny"), device="cpu", dtype="float32")
    config = replace(config, model=section, ray=RayConfig(batch_timeout_s=300))
    assert codes(config, local_backend) == CODES
    return config


def codes(config: PrepareConfig, start_backend: StartBackend) -> dict[str, str]:
    return {r.slide: r.code for r in prepare(config, start_backend, Progress())}


def arrays(config: PrepareConfig) -> dict[str, bytes]:
    root = Path(config.out) / "slides"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.npy")}


def test_the_arrays_of_the_local_run_though_an_encoder_is_killed(local: PrepareConfig, tmp_path: Path) -> None:
    killed: list[int] = []

    @contextmanager
    def start_backend(stages: PrepareStages) -> Iterator[Backend]:
        yield killing(slides_on_ray(stages), killed)

    config = replace(local, out=str(tmp_path / "ray"))
    assert codes(config, start_backend) == CODES
    assert killed
    assert arrays(config) == arrays(local)
    assert PreparedSet(config.out).count(2) == 2
