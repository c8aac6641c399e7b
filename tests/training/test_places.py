"""Positions: codes that look each other up, a path that content cannot touch, an attention that finds its cell."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.model.summarizer import Summarizer
from engine.model.zoomldm import ZoomLDM, tiny_config
from engine.training.denoiser.position_channels import Pathway
from engine.training.denoiser.position_pretraining import (
    AttentionWatch,
    cell_shape,
    first_token,
    install_look_up,
    look_up_losses,
    look_up_share,
    look_up_sites,
    place_codes,
    seat_cells,
)
from engine.training.denoiser.settings import JointConfig
from engine.training.denoiser.train import DenoiserLesson
from engine.training.optimisation import TrainingError
from engine.training.settings import PlaceSettings
from tests.support.known_run import NETWORKS, write_autoencoder, write_data
from tests.support.known_run import tiny_config as tiny_training

SEVERAL = replace(NETWORKS, unet_channels=(32, 64), groups=8)
"""A path for places needs more than one channel per group."""
PLACES = PlaceSettings(token_steps=120, path_steps=60, batch_size=8, look_up_weight=0.5, look_up_steps=10)


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


@pytest.fixture
def config(tmp_path: Path) -> JointConfig:
    write_data(tmp_path / "data", write_autoencoder(tmp_path / "vae", SEVERAL))
    return tiny_training(tmp_path, model=SEVERAL)


def test_attention_finds_its_own_cell_after_the_start(config: JointConfig) -> None:
    fresh, taught = DenoiserLesson(config), DenoiserLesson(replace(config, places=PLACES))
    samples = [sample._replace(dropped=False) for step in range(3) for sample in fresh.draw(step)]
    part = fresh.read(samples, 0)

    def entropy(model: ZoomLDM) -> float:
        watch = AttentionWatch(model.unet)
        with torch.no_grad(), watch.listening() as heard:
            model.unet(part.x0, part.times, encoder_hidden_states=model.conditioner(part.cells, part.levels))
        return float(look_up_losses(heard, part.cells, part.dropped).mean())

    assert entropy(taught.model) < entropy(fresh.model) - 0.2


def test_places_are_kept_and_made_again_alike(config: JointConfig) -> None:
    config = replace(config, places=replace(PLACES, token_steps=3, path_steps=3))

    def parameters() -> list[Tensor]:
        return list(DenoiserLesson(config).networks.parameters())

    taught, kept = parameters(), parameters()  # the second time from RUN/places.pt
    (Path(config.run) / "places.pt").unlink()
    again = parameters()
    assert all(torch.equal(a, b) for a, b in zip(taught, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(taught, again, strict=True))


def test_the_look_up_counts_at_first_and_not_in_the_end(config: JointConfig) -> None:
    """The loss of a step is the plain one plus the look-up's at its falling weight."""
    lesson = DenoiserLesson(replace(config, places=replace(PLACES, token_steps=1, path_steps=1)))

    def loss(step: int) -> float:
        part = replace(lesson.read(lesson.draw(0), 0), step=step)
        return float(lesson.losses(lesson.networks, part)[0].mean().detach())

    first, half, none = loss(0), loss(5), loss(10)
    assert first - none == pytest.approx(2 * (half - none), rel=1e-3)
    assert first > none + 0.1
    assert loss(500) == none


def test_one_worker_of_a_group_keeps_places(config: JointConfig) -> None:
    """Two would write one file at once."""
    taught = replace(config, places=replace(PLACES, token_steps=1, path_steps=1))
    DenoiserLesson(taught, writes=False)
    assert not (Path(config.run) / "places.pt").exists()
    DenoiserLesson(taught)
    assert (Path(config.run) / "places.pt").exists()


def test_places_of_another_run_are_refused(config: JointConfig) -> None:
    """A run that was killed before its first checkpoint has nothing but this file to say what it was."""
    taught = replace(config, places=replace(PLACES, token_steps=1, path_steps=1))
    DenoiserLesson(taught)
    DenoiserLesson(replace(taught, train=replace(config.train, lr=config.train.lr / 2)))  # has no part in it
    with pytest.raises(TrainingError, match=r"places\.pt must belong to this run.* seed was 0, now 1"):
        DenoiserLesson(replace(taught, seed=1))


def test_networks_without_places_are_refused_by_name(config: JointConfig) -> None:
    taught = replace(config, places=replace(PLACES, token_steps=1, path_steps=1))
    token = replace(SEVERAL, magnifications=("20x",), conditioner="token")
    with pytest.raises(TrainingError, match="conditioner is 'token'"):
        DenoiserLesson(replace(taught, model=token))
    model = tiny_model()
    sites = look_up_sites(model.unet)
    next(iter(sites.values())).heads = 2
    with pytest.raises(TrainingError, match="has 2"):
        install_look_up(sites, {}, torch.nn.Linear(4, 4))


def test_look_up_losses_count_the_own_cell_and_no_dropped_condition() -> None:
    grids = [torch.zeros(16, 2, 2), torch.zeros(16, 2, 2)]
    start = first_token(2, 2)
    logits = torch.full((2, 16, 65), -100.0)
    own = (torch.arange(4) // 2)[:, None] * 2 + torch.arange(4) // 2
    logits[0].scatter_(1, (start + own.flatten())[:, None], 100.0)
    dropped = torch.tensor([False, True])
    assert look_up_losses([logits], grids, dropped).tolist() == pytest.approx([0, 0], abs=1e-6)
    wrong = look_up_losses([logits.roll(1, 2)], grids, dropped).tolist()
    assert wrong[0] > 100
    assert wrong[1] == 0


def test_the_look_up_weight_falls_to_zero() -> None:
    settings = PlaceSettings(look_up_weight=0.2, look_up_steps=100)
    assert [look_up_share(settings, step) for step in (0, 50, 100, 500)] == pytest.approx([0.2, 0.1, 0, 0])
