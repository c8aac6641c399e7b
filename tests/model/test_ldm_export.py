"""What we write in the LDM layout is the published layout, key by key, and comes back as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.errors import CheckpointError
from engine.core.units import NAIP_SCALE
from engine.model.config import ModelConfig, published_config
from engine.model.networks import build_networks
from engine.model.weights.folder import Weights
from engine.model.weights.ldm_export import ldm_config, ldm_state, write_ldm
from engine.model.weights.ldm_import import load_tensors, read_ldm
from engine.model.zoomldm import ZoomLDM, tiny_config


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("brca", {}),
        ("naip", {"magnifications": NAIP_SCALE.names, "base_mpp": NAIP_SCALE.base_mpp, "encoder": "dinov2-reg-l"}),
    ],
)
def test_full_size_names_shapes_and_types_are_the_published_ones(
    shared: Path, name: str, changes: dict[str, Any]
) -> None:
    values = published_config().to_json() | changes
    config = ModelConfig.from_json(values)
    networks = {part: dict(net.state_dict()) for part, net in build_networks(config, "meta").named().items()}
    state = ldm_state(Weights(config, networks), networks["unet"], 0.9999, 1)
    wanted = json.loads((shared / f"parity/full/zoomldm_{name}_state_dict.json").read_text())
    found = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()}
    assert found == wanted


def test_the_published_implementations_checkpoint_comes_back_bit_by_bit(shared: Path, tmp_path: Path) -> None:
    folder = shared / "parity/zoomldm"
    averaged, raw = read_ldm(folder, "ema"), read_ldm(folder, "raw")
    original = load_tensors(folder / "weights.ckpt")
    decay, updates = float(original["model_ema.decay"]), int(original["model_ema.num_updates"])
    write_ldm(tmp_path / "out", averaged, raw.networks["unet"], decay, updates)
    written = load_tensors(tmp_path / "out" / "weights.ckpt")
    assert written.keys() == original.keys()
    for name, value in original.items():
        assert written[name].dtype == value.dtype, name
        assert torch.equal(written[name], value), name
    assert read_ldm(tmp_path / "out").config == averaged.config


def test_the_predecessors_layout_too(shared: Path, tmp_path: Path) -> None:
    read = read_ldm(shared / "parity/panorama")
    write_ldm(tmp_path / "out", read, read.networks["unet"], 0.9999, 1)
    again = read_ldm(tmp_path / "out")
    assert again.config == read.config
    for part, state in read.networks.items():
        assert all(torch.equal(again.networks[part][k], v) for k, v in state.items()), part


def test_average_and_raw_weights_keep_their_places(model: ZoomLDM, tmp_path: Path) -> None:
    raw = {k: v + 1 for k, v in model.unet.state_dict().items()}
    write_ldm(tmp_path / "out", model.as_weights(), raw, 0.99, 7)
    averaged = ZoomLDM.from_pretrained(tmp_path / "out").unet.state_dict()
    stored = ZoomLDM.from_pretrained(tmp_path / "out", weights="raw").unet.state_dict()
    assert all(torch.equal(averaged[k], v) for k, v in model.unet.state_dict().items())
    assert all(torch.equal(stored[k], v) for k, v in raw.items())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"unet": tiny_config().unet | {"norm_num_groups": 8}}, "norm_num_groups"),
        ({"unet": tiny_config().unet | {"block_out_channels": [32, 48]}}, "48"),
        ({"magnifications": ("20x", "10x")}, "magnifications"),
    ],
)
def test_what_the_layout_cannot_express_is_named(change: dict[str, Any], word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        ldm_config(tiny_config(**change))


def test_another_folder_is_not_replaced(model: ZoomLDM, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_my_mother.txt").write_text("Dear mother")
    with pytest.raises(Exception, match="must be free"):
        write_ldm(tmp_path / "letters", model.as_weights(), dict(model.unet.state_dict()), 0.99, 1)
    assert (tmp_path / "letters" / "to_my_mother.txt").exists()
