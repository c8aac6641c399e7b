from pathlib import Path

import torch

from engine.model.zoomldm import ZoomLDM, tiny_config
from engine.training.initial import start_from_model


def test_networks_are_copied_and_another_prediction_starts_at_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = ZoomLDM(tiny_config())
    source.save_pretrained(tmp_path / "model")
    same, other = ZoomLDM(tiny_config()), ZoomLDM(tiny_config(prediction_type="v_prediction"))
    for model in (same, other):
        start_from_model(model, str(tmp_path / "model"))
        assert torch.equal(model.unet.conv_in.weight, source.unet.conv_in.weight)
        assert torch.equal(model.vae.quant_conv.weight, source.vae.quant_conv.weight)
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.conditioner.parameters(), source.conditioner.parameters(), strict=True)
        )
    assert torch.equal(same.unet.conv_out.weight, source.unet.conv_out.weight)
    assert not other.unet.conv_out.weight.any()
