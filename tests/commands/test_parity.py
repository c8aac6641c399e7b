import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.model.zoomldm import ZoomLDM, quantise, tiny_config
from engine.parity import is_input, main
from engine.parity_checks.activations import relative, replay_decode_large
from engine.sampling.pixels import to_uint8

SHARED = Path(os.environ.get("ZOOMLDM_SHARED", Path(__file__).parents[3] / "shared")) / "parity"


def replay(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict]:
    code = main([str(folder), "--json", *flags])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["cdm", "encoder", "panorama", "zoomldm"])
def test_the_published_implementations_are_met(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the reference activations are not at {SHARED}; set ZOOMLDM_SHARED")
    code, found = replay(SHARED / name, capsys)
    assert code == 0, [k for k, v in found.items() if not v["ok"]]
    wanted = {
        key for file in (SHARED / name).glob("expected*.safetensors") for key in load_file(file) if not is_input(key)
    }
    assert set(found) == wanted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with references that it made itself."""
    torch.manual_seed(0)
    model = ZoomLDM(tiny_config())
    model.save_pretrained(tmp_path / "model")
    x, context = torch.randn(2, 3, 64, 64), torch.randn(2, 65, 32)
    t = torch.tensor([500.0, 3.0])
    with torch.no_grad():
        eps = model.predict_eps(x, t, context, 0.0)
    expected = {"unet.x": x, "unet.t": t, "unet.context": context, "unet.eps_ema": eps, "somebody.elses": x.clone()}
    save_file(expected, tmp_path / "model" / "expected.safetensors")
    return tmp_path / "model"


@pytest.fixture
def tied(tmp_path: Path) -> tuple[ZoomLDM, dict[str, torch.Tensor]]:
    """A tiny model of which one latent pixel of its own picture lies between two codes, and that picture's references.

    The references draw it as the code that the model does not take.
    """
    torch.manual_seed(0)
    model = ZoomLDM(tiny_config()).requires_grad_(False)
    image = torch.rand(1, 3, 256, 256) * 2 - 1
    latents = model.encode(image)
    y, x = 20, 41
    z = latents[0, :, y, x] / model.config.scale_factor
    codes = model.vae.quantize.embedding.weight
    codes.normal_(std=float(latents.std()))
    codes[(codes - z).norm(dim=1) < 0.2 * z.norm()] += 1  # no third code is as near
    apart = torch.tensor([0.03, -0.02, 0.05]) * z.norm()
    codes[5], codes[11] = z + apart, z - apart * (1 + 1e-7)
    other = latents.clone()
    other[0, :, y, x] = (codes[11] if drawn(model, latents)[y, x] == 5 else codes[5]) * model.config.scale_factor
    return model, {"vae.image": image, "vae.encode": latents, "vae.decode": model.decode(other)}


def drawn(model: ZoomLDM, latents: torch.Tensor) -> torch.Tensor:
    """Return which code each pixel of latents (1, 3, h, w) is drawn as: (h, w)."""
    codes = model.vae.quantize.embedding.weight
    chosen = quantise(latents / model.config.scale_factor, codes)
    return torch.cdist(chosen[0].flatten(1).T.double(), codes.double()).argmin(dim=1).view(chosen.shape[2:])


def replayed(
    tied: tuple[ZoomLDM, dict[str, torch.Tensor]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict]:
    model, expected = tied
    model.save_pretrained(folder)
    save_file(expected, folder / "expected.safetensors")
    return replay(folder, capsys)


def test_a_pixel_between_two_codes_may_be_drawn_as_either(
    tied: tuple[ZoomLDM, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, expected = tied
    assert relative(model.decode(expected["vae.encode"]), expected["vae.decode"]) > 1e-3, "the codes look alike"
    code, found = replayed(tied, tmp_path / "model", capsys)
    assert code == 0, found
    assert (found["vae.decode"]["ties"], found["vae.decode"]["otherwise"]) == (1, 1)
    assert main([str(tmp_path / "model")]) == 0
    assert "ok; 1 latent px between two codes, 1 drawn as the other one" in capsys.readouterr().out


def test_a_tie_hides_no_fault(
    tied: tuple[ZoomLDM, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another pixel is drawn as its second nearest code, which is clearly further: the picture is over tolerance."""
    model, expected = tied
    codes, scale = model.vae.quantize.embedding.weight, model.config.scale_factor
    wrong = expected["vae.encode"].clone()
    second = (codes - wrong[0, :, 50, 9] / scale).norm(dim=1).argsort()[1]
    wrong[0, :, 50, 9] = codes[second] * scale
    expected["vae.decode"] = model.decode(wrong)
    code, found = replayed(tied, tmp_path / "model", capsys)
    assert code == 1
    assert found["vae.decode"]["error"] > 1e-3
    assert (found["vae.decode"]["ties"], found["vae.decode"]["otherwise"]) == (1, 0)


def test_a_tie_in_a_windowed_picture(tied: tuple[ZoomLDM, dict[str, torch.Tensor]]) -> None:
    model, expected = tied
    picture = to_uint8(expected["vae.decode"][0].numpy()).transpose(1, 2, 0)[None]  # one window is all of it
    given = {"decode_large.latent": expected["vae.encode"], "decode_large.image_u8": torch.from_numpy(picture)}
    (check,) = replay_decode_large(model, given)
    assert check.ok
    assert (check.ties, check.otherwise) == (1, 1)


def test_what_is_not_covered_is_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    table = capsys.readouterr().out
    assert "unet.eps_ema" in table
    assert "1 compared, 0 over tolerance, 1 not covered" in table


def test_a_wrong_answer_is_over_tolerance(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "expected.safetensors"
    expected = load_file(file)
    expected["unet.eps_ema"] = expected["unet.eps_ema"] * 1.001
    save_file(expected, file)
    code, found = replay(folder, capsys)
    assert code == 1
    assert found["unet.eps_ema"]["error"] == pytest.approx(1e-3, rel=0.1)
    assert not found["unet.eps_ema"]["ok"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_arithmetic_can_be_proved_too(folder: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    code, found = replay(folder, capsys, "--dtype", dtype)
    assert code == 0, found


def test_a_folder_without_references_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "must hold reference activations" in capsys.readouterr().err


def test_damaged_references_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "expected.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert main([str(folder)]) == 1
    assert "must be a whole safetensors file" in capsys.readouterr().err


def test_an_encoder_without_its_sizes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = {"encoder.image": torch.zeros(1, 3, 224, 224), "encoder.cls": torch.zeros(1, 48)}
    save_file(expected, tmp_path / "expected.safetensors")
    (tmp_path / "config.json").write_text('{"embed_dim": 48}')
    assert main([str(tmp_path)]) == 1
    assert "must say the encoder's embed_dim, depth, num_heads and patch_size" in capsys.readouterr().err
