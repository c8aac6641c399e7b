"""One network's weights from every layout they come in."""

from pathlib import Path

import pytest
import torch

from engine.core.errors import CheckpointError
from engine.model.weights.ldm_import import to_ldm_state_dict
from engine.model.zoomldm import ZoomLDM, tiny_config
from engine.training.denoiser.initial_weights import PartName, read_part_weights

PARTS: tuple[PartName, ...] = ("unet", "vae", "conditioner")


@pytest.fixture
def model() -> ZoomLDM:
    torch.manual_seed(3)
    return ZoomLDM(tiny_config())


def same(found: dict[str, torch.Tensor], model: ZoomLDM, part: str) -> bool:
    state = model.networks.named()[part].state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[k], v) for k, v in state.items())


def test_our_folder_and_diffusers_folders(model: ZoomLDM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "ours")
    for part in PARTS:
        assert same(read_part_weights(part, str(tmp_path / "ours"), model.config), model, part)
    model.unet.save_pretrained(tmp_path / "theirs" / "unet")
    for folder in ("theirs", "theirs/unet"):
        assert same(read_part_weights("unet", str(tmp_path / folder), model.config), model, "unet")


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_ldm_checkpoint_whole_or_of_one_network(model: ZoomLDM, tmp_path: Path, wrapped: bool) -> None:
    tensors = to_ldm_state_dict(model.as_weights())
    alone = {k.removeprefix("first_stage_model."): v for k, v in tensors.items() if k.startswith("first_stage_model.")}
    alone |= {"loss.logvar": torch.zeros(1)}
    for name, state in (("whole.ckpt", tensors), ("vq.ckpt", alone)):
        torch.save({"state_dict": state} if wrapped else state, tmp_path / name)
    for part in PARTS:
        assert same(read_part_weights(part, str(tmp_path / "whole.ckpt"), model.config), model, part)
    assert same(read_part_weights("vae", str(tmp_path / "vq.ckpt"), model.config), model, "vae")


def test_averaged_weights_of_the_unet_are_preferred(model: ZoomLDM, shared_free_ema: Path) -> None:
    found = read_part_weights("unet", str(shared_free_ema), model.config)
    assert torch.equal(found["conv_in.weight"], model.unet.conv_in.weight + 1)


@pytest.fixture
def shared_free_ema(model: ZoomLDM, tmp_path: Path) -> Path:
    from engine.model.weights.ldm_names import UNET_PREFIX, ema_name

    tensors = to_ldm_state_dict(model.as_weights())
    tensors |= {ema_name(k): v + 1 for k, v in tensors.items() if k.startswith(UNET_PREFIX)}
    torch.save(tensors, tmp_path / "ema.ckpt")
    return tmp_path / "ema.ckpt"


def test_a_checkpoint_that_does_not_fit_names_its_first_keys(model: ZoomLDM, tmp_path: Path) -> None:
    tensors = to_ldm_state_dict(model.as_weights())
    del tensors["model.diffusion_model.time_embed.0.weight"]
    torch.save(tensors, tmp_path / "short.ckpt")
    with pytest.raises(CheckpointError, match=r"lacks model\.diffusion_model\.time_embed\.0\.weight"):
        read_part_weights("unet", str(tmp_path / "short.ckpt"), model.config)
    torch.save(to_ldm_state_dict(model.as_weights()), tmp_path / "whole.ckpt")
    with pytest.raises(CheckpointError, match=r"must be \(128, 16\)|wrong shape"):
        read_part_weights("conditioner", str(tmp_path / "whole.ckpt"), tiny_config(ssl_dim=8))
