"""Extraction on Ray: the bytes of the local run, on two CPUs without standing still, whatever dies."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors import slide_pipeline as on_ray
from actors.slide_pipeline import Shape, shape_of, slides_on_ray
from engine.core.config import RayConfig
from engine.core.errors import ClusterError
from engine.core.progress import Progress
from engine.features.blocks import BlockFeatures, ExtractTask
from engine.features.config import BlockConfig, ExtractConfig
from engine.features.encoders import ExtractStages, extract_alone
from engine.features.extract import StartBackend, extract
from engine.features.tile_encoders import FeatureConfig
from engine.model.zoomldm import ZoomLDM
from engine.pipeline.stages import Backend
from engine.slides.tissue import TissueConfig
from tests.support.killing import killing
from tests.support.tiny_run import narrow_config
from tests.support.written_slides import tissue, write_tiff

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    """Two slides and one that is none, done without Ray."""
    folder = tmp_path_factory.mktemp("extraction")
    torch.manual_seed(0)
    ZoomLDM(narrow_config()).save_pretrained(folder / "tiny")
    (folder / "slides").mkdir()
    for name, width in (("large", 3000), ("small", 500)):
        picture = np.asarray(tissue(350, 550).crop((0, 0, 550, 60)).resize((width, 300)))
        write_tiff(folder / "slides" / f"{name}.tif", [picture], 0.5)
    (folder / "slides" / "none.svs").write_text("not a slide")
    config = ExtractConfig(str(folder / "slides"), str(folder / "local"), finder=TissueConfig("everything"))
    model = replace(config.model, source=str(folder / "tiny"), device="cpu", dtype="float32")
    small = FeatureConfig(blocks=("up.1",), timestep=100, batch=2)
    config = replace(
        config, model=model, features=small, blocks=BlockConfig(parents=1), ray=RayConfig(batch_timeout_s=300)
    )
    assert codes(config, extract_alone) == CODES
    return config


CODES = {"large": "", "none": "not_a_slide", "small": ""}


def codes(config: ExtractConfig, start_backend: StartBackend) -> dict[str, str]:
    return {r.slide: r.code for r in extract(config, start_backend, Progress())}


def test_of_a_slide_that_was_given_up_nothing_more_comes(local: ExtractConfig) -> None:
    """The driver says so while blocks are on their way."""
    stages = ExtractStages(local, ("20x", "5x"))
    task = ExtractTask("large", Path(local.slides) / "large.tif", ({},))
    given_up: set[str] = set()
    blocks = 0
    for message in slides_on_ray(stages).work([task], given_up):
        given_up.add(message.slide)  # as soon as its plan is here
        blocks += isinstance(message, BlockFeatures)
    with extract_alone(local, ("20x", "5x")) as backend:
        assert blocks < sum(isinstance(message, BlockFeatures) for message in backend.work([task]))


def bags(config: ExtractConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (Path(config.out) / "features").glob("*.h5")}


def test_the_bytes_of_the_local_run_on_all_replicas_though_one_is_killed(local: ExtractConfig, tmp_path: Path) -> None:
    config = replace(local, out=str(tmp_path / "ray"))
    killed: list[int] = []

    @contextmanager
    def start_backend(config: ExtractConfig, names: tuple[str, str]) -> Iterator[Backend]:
        yield killing(slides_on_ray(ExtractStages(config, names)), killed)

    assert codes(config, start_backend) == CODES
    assert killed
    assert bags(config) == bags(local)
    assert set(bags(config)) == {"large.h5", "small.h5"}


def test_shares_leave_a_reader_on_every_cpu(local: ExtractConfig) -> None:
    assert shape_of(local) == Shape(2, "cpu", 0.0, on_ray.ENCODE_CPUS)
    many = replace(local, ray=replace(local.ray, replicas=16))
    assert shape_of(many).replicas == 2  # more would take what the readers need, and wait for ever
    assert 2 * on_ray.ENCODE_CPUS + on_ray.READ_CPUS <= 2
    with pytest.raises(ClusterError, match=r"model\.device=cuda needs GPUs"):
        shape_of(replace(local, model=replace(local.model, device="cuda")))
