"""The CDM learns what it is shown; a run is a function of settings and seed, whatever kills it; bad grids are named."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.core.errors import EngineError, PreparedMismatchError
from engine.core.units import MagnificationScale
from engine.datasets.dataset import PreparedSet
from engine.model.cdm import CDM, CDMConfig
from engine.model.cdm_sampler import sample_summaries
from engine.model.weights.cdm import load_cdm, read_published
from engine.model.zoomldm import ConditionerConfig, ZoomLDM, tiny_config
from engine.training.cdm import train as training
from engine.training.cdm.settings import CDMOptimiserSettings, CDMSizes, CDMTrainingConfig, SummarySettings
from engine.training.cdm.summaries import GridFiles, open_windows, store_summaries
from engine.training.cdm.train import draw_batch, heldout_errors, train_cdm, x0_loss
from engine.training.optimisation import Optimisation, TrainingError
from tests.support.known_prepared import FACTS, write_set
from tests.support.known_run import write_data
from tests.support.tiny_run import narrow_config

SCALE = MagnificationScale(("20x", "10x", "5x", "2.5x"), 0.5)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tiny model, and two grids to learn from and one to measure on."""
    torch.manual_seed(0)
    ZoomLDM(narrow_config()).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for split, number, shape in (("train", 0, (16, 8, 9)), ("train", 1, (16, 10, 8)), ("heldout", 0, (16, 8, 8))):
        (tmp_path / split).mkdir(exist_ok=True)
        np.save(tmp_path / split / f"{number}.npy", rng.standard_normal(shape, dtype=np.float32))
    return tmp_path


def settings(root: Path, **changes: object) -> CDMTrainingConfig:
    plain = CDMTrainingConfig(
        run=str(root / "run"),
        out=str(root / "model/cdm"),
        source=str(root / "model"),
        bfloat16=False,
        model=CDMSizes(width=16, layers=1, heads=2),
        summaries=SummarySettings(str(root / "train/*.npy"), str(root / "heldout/*.npy"), (6,), 4),
        train=CDMOptimiserSettings(steps=4, batch_size=4, warmup=0, ema=0.5),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def batch_equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_window_of_every_grid_is_numbered_once(root: Path) -> None:
    windows = GridFiles(str(root / "train/*.npy"), 16, SCALE)
    assert [windows.count(level) for level in range(4)] == [152, 7 * 8 + 9 * 7, 5 * 6 + 7 * 5, 2 + 3]
    first, second = (np.load(root / f"train/{n}.npy") for n in (0, 1))
    assert np.array_equal(windows.window(2, 0), first[:, :4, :4])
    assert np.array_equal(windows.window(2, 29), first[:, 4:8, 5:9])
    assert np.array_equal(windows.window(2, 30), second[:, :4, :4])
    assert np.array_equal(windows.window(2, 64), second[:, 6:10, 4:8])
    assert len({windows.window(1, n).tobytes() for n in range(119)}) == 119


def test_windows_of_a_prepared_set_are_its_patches(root: Path, tmp_path: Path) -> None:
    facts = replace(FACTS, magnifications=SCALE.names)
    write_data(tmp_path / "data", facts)
    windows, data = open_windows(str(tmp_path / "data"), "demo", 16, SCALE), PreparedSet(tmp_path / "data")
    assert [windows.count(level) for level in range(4)] == [data.count(level) for level in range(4)] == [4] * 4
    assert all(np.array_equal(windows.window(2, n), data.example(2, n).grid) for n in range(4))
    assert windows.digest != open_windows(str(root / "train/*.npy"), "demo", 16, SCALE).digest
    with pytest.raises(PreparedMismatchError, match="encoder is 'demo', not 'uni'"):
        open_windows(str(tmp_path / "data"), "uni", 16, SCALE)


def test_summaries_are_the_models_and_are_made_once(root: Path) -> None:
    model = ZoomLDM.from_pretrained(root / "model")
    windows = GridFiles(str(root / "train/*.npy"), 16, SCALE)
    stored = store_summaries(model, windows, (500, 6, 6, 6), 0, root / "summaries")
    assert [len(s) for s in stored] == [152, 6, 6, 5], "all there are where fewer are asked for"
    everything = [torch.from_numpy(windows.window(1, n)) for n in range(119)]
    with torch.no_grad():
        known = model.summarize(everything, [1] * 119).half()
    at = [next(i for i, k in enumerate(known) if torch.allclose(k, torch.from_numpy(np.array(s)))) for s in stored[1]]
    assert len(set(at)) == 6
    again = store_summaries(model, GridFiles(str(root / "heldout/*.npy"), 16, SCALE), (1,) * 4, 5, root / "summaries")
    assert np.array_equal(again[0], stored[0])


def test_batches_are_a_function_of_seed_and_step_and_keep_the_shares() -> None:
    data = [np.full((3, 2, 2), level, np.float16) for level in range(4)]
    some = CDMOptimiserSettings(batch_size=8, magnification_weights=(0.1, 0.2, 0.3, 0.4), time_power=2.0)
    first = draw_batch(data, some, 0, 5, "cpu")
    assert batch_equal(first, draw_batch(data, some, 0, 5, "cpu"))
    assert not torch.equal(first[1], draw_batch(data, some, 0, 6, "cpu")[1])
    assert not torch.equal(first[1], draw_batch(data, some, 1, 5, "cpu")[1])
    batches = [draw_batch(data, some, 0, step, "cpu") for step in range(400)]
    levels = torch.cat([b[3] for b in batches])
    assert (torch.bincount(levels) / 3200).numpy() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)
    assert all(torch.equal(b[0][:, 0, 0].long(), b[3]) for b in batches), "the label is the summary's"
    times = torch.cat([b[2] for b in batches])
    assert int(times.min()) >= 0
    assert int(times.max()) <= 999
    assert float((times < 250).float().mean()) == pytest.approx(0.5, abs=0.02), "u² < 1/4 for half of the u"


