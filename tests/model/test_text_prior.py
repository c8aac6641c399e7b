"""The text prior, its sampler and its own words: shapes, what a text and a mask decide, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.core.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.model.text.prior import TextPrior
from engine.model.text.sampler import TextRegions, joined, sample_grid, windows_over
from engine.model.text.towers import load_tower
from engine.model.text.weights import CONFIG, load_prior, read_prior, save_prior
from engine.model.text.words import split_words, vocabulary
from engine.model.zoomldm import tiny_config
from tests.support.tiny_prior import tiny_prior


@pytest.fixture(scope="module")
def prior() -> TextPrior:
    made = tiny_prior(6, 4)
    made.spread.fill_(2.0)
    made.mean.copy_(torch.arange(6.0))
    return made


def tokens(prior: TextPrior, *texts: str):
    with torch.no_grad():
        return prior.read(*load_tower("words", prior).encode(texts))


def grid(prior: TextPrior, *texts: str, shape: tuple[int, int] = (3, 2), **keys: object) -> np.ndarray:
    masks = np.full((len(texts), *shape), 1 / len(texts), np.float32)
    return sample_grid(prior, TextRegions(tokens(prior, *texts), masks), 4, **keys).numpy()  # type: ignore[arg-type]


def test_a_grid_is_decided_by_text_and_seed(prior: TextPrior) -> None:
    found = grid(prior, "much fat")
    assert found.shape == (6, 3, 2)
    assert np.array_equal(found, grid(prior, "much fat"))
    assert not np.array_equal(found, grid(prior, "no fat"))
    assert not np.array_equal(found, grid(prior, "fat much"))  # the order of words counts
    assert not np.array_equal(found, grid(prior, "much fat", seed=1))
    assert not np.array_equal(found, grid(prior, "much fat", weight=0.0))


def test_words_that_are_padded_do_not_count(prior: TextPrior) -> None:
    alone = tokens(prior, "much fat")
    both = tokens(prior, "much fat", "no stroma, much fat, 20 % stroma")
    x, t = torch.randn(1, 6, 3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    with torch.no_grad():
        torch.testing.assert_close(prior(x, t, alone), prior(x, t, both.rows([0])))
        torch.testing.assert_close(prior(x, t, alone), prior(x, t, joined(alone, both).rows([0])))


def test_a_dropped_text_is_the_null_text(prior: TextPrior) -> None:
    read = load_tower("words", prior).encode(["much fat", "no fat"])
    x, t = torch.zeros(2, 6, 2, 2), torch.tensor([400, 400])
    with torch.no_grad():
        found = prior(x, t, prior.read(*read, torch.tensor([True, True])))
        null = prior.null(prior.read(*read))
        torch.testing.assert_close(found[:1], prior(x[:1], t[:1], null))
        torch.testing.assert_close(found[0], found[1])


def test_the_negative_text_is_stepped_away_from(prior: TextPrior) -> None:
    masks = np.ones((1, 2, 2), np.float32)
    asked = TextRegions(tokens(prior, "much fat"), masks, tokens(prior, "no stroma"))
    other = sample_grid(prior, asked, 4).numpy()
    assert not np.array_equal(other, grid(prior, "much fat", shape=(2, 2)))
    same = TextRegions(tokens(prior, "much fat"), masks, tokens(prior, "much fat"))
    np.testing.assert_allclose(sample_grid(prior, same, 4).numpy(), grid(prior, "much fat", shape=(2, 2), weight=0.0),
                               atol=1e-4)  # fmt: skip


def test_each_region_has_its_own_text(prior: TextPrior) -> None:
    """With one window and masks of 0 and 1, equal texts in all regions are one text."""
    masks = np.zeros((2, 4, 4), np.float32)
    masks[0, :, :2], masks[1, :, 2:] = 1, 1
    equal = sample_grid(prior, TextRegions(tokens(prior, "no fat", "no fat"), masks), 4).numpy()
    np.testing.assert_allclose(equal, grid(prior, "no fat", shape=(4, 4)), atol=1e-4)
    mixed = sample_grid(prior, TextRegions(tokens(prior, "no fat", "much fat"), masks), 4).numpy()
    assert np.abs(mixed - equal)[:, :, 2:].mean() > np.abs(mixed - equal)[:, :, :2].mean()


@pytest.mark.parametrize(("sides", "count"), [((4, 4), 1), ((3, 9), 4), ((9, 5), 8), ((1, 1), 1)])
def test_windows_cover_a_grid_and_stay_on_it(sides: tuple[int, int], count: int) -> None:
    covered = np.zeros(sides, int)
    windows = windows_over(*sides, 4)
    for y, x, h, w in windows:
        assert y + h <= sides[0]
        assert x + w <= sides[1]
        assert max(h, w) <= 4
        covered[y : y + h, x : x + w] += 1
    assert covered.min() >= 1
    assert len(windows) == count


def test_wider_grids_than_the_window(prior: TextPrior) -> None:
    found = grid(prior, "much fat", shape=(7, 9))
    assert found.shape == (6, 7, 9)
    assert np.isfinite(found).all()
    with pytest.raises(ValueError, match="at most 4 cells"):
        prior(torch.zeros(1, 6, 5, 4), torch.tensor([0]), tokens(prior, "fat"))


def test_words_and_numbers() -> None:
    assert split_words("Mostly FAT; 23 % stroma, 7.4 px") == ["mostly", "fat", ",", "25", "%", "stroma", ",", "5", "px"]
    assert vocabulary(["fat, fat", "fat and stroma", "stroma, 20 %"]) == (",", "fat", "stroma")


def test_it_comes_back_from_disk(prior: TextPrior, tmp_path: Path) -> None:
    save_prior(tmp_path / "text", prior, figures={"steps": 1})
    back = read_prior(tmp_path / "text")
    assert np.array_equal(grid(back, "much fat"), grid(prior, "much fat"))
    assert back.config == prior.config
    stored = json.loads((tmp_path / "text" / CONFIG).read_text())
    stored["prior"]["layers"] = 3
    (tmp_path / "text" / CONFIG).write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"lacks blocks\.2"):
        read_prior(tmp_path / "text")


def test_a_prior_of_another_encoder_is_refused(prior: TextPrior, tmp_path: Path) -> None:
    save_prior(tmp_path / "text", prior)
    right: ModelConfig = dataclasses.replace(tiny_config(), ssl_dim=6, encoder="unknown")
    assert load_prior("x", None, str(tmp_path / "text"), right).config.ssl_dim == 6
    with pytest.raises(CheckpointError, match="'uni'"):
        load_prior("x", None, str(tmp_path / "text"), dataclasses.replace(right, encoder="uni"))


def test_a_vocabulary_goes_with_its_tower() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        TextPrior(tiny_prior().config)
    with pytest.raises(ValueError, match="width"):
        dataclasses.replace(tiny_prior().config, width=18, heads=4)
