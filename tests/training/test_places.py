"""Positions: codes that look each other up, a path that content cannot touch, an attention that finds its cell."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.model.summarizer import Summarizer
from engine.model.zoomldm import ZoomLDM, tiny_config
from engine.training.denoiser import LatentTiles, denoiser_loss, draw_batch, guided_loss, look_up_share
from engine.training.initial import start_with_places
from engine.training.pathway import Pathway
from engine.training.places import (
    AttentionWatch,
    cell_shape,
    first_token,
    look_up_loss,
    place_codes,
    seat_cells,
)
from engine.training.settings import AutoencoderSettings, DataSettings, DenoiserSettings, PlaceSettings, TrainingConfig

SETTINGS = DenoiserSettings(batch_size=4, magnification_weights=(0.25, 0.25, 0.25, 0.25), drop_condition=0.25)


def tiny_model() -> ZoomLDM:
    torch.manual_seed(0)
    return ZoomLDM(tiny_config(unet=tiny_config().unet | {"norm_num_groups": 8}))


def test_a_code_is_nearest_to_itself_and_products_depend_on_the_distance_alone() -> None:
    codes = place_codes(8, 8)
    products = codes @ codes.T
    assert torch.equal(products.argmax(dim=1), torch.arange(64))
    assert products.diagonal() == pytest.approx(products[0, 0].expand(64))
    assert float(products[0, 9]) == pytest.approx(float(products[18, 27]), abs=1e-5)


def test_seats_lie_on_the_tokens_that_the_summarizer_fills() -> None:
    """A grid whose cells are all alike leaves only places to tell its tokens apart."""
    model = tiny_model()
    assert isinstance(model.conditioner, Summarizer)
    with torch.no_grad():
        model.conditioner.encoder.pos_embedding.zero_()
    grid = torch.randn(16, 1, 1).expand(16, 4, 4)
    start = first_token(*cell_shape(grid))

    def spread() -> float:
        return float(model.summarize([grid], [2])[0, start : start + 16].detach().std(dim=0).mean())

    before = spread()
    seat_cells(model.conditioner)
    assert before < 1e-5
    assert spread() > 0.1


def deepest_features(model: ZoomLDM, x_t: Tensor, time: int, context: Tensor) -> Tensor:
    """Return what leaves the way down: (1, C, h, w)."""
    heard: list[Tensor] = []
    hook = model.unet.down_blocks[-1].register_forward_hook(lambda _m, _a, out: heard.append(out[0]))
    with torch.no_grad():
        model.unet(x_t, torch.tensor([time]), encoder_hidden_states=context)
    hook.remove()
    return heard[0]


def test_the_path_does_not_depend_on_content_time_or_condition() -> None:
    model = tiny_model()
    path = Pathway(model.unet, seed=0)
    generator = torch.Generator().manual_seed(1)
    x_t, context = (torch.randn(2, *shape, generator=generator) for shape in ((3, 64, 64), (65, 32)))
    down_a, down_b = (deepest_features(model, x_t[i : i + 1], 900 * i, context[i : i + 1]) for i in range(2))
    own = path.own(down_a.shape[1])
    assert torch.equal(down_a[:, own], down_b[:, own])
    assert not torch.equal(down_a[:, ~own], down_b[:, ~own])
    assert float(down_a[:, own].std(dim=(2, 3)).min()) > 0, "the path must vary over positions"


def test_attention_finds_its_own_cell_after_the_start(latent_tiles: LatentTiles, tmp_path: Path) -> None:
    model = tiny_model()
    four = (0.25,) * 4
    config = TrainingConfig(
        run=str(tmp_path),
        bfloat16=False,
        data=DataSettings(train_tiles=(1, 1, 1, 1)),
        autoencoder=AutoencoderSettings(plain_shares=four, quantised_shares=four),
        places=PlaceSettings(token_steps=120, path_steps=60, batch_size=8),
        train=SETTINGS,
    )
    watch = AttentionWatch(model.unet)
    batch = draw_batch(latent_tiles, SETTINGS, 0, 3, "cpu")
    batch.dropped[:] = False

    def entropy() -> float:
        with torch.no_grad(), watch.listening() as heard:
            denoiser_loss(model, batch, SETTINGS, bfloat16=False)
        return float(look_up_loss(heard, batch.grids, batch.dropped))

    before = entropy()
    start_with_places(model, latent_tiles, config)
    after = entropy()
    assert after < before - 0.2, (before, after)  # four channels at 32×32 px know their place only near the border
    again = tiny_model()
    start_with_places(again, latent_tiles, config)
    assert all(torch.equal(a, b) for a, b in zip(model.unet.parameters(), again.unet.parameters(), strict=True))


def test_a_watched_attention_computes_what_the_plain_one_does(latent_tiles: LatentTiles) -> None:
    batch = draw_batch(latent_tiles, SETTINGS, 0, 0, "cpu")
    plain, watched = tiny_model(), tiny_model()
    watch = AttentionWatch(watched.unet)
    expected, _ = denoiser_loss(plain, batch, SETTINGS, bfloat16=False)
    got, figures = guided_loss(watched, batch, SETTINGS, False, watch, weight=0.0)
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert "look_up" not in figures
    heavier, figures = guided_loss(watched, batch, SETTINGS, False, watch, weight=0.5)
    assert float(heavier.detach()) == pytest.approx(float(expected.detach()) + 0.5 * figures["look_up"], rel=1e-4)


def test_look_up_loss_counts_the_own_cell_and_no_dropped_condition() -> None:
    grids = [torch.zeros(16, 2, 2), torch.zeros(16, 2, 2)]
    start = first_token(2, 2)
    logits = torch.full((2, 16, 65), -100.0)
    own = (torch.arange(4) // 2)[:, None] * 2 + torch.arange(4) // 2
    logits[0].scatter_(1, (start + own.flatten())[:, None], 100.0)
    dropped = torch.tensor([False, True])
    assert float(look_up_loss([logits], grids, dropped)) == pytest.approx(0.0, abs=1e-6)
    assert float(look_up_loss([logits.roll(1, 2)], grids, dropped)) > 50


def test_the_look_up_weight_falls_to_zero() -> None:
    settings = PlaceSettings(look_up_weight=0.2, look_up_steps=100)
    assert [look_up_share(settings, step) for step in (0, 50, 100, 500)] == pytest.approx([0.2, 0.1, 0, 0])
