"""A text prior from pictures alone: regions are told by a CLIP's vision tower, and texts take its place in the end."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.core.errors import EngineError
from engine.features.bag_writer import write_bag
from engine.model.text.prior import WHOLE, TextPriorConfig
from engine.model.text.towers import load_tower
from engine.model.text.weights import read_prior
from engine.model.zoomldm import ZoomLDM
from engine.training.optimisation import TrainingError
from engine.training.text.captions import Caption
from engine.training.text.pictures import PicturedGrids
from engine.training.text.settings import CaptionSettings, TextOptimiserSettings, TextSizes, TextTrainingConfig
from engine.training.text.train import open_regions, train_text
from tests.support.known_bag import known_plan
from tests.support.tiny_tower import tiny_clip_text, write_quiltnet
from tests.training.test_text_training import killed

COLUMNS, ROWS = 12, 12
TEXTS = [" ".join(words) for words in np.array(np.meshgrid(["fat", "a", "f", "t", "at"], ["a", "fat", "at", "t"]))
         .reshape(2, -1).T]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Four slides whose tiles (cells of rows 8 to 11) look one way where the grid is high, another where it is low."""
    rng = np.random.default_rng(0)
    (tmp_path / "bags").mkdir()
    (tmp_path / "tower").mkdir()
    write_quiltnet(tmp_path / "tower", tiny_clip_text())
    looks = rng.normal(size=(2, 16)).astype(np.float32)
    for number in range(4):
        sign = number % 2
        np.save(tmp_path / f"s{number}.npy",
                (rng.normal(size=(64, ROWS, COLUMNS)) * 0.3 + (1 if sign else -1)).astype(np.float32))  # fmt: skip
        plan = known_plan(3, 16, slide=f"s{number}", encoder="quiltnet", block=None, timestep=None, condition=None)
        near, far = (np.repeat(looks[sign][None], len(s.coords), axis=0) for s in plan.scales)
        near = near + rng.normal(0, 0.01, near.shape).astype(np.float32)
        write_bag(tmp_path / "bags" / f"s{number}.h5", plan, {"20x": near, "5x": far})
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return tmp_path


def opened(place: Path, **changes: object) -> PicturedGrids:
    facts = {
        "bags": str(place / "bags"),
        "tower": "quiltnet",
        "window": 4,
        "encoder": "demo",
        "ssl_dim": 64,
        "base_mpp": 0.5,
    } | changes
    return PicturedGrids(grids=str(place / "*.npy"), **facts)  # type: ignore[arg-type]


def config(place: Path, run: str, steps: int) -> TextTrainingConfig:
    bags, grids = str(place / "bags"), str(place / "*.npy")
    return TextTrainingConfig(
        run=str(place / run), out=str(place / run / "text"), bfloat16=False, checkpoint_s=1e-9, tower="quiltnet",
        tower_source=str(place / "tower"),
        captions=CaptionSettings(bags, grids, bags, grids, str(place / "texts.txt")),
        model=TextSizes(16, 1, 2, window=4),
        train=TextOptimiserSettings(steps=steps, batch_size=4, lr=1e-2, warmup=2, decay="constant"),
    )  # fmt: skip


def test_regions_lie_where_tiles_are(place: Path) -> None:
    plan = known_plan(2, 16, slide="s0", encoder="quiltnet", block=None, timestep=None, condition=None)
    vectors = {scale.name: np.ones((len(scale.coords), 16), np.float32) for scale in plan.scales}
    (place / "bags" / "s0.h5").unlink()
    write_bag(place / "bags" / "s0.h5", plan, vectors)  # tiles on cells of columns 0 to 7 alone
    found = opened(place, window=8)
    first = [c for c in found.captions if c.slide == "s0"]
    places = {side: {(c.y, c.x) for c in first if c.height == side} for side in (1, 2, 4, 8)}
    assert places == {
        1: {(y, x) for y in range(8, 12) for x in range(8)},
        2: {(y, x) for y in (8, 10) for x in range(0, 8, 2)},
        4: {(8, 0), (8, 4)},
        8: set(),  # rows 0 to 7 hold no tile
    }
    assert found.captions[0] == Caption("s0", 8, 0, 1, 1, "")
    assert np.array_equal(found.grid(0), np.load(place / "s0.npy")[:, 8:9, :1])
    np.testing.assert_allclose(found.told.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.told + found.mean, axis=1), 1, atol=1e-5)


