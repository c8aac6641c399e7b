"""Words and maps of words as a run's conditions: what is refused, what is said, what decides the grid."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import generate_large
from engine.conditions import conditions
from engine.conditions.text_map import read_text_map
from engine.core.errors import EngineError
from engine.images.ome_zarr import Image
from engine.model.text.prior import TextPrior, TextPriorConfig
from engine.model.text.towers import load_tower
from engine.model.text.weights import save_prior
from engine.sampling.config import RunConfig
from tests.support.tiny_prior import tiny_prior
from tests.support.tiny_run import store_model
from tests.support.tiny_tower import tiny_clip_text, write_quiltnet

BOX = "{text: fat, x: 256, y: 0, width: 256, height: 512}"
SIZE = (512, 1024)


def written(folder: Path, text: str, name: str = "map.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def masks_of(folder: Path, text: str, base: str | None = "stroma", name: str = "map.yaml") -> dict[str, np.ndarray]:
    found = read_text_map(written(folder, text, name), base, SIZE, 0.5)
    np.testing.assert_allclose(found.masks.sum(axis=0), 1, atol=1e-6)
    return dict(zip(found.texts, found.masks, strict=True))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("boxes: []", "at least one region"),
        ("boxes: [{text: fat, x: 0, y: 0, width: 256}]", "box 1 must have height, text, width, x, y"),
        (f"boxes: [{BOX}]\ncolour: red", "must have the keys"),
        (f"boxes: [{BOX}]\nunit: cells", "must be px or um"),
        (f"boxes: [{BOX}]\nsoft: wide", "must be a number"),
        (BOX.replace("fat", "''").join(["boxes: [", "]"]), "must have a text"),
        (BOX.replace("512", "-1").join(["boxes: [", "]"]), "at least one cell"),
        (BOX.replace("512", ".nan").join(["boxes: [", "]"]), "must be a number"),
        (BOX.replace("width: 256", "width: 200").join(["boxes: [", "]"]), None),
        (BOX.replace("256", "100").join(["boxes: [", "]"]).replace("512", "200"), "at least one cell of 256 x 256 px"),
        (BOX.replace("x: 256", "x: 900").join(["boxes: [", "]"]), r"must lie on the canvas, 1024 x 512 px"),
        ("[1, 2]", "must have the keys"),
        ("boxes: [", "YAML file of boxes"),
    ],
)
def test_wrong_maps_are_refused(content: str, said: str | None, tmp_path: Path) -> None:
    if said is None:  # narrow, but as much as a cell in all
        masks_of(tmp_path, content)
        return
    with pytest.raises(EngineError, match=said):
        masks_of(tmp_path, content)


def test_the_rest_needs_a_text_and_has_one(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="leaves cells without a text"):
        masks_of(tmp_path, f"boxes: [{BOX}]", None)
    with pytest.raises(EngineError, match="exclude each other"):
        masks_of(tmp_path, f"text: fat\nboxes: [{BOX}]")
    whole = "boxes: [{text: fat, x: 0, y: 0, width: 1024, height: 512}]"
    assert list(masks_of(tmp_path, whole, None)) == ["fat"]
    assert set(masks_of(tmp_path, f"text: much stroma\nboxes: [{BOX}]", None)) == {"much stroma", "fat"}


def test_later_boxes_lie_over_earlier_ones(tmp_path: Path) -> None:
    over = "{text: no fat, x: 256, y: 0, width: 256, height: 256}"
    found = masks_of(tmp_path, f"soft: 0\nboxes: [{BOX}, {over}]")
    assert np.array_equal(found["fat"], [[0, 0, 0, 0], [0, 1, 0, 0]])
    assert np.array_equal(found["no fat"], [[0, 1, 0, 0], [0, 0, 0, 0]])


def test_micrometres_and_soft_borders(tmp_path: Path) -> None:
    sharp = masks_of(tmp_path, f"soft: 0\nboxes: [{BOX}]")["fat"]
    assert np.array_equal(sharp, [[0, 1, 0, 0]] * 2)
    um = BOX.replace("256", "128").replace("512", "256")
    assert np.array_equal(masks_of(tmp_path, f"unit: um\nsoft: 0\nboxes: [{um}]")["fat"], sharp)
    soft = masks_of(tmp_path, f"soft: 128\nboxes: [{BOX}]")["fat"]
    assert 0 < soft[:, 0].min() <= soft[:, 0].max() < 0.5 < soft[:, 1].min() <= soft[:, 1].max() < 1
    assert np.array_equal(soft, masks_of(tmp_path, f"unit: um\nsoft: 64\nboxes: [{um}]")["fat"])


def test_annotations_of_qupath_are_regions(tmp_path: Path) -> None:
    ring = [[0, 0], [512, 0], [512, 512], [0, 512], [0, 0]]
    hole = [[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]]
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring, hole]},
        "properties": {"classification": {"name": "much fat"}},
    }
    collection = {"type": "FeatureCollection", "features": [feature]}
    found = masks_of(tmp_path, json.dumps(collection), name="a.geojson")["much fat"]
    assert np.array_equal(found > 0.5, [[0, 1, 0, 0], [1, 1, 0, 0]])
    ring[1] = ring[2] = [5000, 0]
    with pytest.raises(EngineError, match="feature 1 must lie on the canvas"):
        masks_of(tmp_path, json.dumps(collection), name="b.geojson")
    del feature["properties"]
    ring[1], ring[2] = [512, 0], [512, 512]
    with pytest.raises(EngineError, match="a class"):
        masks_of(tmp_path, json.dumps(collection), name="c.geojson")


def test_empty_texts_and_other_sources_are_refused() -> None:
    for text in ("", "  "):
        with pytest.raises(ValueError, match="text must say something"):
            RunConfig(text=text)
    with pytest.raises(ValueError, match="goes with text"):
        RunConfig(negative_text="fat")
    for other in ({"reference": "a.png"}, {"embeddings": "a.npy"}):
        with pytest.raises(ValueError, match="exclude each other"):
            RunConfig(text="fat", **other)
    with pytest.raises(ValueError, match="takes neither reference nor embeddings nor text"):
        RunConfig(text="fat", condition="cdm")
    assert not [key for key in RunConfig().picture_keys() if "text" in key and not key.startswith("model.")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    save_prior(folder / "text", tiny_prior())
    flags = {
        "model.source": store_model(folder), "model.text_source": folder / "text", "text_steps": 3,
        "canvas.height": 512, "canvas.width": 512, "sampling.stride": 500, "sampling.weight": 0,
        "output.formats": "[]", "ray.enabled": "false",
    }  # fmt: skip
    return [f"--{k}={v}" for k, v in flags.items()]


def test_a_run_in_words_says_so_and_its_resume_draws_nothing_again(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, f"text: stroma\nboxes: [{BOX}]")
    argv = [*inputs, "--text_map", path, "--negative_text", "much zebra fat", f"--output.folder={tmp_path / 'run'}"]
    assert generate_large.main(argv) == 0
    assert "does not know zebra" in capsys.readouterr().err
    grid = np.load(tmp_path / "run" / conditions.STORED)
    assert grid.shape == (16, 2, 2)
    said = Image.open(tmp_path / "run" / "image.ome.zarr").provenance["config"]
    assert (said["negative_text"], said["text_tower"], said["text_regions"]) == (
        "much zebra fat", "words", ["stroma", "fat"],
    )  # fmt: skip
    assert len(said["text_prior"]) == 64
    assert "model.text_source" not in said

    def refuse(*_: object) -> None:
        raise AssertionError("the grid must not be drawn again")

    monkeypatch.setattr("engine.conditions.text.sample_grid", refuse)
    (tmp_path / "run" / "report.json").unlink()
    assert generate_large.main(argv) == 0
    assert np.array_equal(np.load(tmp_path / "run" / conditions.STORED), grid)
    written(tmp_path, f"text: stroma\nboxes: [{BOX.replace('256, y', '0, y')}]")
    assert generate_large.main(argv) == 1
    assert "conditions was" in capsys.readouterr().err


def test_a_region_of_it_is_sampled_again(inputs: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert generate_large.main([*inputs, "--text=much fat", f"--output.folder={run}"]) == 0
    assert generate_large.main(["--redo", "0,0,128,128", "--seed", "1", str(run)]) == 0


def test_texts_that_cannot_be_drawn_change_nothing(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*inputs, f"--output.folder={tmp_path / 'run'}"]
    for more, code, said in (
        (["--text="], 2, "must say something"),
        (["--text=脂肪"], 1, "must have words that the tower 'words' knows"),
        (["--text=zebra"], 1, "It knows: fat, much, no, stroma."),
        ([f"--text_map={written(tmp_path, f'boxes: [{BOX}]')}"], 1, "leaves cells without a text"),
        (["--text=fat", f"--model.text_source={tmp_path / 'none'}"], 1, "must describe a text prior"),
    ):
        try:
            found = generate_large.main([*run, *more])
        except SystemExit as stopped:
            found = int(str(stopped.code))
        assert (found, said in capsys.readouterr().err) == (code, True), more
    assert not (tmp_path / "run" / "image.ome.zarr").exists()
    without = [flag for flag in run if not flag.startswith("--model.text_source")]
    assert generate_large.main([*without, "--text=fat"]) == 1
    assert "must carry a text prior" in capsys.readouterr().err


def test_a_prior_of_a_published_tower_takes_that_one_alone(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = tiny_clip_text()
    write_quiltnet(tmp_path, network)
    found = load_tower("quiltnet", None, tmp_path)
    sizes = TextPriorConfig(16, "unknown", tower="quiltnet", tower_digest=found.digest, text_dim=found.dim, window=2,
                            width=16, layers=1, heads=2)  # fmt: skip
    prior = TextPrior(sizes)
    torch.nn.init.normal_(prior.final.weight)  # a new one says the mean of everything
    save_prior(tmp_path / "prior", prior)
    words = [f"--model.text_source={tmp_path / 'prior'}", f"--model.text_tower_source={tmp_path}", "--text=a fat"]
    argv = [*(flag for flag in inputs if not flag.startswith("--model.text_source")), *words]
    assert generate_large.main([*argv, f"--output.folder={tmp_path / 'run'}"]) == 0
    network.text_model.final_layer_norm.bias.data += 1
    write_quiltnet(tmp_path, network)
    assert generate_large.main([*argv, f"--output.folder={tmp_path / 'other'}"]) == 1
    assert "was trained with the tower 'quiltnet' of 64 channels" in capsys.readouterr().err


def test_a_long_text_is_cut_and_that_is_said(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "much fat, " * 250
    assert generate_large.main([*inputs, f"--text={text}", f"--output.folder={tmp_path / 'run'}"]) == 0
    assert "counts up to 48 words" in capsys.readouterr().err
