"""The command: what it compares and writes, that figures grow with damage, and what it says to bad input."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile
import torch
from scipy import ndimage
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import generate_large
from engine.canvas.run_state import load_state, save_state
from engine.datasets.writer import open_set
from engine.evaluation.canvas import Canvas, canvas_verdicts
from engine.evaluation.samples.crops import CropRule
from engine.evaluation.samples.encoders import load_clip
from engine.evaluation.samples.inception import Inception, load_inception
from engine.evaluation.samples.sets import open_pictures
from engine.features.bag_writer import write_bag
from engine.images.detail import detail_of
from engine.images.metrics import InMemory
from engine.model.zoomldm import ZoomLDM
from engine.quality import main, with_names
from engine.slides.phantom.render import Phantom
from tests.support.known_bag import known_features, known_plan
from tests.support.known_prepared import FACTS, write_slide
from tests.support.tiny_run import store_inputs

TISSUE = [Phantom(seed, architecture=0.5).render(0, 0, 640, 640, 0.5) for seed in (1, 2, 3)]
QUICK = ["--directions=50", "--kid_subsets=10"]


def write_tiff(path: Path, pixels: np.ndarray, mpp: float = 0.5) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    tifffile.imwrite(
        path, pixels, tile=(256, 256), photometric="rgb", resolution=(1e4 / mpp,) * 2, resolutionunit="CENTIMETER"
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`real` holds three phantoms; `finished` is a run of two steps with a random tiny model."""
    folder = tmp_path_factory.mktemp("quality")
    for i, pixels in enumerate(TISSUE):
        write_tiff(folder / "real" / f"p{i}.tiff", pixels)
    flags = {
        **store_inputs(folder, 2, 2), "canvas.height": 512, "canvas.width": 512, "sampling.stride": 500,
        "sampling.weight": 0.5, "sampling.batch_size": 2, "ray.enabled": "false", "output.formats": "[]",
        "output.folder": folder / "finished",
    }  # fmt: skip
    assert generate_large.main([f"--{k}={v}" for k, v in flags.items()]) == 0
    return folder


def quality(out: Path, *argv: object) -> tuple[int, dict]:
    code = main([*(str(a) for a in argv), f"--out={out}", *QUICK])
    path = out / "quality.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


def values(record: dict) -> dict[str, float]:
    return {figure["name"].partition(" (")[0]: figure["value"] for figure in record["figures"]}


def test_two_sets_with_everything_beside_each_figure(root: Path, tmp_path: Path, capsys) -> None:
    code, record = quality(tmp_path, root / "real", root / "real", "--encoder=texture", "--stride=128")
    assert code == 0
    assert {"Fréchet distance", "KID", "MIND", "precision", "recall", "density", "coverage"} == set(values(record))
    for figure in record["figures"]:
        beside = {"encoder", "encoder_sha256", "mpp", "crop_rule", "codec_history", "seed", "floor", "ceiling", "n_a"}
        assert beside <= figure.keys()
        assert figure["floor"] is not None
        assert figure["ceiling"] is not None
    assert record["facts"]["codec_history"] == {"A": {"tiff none": 3}, "B": {"tiff none": 3}}
    assert "0.5 µm/px" in record["facts"]["crop_rule"]
    assert values(record)["Fréchet distance"] == pytest.approx(0, abs=1e-6)
    assert values(record)["coverage"] == 1
    assert record["detail"]["flags"] == []
    assert "is below 2·D" in record["warnings"][0]
    page = (tmp_path / "quality.html").read_text()
    assert page.count("data:image/png") == 16
    assert "http" not in page
    assert "Fréchet distance" in capsys.readouterr().out
    again = quality(tmp_path / "again", root / "real", root / "real", "--encoder=texture", "--stride=128")[1]
    assert again["figures"] == record["figures"]


def damaged(kind: str, strength: int) -> list[np.ndarray]:
    def one(pixels: np.ndarray) -> np.ndarray:
        if kind == "blur":
            return ndimage.gaussian_filter(pixels, (strength, strength, 0))
        if kind == "noise":
            rough = pixels + np.random.default_rng(0).normal(0, 10 * strength, pixels.shape)
            return rough.clip(0, 255).astype(np.uint8)
        if kind == "jpeg":
            data = io.BytesIO()
            PIL.Image.fromarray(pixels).save(data, "JPEG", quality=35 - 10 * strength)
            return np.asarray(PIL.Image.open(data))
        gain = 1 - np.array([0.02, 0.10, 0.04]) * strength  # a stain that takes more green: eosin
        return (pixels * gain).astype(np.uint8)

    return [one(pixels) for pixels in TISSUE]