def test_the_loss_is_the_squared_error_of_x0() -> None:
    """A fresh CDM answers zero, so the loss is the mean square of the clean summaries."""
    cdm = CDM(CDMConfig(tokens=2, channels=2, magnifications=4, width=4, layers=1, heads=1))
    x0 = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    loss, _ = x0_loss(cdm, x0, torch.randn(3, 2, 2), torch.tensor([0, 500, 999]), torch.tensor([0, 1, 3]), False)
    assert float(loss.detach()) == pytest.approx(float(x0.square().mean()))
    loss.backward()
    linear = cdm.final_layer.linear.weight.grad
    assert linear is not None
    assert linear[:2].abs().sum() > 0
    assert not linear[2:].any(), "the variance channels are not trained"


def test_few_summaries_are_learned_by_heart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    data = [rng.standard_normal((2, 4, 8)).astype(np.float16) for _ in range(2)]
    cdm = CDM(CDMConfig(tokens=4, channels=8, magnifications=2, width=32, layers=2, heads=2)).train()
    some = CDMOptimiserSettings(steps=400, batch_size=32, lr=3e-3, warmup=20, ema=0.98)
    optimisation = Optimisation(cdm, some, tmp_path / "cdm.pt", 1e9)
    optimisation.run(lambda step, _: x0_loss(cdm, *draw_batch(data, some, 0, step, "cpu"), False))
    optimisation.average.exchange(cdm)
    cdm.eval()
    errors = heldout_errors(cdm, data, "cpu", 2)
    assert all(error[0] < 0.05 for error in errors.values()), errors
    for level, known in enumerate(data):
        drawn = sample_summaries(cdm, level, 8, steps=20, batch_size=8)
        gaps = torch.cdist(drawn.flatten(1), torch.from_numpy(known).float().flatten(1)) / 32**0.5
        assert float(gaps.min(1).values.max()) < 0.2, "a sample is one of the two"
        assert len(gaps.argmin(1).unique()) == 2, "and both occur"
        others = torch.cdist(drawn.flatten(1), torch.from_numpy(data[1 - level]).float().flatten(1)) / 32**0.5
        assert float(others.min()) > 0.5, "none is another magnification's"


