"""What bags say of encoders is known without a network: a finished folder starts without one being filled."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from torch import nn

from engine.core.errors import EngineError
from engine.core.progress import Progress
from engine.datasets.config import PrepareConfig
from engine.datasets.networks import load_networks, set_facts
from engine.features.config import BlockConfig, ExtractConfig
from engine.features.encoders import EncoderFacts, describe, extract_alone, load_encoders
from engine.features.extract import extract
from engine.features.tile_encoders import FeatureConfig
from engine.model.encoders.registry import PUBLISHED, describe_encoder, load_encoder
from engine.model.encoders.vit import build_vit
from engine.model.zoomldm import ZoomLDM, autoencoder_digest
from engine.slides.tissue import TissueConfig
from mil.data.feature_files import open_features
from tests.support.tiny_run import narrow_config
from tests.support.written_slides import tissue, write_tiff


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    ZoomLDM(narrow_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(self: nn.Module, *_: object, **__: object) -> None:
        raise AssertionError(f"a {type(self).__name__} was given its weights")

    monkeypatch.setattr(nn.Module, "load_state_dict", filled)


def config_of(condition: str = "null", encoders: tuple[str, ...] = ("zoomldm",), dtype: str = "float32"):
    features = FeatureConfig(blocks=("up.1", "mid"), condition=condition)  # type: ignore[arg-type]
    config = ExtractConfig("slides", "out", encoders=encoders, features=features)
    return replace(config, model=replace(config.model, source="demo", device="cpu", dtype=dtype))


@pytest.mark.parametrize(
    ("condition", "encoders", "dtype"),
    [
        ("own", ("zoomldm", "demo"), "float32"),
        ("own", ("zoomldm",), "bfloat16"),
        ("null", ("texture", "demo"), "bfloat16"),
    ],
)
def test_a_description_is_what_the_loaded_encoders_say(condition: str, encoders: tuple[str, ...], dtype: str) -> None:
    config = config_of(condition, encoders, dtype)
    loaded = {e.id: EncoderFacts(e.dim, e.attributes()) for e in load_encoders(config, "cpu")}
    assert describe(config) == loaded


@pytest.mark.parametrize("stored", ["float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_encoder_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stored: str, dtype: torch.dtype
) -> None:
    from safetensors.torch import save_file

    tiny = replace(PUBLISHED["phikon"], width=12, depth=2, heads=3, grid_px=32)
    monkeypatch.setitem(PUBLISHED, "phikon", tiny)
    torch.manual_seed(0)
    network = build_vit(tiny).to_empty(device="cpu")
    tensors = {
        name: torch.randn(value.shape).to(getattr(torch, stored)) for name, value in network.state_dict().items()
    }
    save_file(tensors, tmp_path / tiny.filename)
    loaded = load_encoder("phikon", tmp_path, dtype=dtype)
    found = describe_encoder("phikon", tmp_path, dtype=dtype)
    assert (found.id, found.dim, found.digest) == (loaded.id, loaded.dim, loaded.digest)


def test_what_does_not_fit_together_is_refused_before_a_network_is_there(no_networks: None) -> None:
    config = config_of()
    with pytest.raises(EngineError, match=r"must fit together.*up\.9"):
        describe(replace(config, features=replace(config.features, blocks=("up.9",))))
    with pytest.raises(EngineError, match=r"timestep must be below"):
        describe(replace(config, features=replace(config.features, timestep=5000)))


def test_a_finished_folder_starts_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slides").mkdir()
    write_tiff(tmp_path / "slides" / "a.tif", [np.asarray(tissue(350, 550))[:300, :600]], 0.5)
    config = replace(config_of(), slides=str(tmp_path / "slides"), out=str(tmp_path / "out"))
    config = replace(config, finder=TissueConfig("everything"), blocks=BlockConfig(parents=1))
    assert [r.status for r in extract(config, extract_alone, Progress())] == ["done"]

    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("a network got its weights"))
    monkeypatch.setattr(ZoomLDM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    assert [r.status for r in extract(config, extract_alone, Progress())] == ["done"]


@pytest.mark.parametrize("series", [None, 0, 1])
def test_a_bag_says_which_picture_of_its_file_it_is_of(tmp_path: Path, tiny: Path, series: int | None) -> None:
    (tmp_path / "slides").mkdir()
    picture = np.asarray(tissue(350, 550))
    with tifffile.TiffWriter(tmp_path / "slides" / "two.ome.tiff", ome=True) as tiff:
        for pixels in (picture[:256, :512], picture[:256, :256]):
            sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
            tiff.write(pixels, photometric="rgb", tile=(64, 64), metadata={"axes": "YXS", **sizes})
    write_tiff(tmp_path / "slides" / "one.tif", [picture[:256, :512]], 0.5)
    config = replace(config_of(), slides=str(tmp_path / "slides"), out=str(tmp_path / "out"), series=series)
    features = replace(config.features, blocks=("up.1",), timestep=100)
    config = replace(config, features=features, model=replace(config.model, source=str(tiny)))
    config = replace(config, finder=TissueConfig("everything"), blocks=BlockConfig(parents=1))
    extract(config, extract_alone, Progress())
    file = open_features(tmp_path / "out" / "features" / "two.h5")
    assert (file.series(), file.level0_size()) == ((1, (256, 256)) if series == 1 else (0, (512, 256)))
    if series != 1:
        assert open_features(tmp_path / "out" / "features" / "one.h5").series() is None


def test_what_a_prepared_set_shares_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PrepareConfig("slides", "out")
    config = replace(config, model=replace(config.model, source="demo", device="cpu", dtype="float32"))
    model, ssl = load_networks(config, "cpu")
    wanted = (autoencoder_digest(model), ssl.digest, ssl.dim)
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("a network got its weights"))
    facts = set_facts(config)
    assert (facts.autoencoder_digest, facts.encoder_digest, facts.ssl_dim) == wanted