@pytest.mark.parametrize("kind", ["blur", "noise", "jpeg", "stain"])
def test_distances_grow_with_damage(root: Path, tmp_path: Path, kind: str) -> None:
    found = []
    for strength in (1, 3):
        for i, pixels in enumerate(damaged(kind, strength)):
            write_tiff(tmp_path / str(strength) / f"p{i}.tiff", pixels)
        record = quality(tmp_path / "out", tmp_path / str(strength), root / "real", "--encoder=demo")[1]
        found.append(values(record))
    for name in ("Fréchet distance", "KID", "MIND"):
        # KID may be negative: A shows the fields of B, and the kernel of a set with itself leaves the diagonal out.
        assert found[0][name] < found[1][name], name


def test_a_run_beside_single_patches_of_its_model(root: Path, tmp_path: Path) -> None:
    argv = (root / "finished", root / "real", "--encoder=demo", "--patches=4", "--tissue_grey=256", "--stride=64")
    code, record = quality(tmp_path, *argv)
    assert code == 0
    canvas, report = record["canvases"][0], json.loads((root / "finished" / "report.json").read_text())
    assert canvas["seam_score"] == report["seam_score"]
    assert canvas["consistency_psnr_db"] == report["consistency_psnr_db"]
    assert record["patches"]["n"] == 4
    assert "ddim, 2 steps, w = 0.5" in record["patches"]["drawn"]
    assert record["patches"]["detail"]["ratios"]["gradient"] > 0
    distances = record["patches"]["distances"]["frechet"]
    assert distances["canvas"] != distances["patches"]
    names = [verdict["name"] for verdict in record["verdicts"]]
    assert any("gradient relative to single patches" in name for name in names)
    assert any(name.startswith("Fréchet distance relative") for name in names)
    assert record["facts"]["codec_history"]["A"] == {"decoded by a model, stored without loss": 1}


def test_every_run_reports_its_detail(root: Path) -> None:
    report = json.loads((root / "finished" / "report.json").read_text())
    assert report["detail"].keys() >= {"gradient", "dark_share", "energy", "grid_share", "tissue_px"}


def test_seams_are_held_to_what_the_picture_scores_without_any() -> None:
    flat = detail_of(InMemory(np.full((3, 256, 256), 200, np.uint8)))
    for seam, control, met in ((1.04, None, True), (1.08, None, False), (1.08, 1.10, True), (1.12, 1.10, False)):
        first = canvas_verdicts(Canvas("run", seam, control, 21.0, flat, None))[0]
        assert first.met is met, (seam, control)


def test_a_run_alone_needs_no_second_set(root: Path, tmp_path: Path) -> None:
    code, record = quality(tmp_path, root / "finished", "--tissue_grey=256")
    assert code == 0
    assert record["figures"] == []
    assert record["canvases"][0]["detail"]["tissue_share"] == 1


def test_pairs_are_taken_at_the_same_places(root: Path, tmp_path: Path) -> None:
    argv = ("--encoder=texture", "--paired=true", "--training", root / "real")
    record = quality(tmp_path, root / "real", root / "real", *argv)[1]
    assert values(record)["embedding similarity"] == pytest.approx(1)
    assert record["memorisation"]["n"] > 0
    shutil.copytree(root / "real", tmp_path / "other")
    (tmp_path / "other" / "p0.tiff").unlink()
    write_tiff(tmp_path / "other" / "p0.tiff", TISSUE[0][:512])
    code = main([str(tmp_path / "other"), str(root / "real"), *argv[:2], f"--out={tmp_path}"])
    assert code == 1


def test_words_before_the_flags_are_a_and_b() -> None:
    assert with_names(["x", "y", "--seed", "1"]) == ["--a=x", "--b=y", "--seed", "1"]
    assert with_names(["--a=x"]) == ["--a=x"]


def refused(capsys, *argv: object) -> str:
    code = main([str(a) for a in argv])
    assert code == 1
    return capsys.readouterr().err


def test_different_scales_are_refused_unless_one_is_named(root: Path, tmp_path: Path, capsys) -> None:
    write_tiff(tmp_path / "fine.tiff", TISSUE[0], 0.25)
    said = refused(capsys, tmp_path / "fine.tiff", root / "real", f"--out={tmp_path}")
    assert "one µm/px" in said
    assert "0.25" in said
    assert "--crop_mpp" in said
    code, record = quality(tmp_path, tmp_path / "fine.tiff", root / "real", "--crop_mpp=0.5", "--encoder=texture",
                           "--stride=32", "--count=4")  # fmt: skip
    assert code == 0
    assert record["facts"]["mpp"] == 0.5
    assert "finest" not in refused(capsys, tmp_path / "fine.tiff", root / "real", "--crop_mpp=0.25", "--out=x")