def test_a_killed_run_ends_with_the_same_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = CDMSizes(width=16, layers=1, heads=2, standardised=False)
    whole = settings(root, run=str(root / "whole"), out=str(root / "whole/cdm"), model=sizes)
    train_cdm(whole)
    cut = settings(root, checkpoint_s=1e-9, published=str(root / "cdm.pt"), model=sizes)

    def dies(*args: object) -> object:
        if args[3] == 2:
            raise KeyboardInterrupt
        return draw_batch(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training, "draw_batch", dies)
        with pytest.raises(KeyboardInterrupt):
            train_cdm(cut)
    assert not (root / "model/cdm").exists(), "nothing half trained lies beside the model"
    train_cdm(cut)
    files = [folder / "model.safetensors" for folder in (root / "whole/cdm", root / "model/cdm")]
    assert files[0].read_bytes() == files[1].read_bytes()
    cdm = load_cdm(root / "model")
    assert cdm.config.conditioner is not None
    assert torch.equal(read_published(root / "cdm.pt", 2).x_embedder.weight, cdm.x_embedder.weight)
    assert (root / "model/cdm/training.json").exists()
    shutil.rmtree(root / "model/cdm")
    train_cdm(cut)
    assert files[0].read_bytes() == files[1].read_bytes(), "killed after the last checkpoint, it still writes"


