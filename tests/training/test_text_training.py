"""Training of the text prior: rows of the table that are left out, batches that follow from the step, resumed runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.core.errors import EngineError
from engine.model.text.weights import read_prior
from engine.slides.phantom.captions import KINDS, PhantomShares, caption
from engine.slides.phantom.render import Phantom
from engine.training.optimisation import TrainingError
from engine.training.text.captions import CaptionedGrids
from engine.training.text.settings import CaptionSettings, TextOptimiserSettings, TextSizes, TextTrainingConfig
from engine.training.text.train import train_text

ROWS = """slide,x,y,width,height,text
a,0,0,512,512,little fat
a,256,0,256,256,little stroma
a,0,0,1024,256,leaves the slide
a,0,0,100,100,under a cell
b,0,0,256,256,no such slide
a,0,0,256,256,
a,0,x,256,256,fat
a,0,0,-5,256,fat
a,0,0,nan,256,fat
c,0,0,256,256,another slide
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Grids of the demo's encoder: two slides, and a table of captions."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.standard_normal((64, 2, 3)).astype(np.float32))
    np.save(tmp_path / "c.npy", rng.standard_normal((64, 1, 1)).astype(np.float32))
    (tmp_path / "captions.csv").write_text(ROWS)
    return tmp_path


def opened(folder: Path, **changes: object) -> CaptionedGrids:
    facts = {"grids": str(folder / "*.npy"), "encoder": "demo", "ssl_dim": 64, "base_mpp": 0.5} | changes
    return CaptionedGrids(str(folder / "captions.csv"), **facts)  # type: ignore[arg-type]


def test_rows_that_cannot_be_learned_from_are_listed(table: Path) -> None:
    found = opened(table)
    assert [(c.slide, c.y, c.x, c.height, c.width, c.text) for c in found.captions] == [
        ("a", 0, 0, 2, 2, "little fat"), ("a", 0, 1, 1, 1, "little stroma"),
        ("c", 0, 0, 1, 1, "another slide"),
    ]  # fmt: skip
    assert {row.where: row.reason for row in found.left_out} == {
        "line 4": "the region leaves the slide, 3 x 2 cells of 256 px",
        "line 5": "the region covers no whole cell of 256 x 256 px",
        "line 6": "there is no grid of slide 'b'",
        "line 7": "it has no text",
        "line 8": "x, y, width and height must be numbers",
        "line 9": "the region covers no whole cell of 256 x 256 px",
        "line 10": "x, y, width and height must be numbers",
    }
    assert np.array_equal(found.grid(1), np.load(table / "a.npy")[:, :1, 1:2])


def test_tables_and_grids_that_do_not_fit_are_refused(table: Path) -> None:
    with pytest.raises(EngineError, match="another encoder"):
        opened(table, ssl_dim=1024)
    (table / "more").mkdir()
    np.save(table / "more" / "a.npy", np.load(table / "a.npy"))
    with pytest.raises(EngineError, match="a comes twice"):
        opened(table, grids=str(table / "**" / "*.npy"))
    with pytest.raises(EngineError, match="none is"):
        opened(table, grids=str(table / "*.none"))
    for content, said in (("slide,x,y,width,text\n", "lacks height"), (ROWS.splitlines()[0] + "\n", "no row does"),
                          ("\n".join(ROWS.splitlines()[0::3][:2]), "line 2: the region leaves")):  # fmt: skip
        (table / "captions.csv").write_text(content)
        with pytest.raises(EngineError, match=said):
            opened(table)


def config(folder: Path, run: str, steps: int = 6) -> TextTrainingConfig:
    table, grids = str(folder / "captions.csv"), str(folder / "*.npy")
    return TextTrainingConfig(
        run=str(folder / run), out=str(folder / run / "text"), bfloat16=False, checkpoint_s=1e-9,
        captions=CaptionSettings(table, grids, table, grids), model=TextSizes(16, 1, 2, window=2),
        train=TextOptimiserSettings(steps=steps, batch_size=4, lr=1e-2, warmup=2, decay="constant"),
    )  # fmt: skip


def killed(config: TextTrainingConfig) -> None:
    """Begin a training, and end it in its fourth step."""
    calls, backward = 0, torch.Tensor.backward

    def stop(self: torch.Tensor, *args: object, **keys: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        backward(self, *args, **keys)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", stop)
        with pytest.raises(KeyboardInterrupt):
            train_text(config)


def test_a_killed_training_ends_as_an_undisturbed_one(table: Path) -> None:
    train_text(config(table, "one"))
    killed(config(table, "two"))
    train_text(config(table, "two"))
    one, two = (read_prior(table / run / "text").state_dict() for run in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = config(table, "two")
    with pytest.raises(TrainingError, match=r"train\.drop_text"):
        train_text(replace(other, train=replace(other.train, drop_text=0.5)))


def test_words_that_occur_once_are_not_learned(table: Path) -> None:
    train_text(config(table, "one", 1))
    words = read_prior(table / "one" / "text").words
    assert words is not None
    assert words.config.words == ("little",)


def test_it_learns_what_a_text_tells(tmp_path: Path) -> None:
    """Regions of "much fat" are all ones, of "no fat" all minus ones: with the text, the loss is lower."""
    rng = np.random.default_rng(0)
    rows = [ROWS.splitlines()[0]]
    for number in range(8):
        grid = rng.standard_normal((64, 2, 2)) * 0.3 + (1 if number % 2 else -1)
        np.save(tmp_path / f"{number}.npy", grid.astype(np.float32))
        rows.append(f"{number},0,0,512,512,{'much' if number % 2 else 'no'} fat")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    train_text(config(tmp_path, "run", 150))
    figures = (tmp_path / "run" / "text" / "training.json").read_text()
    found = dict(zip(("text", "none"), (float(v.split(":")[1].strip(" ,")) for v in figures.splitlines()
                                       if v.strip().startswith(('"text":', '"none":'))), strict=True))  # fmt: skip
    assert found["text"] < 0.9 * found["none"]


def test_shares_are_shares_and_do_not_depend_on_the_window() -> None:
    phantom = Phantom.varied(3)
    whole = PhantomShares.of(phantom, 2, 3).cells
    assert whole.shape == (len(KINDS), 2, 3)
    assert whole.min() >= -1e-6
    np.testing.assert_allclose(whole.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_allclose(PhantomShares.of(phantom, 1, 2).cells, whole[:, :1, :2], atol=0.01)


def test_captions_say_amounts() -> None:
    shares = np.array([0.31, 0.0, 0.69, 0.0, 0.0], np.float32)
    said = {caption(shares, np.random.default_rng(n), Phantom(0)) for n in range(400)}
    assert any("30 % nests" in text for text in said)
    assert any("mostly fat" in text for text in said)
    assert any("no stroma" in text or "0 % stroma" in text for text in said)
    assert not [text for text in said if "some fat" in text or "mostly nests" in text]