def test_different_encoders_are_refused(tmp_path: Path, capsys) -> None:
    for name, encoder in (("a", "uni"), ("b", "phikon")):
        plan = known_plan(encoder=encoder)
        (tmp_path / name).mkdir()
        write_bag(tmp_path / name / "S-01.h5", plan, known_features(plan))
    said = refused(capsys, tmp_path / "a", tmp_path / "b", f"--out={tmp_path}")
    assert "uni" in said
    assert "phikon" in said
    code, record = quality(tmp_path, tmp_path / "a", tmp_path / "a")
    assert code == 0
    assert record["facts"]["encoder"].startswith("uni")
    assert record["facts"]["mpp"] == 0.5


def test_one_crop_is_no_set(root: Path, tmp_path: Path, capsys) -> None:
    write_tiff(tmp_path / "one.tiff", TISSUE[0][:256, :256])
    said = refused(capsys, tmp_path / "one.tiff", root / "real", "--encoder=texture", f"--out={tmp_path}")
    assert "at least two crops" in said


def test_fewer_crops_than_asked_for(root: Path, tmp_path: Path, capsys) -> None:
    said = refused(capsys, root / "real", root / "real", "--count=500", "--encoder=texture", f"--out={tmp_path}")
    assert "500 crops" in said
    assert "--count" in said


def test_a_set_without_tissue(root: Path, tmp_path: Path, capsys) -> None:
    write_tiff(tmp_path / "glass.tiff", np.full((512, 512, 3), 240, np.uint8))
    said = refused(capsys, root / "real", tmp_path / "glass.tiff", "--encoder=texture", f"--out={tmp_path}")
    assert "must show tissue" in said
    assert "glass.tiff" in said