def test_what_does_not_fit_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"'plip'.*is of 'quiltnet'"):
        opened(place, tower="plip")
    (place / "more").mkdir()
    for name, weights in (("s0", "ab" * 32), ("s1", "cd" * 32)):
        plan = known_plan(3, 16, slide=name, encoder="quiltnet", weights_sha256=weights)
        write_bag(place / "more" / f"{name}.h5", plan, {s.name: np.ones((len(s.coords), 16)) for s in plan.scales})
    with pytest.raises(EngineError, match=r"abababababab.*s1\.h5 is of 'quiltnet' \(cdcdcd"):
        opened(place, bags=str(place / "more"))
    wanted = config(place, "run", 1)
    for changes, said in (
        ({"tower": "words"}, "with the tower 'words'"),
        ({"captions": replace(wanted.captions, heldout=str(place / "texts.txt"))}, "must both be tables"),
        ({"captions": replace(wanted.captions, texts=None)}, "got none"),
        ({"captions": replace(wanted.captions, texts=str(place / "few.txt"))}, "at least 20 different"),
    ):
        (place / "few.txt").write_text("fat\n" * 30)
        with pytest.raises(EngineError, match=said):
            train_text(replace(wanted, **changes))  # type: ignore[arg-type]
    for path in place.glob("s*.npy"):
        path.unlink()
    np.save(place / "other.npy", np.random.default_rng(0).normal(size=(64, 2, 2)).astype(np.float32))
    with pytest.raises(EngineError, match="none does"):
        opened(place)
    with pytest.raises(ValueError, match="whole texts of a CLIP"):
        TextPriorConfig(ssl_dim=4, encoder="demo", reads=WHOLE)


def test_it_learns_from_pictures_and_reads_texts(place: Path) -> None:
    train_text(config(place, "run", 150))
    told = json.loads((place / "run" / "text" / "training.json").read_text())["heldout_loss"]
    assert told["text"] < 0.9 * told["none"]
    prior = read_prior(place / "run" / "text")
    assert (prior.config.reads, prior.config.text_dim) == (WHOLE, 16)
    tower = load_tower("quiltnet", prior, place / "tower")
    assert (tower.dim, tower.digest) == (16, prior.config.tower_digest)
    tokens, counts = tower.encode(TEXTS)
    assert counts.all()
    torch.testing.assert_close(tokens.mean(dim=0), torch.zeros(1, 16))  # less what these texts have in common
    with torch.no_grad():
        predicted = prior(torch.zeros(2, 64, 2, 2), torch.tensor([999, 999]), prior.read(tokens[:2], counts[:2]))
    assert predicted.shape == (2, 64, 2, 2)
    assert not torch.equal(*predicted)


def test_what_tells_a_region_is_blurred_and_taken_from_the_learned_mean(place: Path) -> None:
    """A step with noise is another one than without; held-out vectors are less the mean of those that are learned."""
    wanted = config(place, "plain", 8)
    for run, noise in (("plain", 0.0), ("blurred", 2.0)):
        told = replace(wanted.captions, noise=noise)
        train_text(replace(wanted, run=str(place / run), out=str(place / run / "text"), captions=told))
    plain, blurred = (read_prior(place / run / "text").state_dict() for run in ("plain", "blurred"))
    assert not torch.equal(plain["text_embedder.weight"], blurred["text_embedder.weight"])
    (place / "heldout").mkdir()
    (place / "bags" / "s0.h5").rename(place / "heldout" / "s0.h5")
    heldout = replace(wanted.captions, heldout=str(place / "heldout"))
    model = ZoomLDM.from_pretrained("demo")
    learned, measured = open_regions(replace(wanted, captions=heldout), model)
    assert isinstance(learned, PicturedGrids)
    assert isinstance(measured, PicturedGrids)
    np.testing.assert_allclose(np.linalg.norm(measured.told + learned.mean, axis=1), 1, atol=1e-5)


def test_texts_belong_to_a_run(place: Path) -> None:
    train_text(config(place, "run", 1))
    (place / "texts.txt").write_text("\n".join([*TEXTS, "fat fat a"]))
    with pytest.raises(TrainingError, match="captions"):
        train_text(config(place, "run", 2))


def test_a_killed_training_ends_as_an_undisturbed_one(place: Path) -> None:
    train_text(config(place, "one", 6))
    killed(config(place, "two", 6))
    train_text(config(place, "two", 6))
    one, two = (read_prior(place / run / "text").state_dict() for run in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
