"""Against activations of the published implementations (shared/parity); float32, relative norm."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from engine.model.weights.folder import expected_shapes
from engine.model.weights.ldm_import import WeightsChoice, convert, ldm_tables
from engine.model.weights.ldm_names import ema_name, read_config
from engine.model.zoomldm import ModelConfig, ZoomLDM

FLOAT32 = 3e-5
"""What a deep network may differ by on any CPU: the published one was computed with kernels of another."""
GRIDS = ("1x1.mag0", "2x2.mag1", "4x4.mag2", "8x8.mag3")


def error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def ours(shared: Path) -> ZoomLDM:
    return ZoomLDM.from_pretrained(shared / "parity/zoomldm").requires_grad_(False)


@pytest.fixture(scope="module")
def theirs(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "parity/zoomldm/expected.safetensors")


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    angle = torch.acos((a / a.norm() * (b / b.norm())).sum())
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def between_cells(grid: Tensor) -> Tensor:
    """The vector at latent offset (16, 32) of a (D, 2, 2) grid, as a (D, 1, 1) grid."""
    top, bottom = slerp(grid[:, 0, 0], grid[:, 0, 1], 0.5), slerp(grid[:, 1, 0], grid[:, 1, 1], 0.5)
    return slerp(top, bottom, 0.25)[:, None, None]


def test_schedule(ours: ZoomLDM, theirs: dict[str, Tensor]) -> None:
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == torch.float64
    assert torch.allclose(ours.betas, theirs["betas"].double(), rtol=1e-6)
    assert torch.allclose(ours.alphas_cumprod, theirs["alphas_cumprod"].double(), rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_summarizer(ours: ZoomLDM, theirs: dict[str, Tensor], grid: str) -> None:
    result = ours.conditioner([theirs[f"summarizer.in.{grid}"]], [int(grid[-1])])
    assert error(result, theirs[f"summarizer.out.{grid}"]) < 1e-6


def test_a_mixed_vector_is_standardised_with_n_minus_one(ours: ZoomLDM, theirs: dict[str, Tensor]) -> None:
    result = ours.summarize([between_cells(theirs["refine.ssl_grid"])], [0])
    assert error(result, theirs["refine.window_context.i16_j32"]) < 1e-6


def test_grids_of_all_sizes_in_one_call_equal_single_calls(ours: ZoomLDM, theirs: dict[str, Tensor]) -> None:
    grids = [theirs[f"summarizer.in.{grid}"] for grid in GRIDS] + [torch.randn(48, 3, 20)]
    magnifications = [0, 1, 2, 3, 4]
    together = ours.summarize(grids, magnifications)
    alone = [ours.summarize([g], [m]) for g, m in zip(grids, magnifications, strict=True)]
    assert error(together, torch.cat(alone)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unet_with_averaged_and_raw_weights(shared: Path, theirs: dict[str, Tensor], dtype: torch.dtype) -> None:
    x, t, context = (theirs[f"unet.{name}"] for name in ("x", "t", "context"))
    for choice in ("ema", "raw"):
        model = ZoomLDM.from_pretrained(shared / "parity/zoomldm", dtype=dtype, weights=choice)
        with torch.no_grad():
            assert error(model.predict_eps(x, t, context, w=0.0), theirs[f"unet.eps_{choice}"]) < FLOAT32


def test_guided_eps(ours: ZoomLDM, theirs: dict[str, Tensor]) -> None:
    result = ours.predict_eps(theirs["unet.x"], 500, theirs["unet.context"], w=2.0)
    assert error(result, theirs["cfg.eps_w2_t500"]) < FLOAT32


def test_autoencoder(ours: ZoomLDM, theirs: dict[str, Tensor]) -> None:
    assert error(ours.encode(theirs["vae.image"]), theirs["vae.encode"]) < FLOAT32
    assert error(ours.decode(theirs["vae.encode"]), theirs["vae.decode"]) < FLOAT32


def test_predecessor(shared: Path) -> None:
    model = ZoomLDM.from_pretrained(shared / "parity/panorama").requires_grad_(False)
    expected = load_file(shared / "parity/panorama/expected.safetensors")
    assert model.config.magnifications == ("20x",)
    assert error(model.null_context(1), expected["panorama.context.uncond"]) < 1e-6
    vector = between_cells(expected["panorama.embeddings"].permute(2, 0, 1))
    assert error(model.summarize([vector], [0]), expected["panorama.context.i16_j32"]) < 1e-6


def full_size(document: dict, magnifications: int) -> ModelConfig:
    """The parity config.yaml with the published full sizes (facts, section 1)."""
    params = document["model"]["params"]
    params["unet_config"]["params"] |= {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 5],
        "num_res_blocks": 2,
        "context_dim": 512,
    }
    params["first_stage_config"]["params"] |= {"n_embed": 8192}
    params["first_stage_config"]["params"]["ddconfig"] |= {"ch": 128, "num_res_blocks": 2}
    params["cond_stage_config"]["params"] |= {
        "num_layers": 12,
        "input_channels": 1024,
        "hidden_channels": 512,
        "vit_mlp_dim": 2048,
        "output_channels": 512,
    }
    return read_config(document, magnifications, None)


@pytest.mark.parametrize(("name", "count", "encoder"), [("brca", 8, "uni"), ("naip", 4, "dinov2-reg-l")])
@pytest.mark.parametrize("choice", ["ema", "raw"])
def test_every_name_and_shape_of_the_full_checkpoints_is_understood(
    shared: Path, name: str, count: int, encoder: str, choice: WeightsChoice
) -> None:
    listing = json.loads((shared / f"parity/full/zoomldm_{name}_state_dict.json").read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, (shape, _) in listing.items()}
    document = yaml.safe_load((shared / "parity/zoomldm/config.yaml").read_text())
    config = full_size(document, count)
    assert (config.encoder, len(config.magnifications)) == (encoder, count)
    states = convert(tensors, config, choice, name)
    sizes = {part: sum(t.numel() for t in state.values()) for part, state in states.items()}
    assert [round(sizes[part] / 1e6, 1) for part in ("unet", "vae", "conditioner")] == [400.9, 55.3, 38.7]
    tables = ldm_tables(config, expected_shapes(config))
    assert len({ema_name(key) for key in tables["unet"]}) == len(tables["unet"]), "names collide without dots"