def test_a_loss_that_is_not_finite_names_its_summaries(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(root, train=CDMOptimiserSettings(steps=4, batch_size=2, warmup=0, max_skipped=0))

    def spoilt(cdm: CDM, x0: Tensor, *rest: Any) -> Any:
        loss, figures = x0_loss(cdm, x0, *rest)
        return loss * torch.nan, figures

    monkeypatch.setattr(training, "x0_loss", spoilt)
    with pytest.raises(TrainingError, match=r"It trains on .*x row \d+, .*x row \d+ of .*summaries/train\.") as stop:
        train_cdm(config)
    x0, _, _, levels = draw_batch(
        [np.load(root / f"run/summaries/train/{name}.npy") for name in SCALE.names], config.train, 0, 0, "cpu"
    )
    named = re.findall(r"(\S+x) row (\d+)", str(stop.value))
    assert [name for name, _ in named] == [SCALE.names[level] for level in levels]
    for (name, row), one in zip(named, x0, strict=True):
        assert np.array_equal(np.load(root / f"run/summaries/train/{name}.npy")[int(row)], one)


def test_it_learns_standardised_summaries_and_draws_plain_ones(root: Path) -> None:
    train_cdm(settings(root))
    cdm = load_cdm(root / "model")
    for level, name in enumerate(SCALE.names):
        known = torch.from_numpy(np.load(root / f"run/summaries/train/{name}.npy")).float()
        assert torch.allclose(cdm.mean[level], known.mean(0), atol=1e-6)
        labels = torch.full((len(known),), level)
        seen = cdm.standard(known, labels)
        assert float(seen.std(0, correction=0).max()) < 1.01
        assert float(seen.std(0, correction=0).median()) == pytest.approx(1, abs=0.01)
        assert torch.allclose(cdm.restored(seen, labels), known, atol=1e-5)
    plain = sample_summaries(cdm, 1, 2, steps=4)
    cdm.mean += 100
    assert torch.allclose(sample_summaries(cdm, 1, 2, steps=4), plain + 100, atol=1e-3)


def test_the_published_file_cannot_hold_mean_and_spread(root: Path) -> None:
    with pytest.raises(ValueError, match="published needs model.standardised false"):
        settings(root, published=str(root / "cdm.pt"))


def test_a_run_of_other_settings_is_refused(root: Path) -> None:
    train_cdm(settings(root))
    with pytest.raises(TrainingError, match=r"model\.width was 16, now 8; seed was 0, now 1\. Use the old"):
        train_cdm(settings(root, seed=1, model=CDMSizes(width=8, layers=1, heads=2), threads=1))


def test_a_run_on_another_summarizer_or_other_grids_is_refused(root: Path) -> None:
    train_cdm(settings(root))
    shutil.rmtree(root / "model")
    ZoomLDM(narrow_config()).save_pretrained(root / "model")
    np.save(root / "heldout/1.npy", np.load(root / "heldout/0.npy"))
    with pytest.raises(TrainingError, match="conditioner was .*; windows was "):
        train_cdm(settings(root))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "nothing/*.npy"}, "nothing/.*must name SSL grids"),
        ({"train": "dim.npy"}, "have 16 channels; .*dim.npy has 17: it comes from another encoder"),
        ({"train": "nan.npy"}, "must be finite"),
        ({"train": "small.npy"}, "at 2.5x a window covers 8 x 8 cells; nothing in small.npy is as large"),
        ({"per_magnification": (1, 2)}, "summaries.per_magnification must have one number, or 4"),
    ],
)
def test_grids_that_do_not_fit_are_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(root)
    np.save("dim.npy", np.random.default_rng(0).standard_normal((17, 8, 8)))
    np.save("small.npy", np.random.default_rng(0).standard_normal((16, 7, 8)))
    np.save("nan.npy", np.full((16, 8, 8), np.nan))
    config = settings(root)
    with pytest.raises(EngineError, match=message):
        train_cdm(replace(config, summaries=replace(config.summaries, **change)))  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magnifications": ("20x", "10x", "5x")}, r"magnifications is \('20x', '10x', '5x'\), not .*'2.5x'\)"),
        ({"magnifications": ("40x", "20x", "10x", "5x")}, r"magnifications is \('40x', '20x', '10x', '5x'\), not"),
        ({"base_mpp": 0.25}, "base_mpp is 0.25, not 0.5"),
    ],
)
def test_prepared_sets_of_other_magnifications_are_refused_by_name(
    root: Path, split: str, change: dict[str, object], message: str
) -> None:
    """All else is the model's: an index would mean another magnification, which no shape betrays."""
    facts = replace(FACTS, encoder=tiny_config().encoder, magnifications=SCALE.names)
    sets = {name: str(root / f"set-{name}") for name in ("train", "heldout")}
    write_data(Path(sets["heldout" if split == "train" else "train"]), facts)
    write_set(Path(sets[split]), replace(facts, **change), slides=1)  # type: ignore[arg-type]
    plain = settings(root).summaries
    with pytest.raises(PreparedMismatchError, match=f"set-{split} was prepared for another model: {message}") as caught:
        train_cdm(settings(root, summaries=replace(plain, **sets)))
    assert "encoder is" not in str(caught.value)
    assert not (root / "run").exists(), "refused before anything is written"


def test_a_model_without_summaries_is_refused(root: Path) -> None:
    conditioner = ConditionerConfig(kind="token", output_dim=32)
    ZoomLDM(narrow_config(magnifications=("20x",), conditioner=conditioner)).save_pretrained(root / "old")
    with pytest.raises(EngineError, match="has a token conditioner"):
        train_cdm(settings(root, source=str(root / "old")))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CDMOptimiserSettings(magnification_weights=(0.0,)), "magnification_weights must be positive"),
        (lambda: CDMOptimiserSettings(time_power=0), "time_power must lie in"),
        (lambda: SummarySettings(per_magnification=()), "per_magnification must be positive"),
        (lambda: CDMTrainingConfig(threads=0), "threads must be at least 1"),
    ],
)
def test_settings_refuse_nonsense(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
