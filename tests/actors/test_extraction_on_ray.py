"""Extraction on Ray: the bytes of the local run, on two CPUs without standing still, whatever dies."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import killing
from written_slides import tissue, write_tiff

from actors import slide_pipeline as on_ray
from actors.slide_pipeline import Shape, shape_of, work_on_ray
from engine.config import RayConfig
from engine.errors import ClusterError
from engine.extraction import Engage, extract
from engine.extraction_config import BlockConfig, ExtractConfig
from engine.extraction_local import ExtractStages, extract_alone
from engine.features import FeatureConfig
from engine.model.zoomldm import ZoomLDM, tiny_config
from engine.progress import Progress
from engine.slide_crew import Crew
from engine.slides.tissue import TissueConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    """Two slides and one that is none, done without Ray."""
    folder = tmp_path_factory.mktemp("extraction")
    torch.manual_seed(0)
    ZoomLDM(tiny_config()).save_pretrained(folder / "tiny")
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


def codes(config: ExtractConfig, engage: Engage) -> dict[str, str]:
    return {r.slide: r.code for r in extract(config, engage, Progress())}


def bags(config: ExtractConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (Path(config.out) / "features").glob("*.h5")}


def test_the_bytes_of_the_local_run_on_all_replicas_though_one_is_killed(local: ExtractConfig, tmp_path: Path) -> None:
    config = replace(local, out=str(tmp_path / "ray"))
    killed: list[int] = []

    @contextmanager
    def engage(config: ExtractConfig, names: tuple[str, str]) -> Iterator[Crew]:
        yield killing(work_on_ray(ExtractStages(config, names)), killed)

    assert codes(config, engage) == CODES
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