def test_an_unreadable_file_among_many_is_listed(root: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(root / "real", tmp_path / "some")
    (tmp_path / "some" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    code, record = quality(tmp_path, tmp_path / "some", root / "real", "--encoder=texture")
    assert code == 3
    assert [Path(u["path"]).name for u in record["unusable"]] == ["broken.png"]
    assert "broken.png" in capsys.readouterr().out
    assert "broken.png" in (tmp_path / "quality.html").read_text()
    assert "whole" in refused(capsys, tmp_path / "some" / "broken.png", root / "real", "--mpp=0.5", "--out=x")


def test_a_run_still_at_work(root: Path, tmp_path: Path, capsys) -> None:
    at_work = tmp_path / "runs" / "at_work"
    shutil.copytree(root / "finished", at_work)
    state = load_state(at_work / "state.json")
    save_state(at_work / "state.json", replace(state, progress=replace(state.progress, finished=False)))
    said = refused(capsys, at_work, root / "real", f"--out={tmp_path}")
    assert "must be a finished run" in said
    shutil.copytree(root / "finished", tmp_path / "runs" / "done")
    code, record = quality(tmp_path, tmp_path / "runs", "--tissue_grey=256")
    assert code == 3
    assert [canvas["run"] for canvas in record["canvases"]] == ["done"]
    assert record["unusable"][0]["code"] == "run"


def test_nothing_there_and_wrong_usage(root: Path, tmp_path: Path, capsys) -> None:
    assert "there is nothing" in refused(capsys, tmp_path / "none", root / "real")
    (tmp_path / "empty").mkdir()
    assert "holds none" in refused(capsys, tmp_path / "empty", root / "real")
    for wrong in (["--encoder=inceptoin"], ["--count=1"], ["--paired=true"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(root / "real"), *wrong])


def test_crops_do_not_lie_on_the_grid_of_tiles(root: Path) -> None:
    rule = CropRule(0.5, None, min_tissue=0, tissue_grey=256)
    pictures = open_pictures(root / "finished")
    corners = {(c.y, c.x) for seed in range(8) for c in pictures.crops(CropRule(**vars(rule) | {"seed": seed}))}
    assert any(y % 256 for y, _ in corners)
    first = [(c.source, c.y, c.x) for c in open_pictures(root / "real").crops(rule)]
    assert first == [(c.source, c.y, c.x) for c in open_pictures(root / "real").crops(rule)]


def write_clip(folder: Path) -> CLIPVisionModelWithProjection:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=16, projection_dim=8,
        )  # fmt: skip
        network = CLIPVisionModelWithProjection(config)
    network.save_pretrained(folder)
    return network


def write_inception(path: Path) -> set[str]:
    """Store random weights under the names of the file that papers use; return the names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = Inception().state_dict()
    torch.save({n: v for n, v in weights.items() if not n.endswith("num_batches_tracked")}, path)
    learned = sum(v.numel() for n, v in weights.items() if n.endswith(("weight", "bias")) and not n.startswith("fc"))
    assert learned == 21_785_568  # Inception-v3 without classifiers
    return set(weights)


def test_any_clip_vision_tower(root: Path, tmp_path: Path) -> None:
    network = write_clip(tmp_path / "clip")
    encoder = load_clip(str(tmp_path / "clip"))
    pixels = torch.from_numpy(TISSUE[0][None, :256, :256].transpose(0, 3, 1, 2).copy())
    assert encoder.encode(pixels).shape == (1, 8)
    argv = ("--encoder=clip", f"--encoder_source={tmp_path / 'clip'}")
    record = quality(tmp_path, root / "real", root / "real", *argv)[1]
    assert "CLIP FID" in values(record)
    network.vision_model.embeddings.class_embedding = torch.nn.Parameter(torch.zeros(32))
    assert load_clip(str(tmp_path / "clip")).digest == encoder.digest


def test_inception_takes_the_papers_names_and_reads_its_file_as_data(root: Path, tmp_path: Path, capsys) -> None:
    names = {"Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch5x5_2.bn.running_var", "Mixed_7c.branch3x3dbl_3b.conv.weight"}
    assert names <= write_inception(tmp_path / "fid.pth")
    encoder = load_inception(tmp_path / "fid.pth")
    pixels = torch.from_numpy(TISSUE[0][None, :256, :256].transpose(0, 3, 1, 2).copy())
    assert encoder.encode(pixels).shape == (1, 2048)
    torch.save(replace, tmp_path / "hostile.pth")
    said = refused(capsys, root / "real", root / "real", "--inception", tmp_path / "hostile.pth", f"--out={tmp_path}")
    assert "hostile.pth" in said


def test_the_table_of_zoomldm(root: Path, tmp_path: Path, capsys) -> None:
    model = ZoomLDM.from_pretrained(root / "model")
    config = model.config
    facts = replace(FACTS, magnifications=config.magnifications[:2], encoder=config.encoder, ssl_dim=config.ssl_dim)
    data = tmp_path / "data"
    open_set(data, facts)
    places = {"20x": [(0, 0), (0, 1), (1, 0), (1, 1)], "10x": [(0, 0)]}
    write_slide(data, facts, "S", places, cells=(2, 2), images=True)
    argv = (root / "model", data, "--protocol=zoomldm", "--count=4", "--batch=4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.evaluation.protocols.STEPS", 2)
        code, record = quality(tmp_path / "out", *argv)
    assert code == 0
    row = record["table"][0]
    assert row["what"].endswith("20x")
    assert (row["n_a"], row["n_b"]) == (4, 4)
    assert row["value"] > 0
    assert "10x: 1 patches" in record["warnings"][0]
    assert "prepared set" in refused(capsys, root / "model", root / "real", "--protocol=zoomldm", "--out=x")


def test_the_table_of_large_images_says_what_it_needs(root: Path, capsys) -> None:
    argv = (root / "finished", root / "real", "--protocol=large-image-diffusion", "--out=x")
    assert "--clip" in refused(capsys, *argv)


def test_the_table_of_large_images(root: Path, tmp_path: Path) -> None:
    """Two runs beside three pictures of their size: each figure of the predecessor's table, and of how many crops."""
    write_inception(tmp_path / "fid.pth")
    write_clip(tmp_path / "clip")
    side = min(open_pictures(root / "finished").sources[0].size)
    for name in ("one", "two"):
        shutil.copytree(root / "finished", tmp_path / "runs" / name)
    for i, pixels in enumerate(damaged("noise", 1)[:3]):
        write_tiff(tmp_path / "real" / f"p{i}.tiff", np.ascontiguousarray(pixels[:side, :side]))
    argv = ("--protocol=large-image-diffusion", f"--inception={tmp_path / 'fid.pth'}", f"--clip={tmp_path / 'clip'}")
    small = ("--patches=2", "--tissue_grey=256", "--stride=128")
    code, record = quality(tmp_path / "out", tmp_path / "runs", tmp_path / "real", *argv, *small)
    assert code == 0
    table = {row["what"]: row for row in record["table"]}
    assert list(table) == ["patch FID", "crop FID", "CLIP FID", "embedding similarity"]
    assert table["crop FID"]["value"] > 0
    assert (table["CLIP FID"]["n_a"], table["CLIP FID"]["n_b"]) == (2, 3)
    assert table["embedding similarity"]["value"] is None  # a random model has no encoder
    assert "'unknown'" in table["embedding similarity"]["how"]
