"""The benchmarks run at tiny size and their figures have the right form; nothing here is about speed."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import reliability
from benchmarks.sampling import gpu, guidance, memory, overhead
from benchmarks.support.bare import BareRun, demo_config, maps_for, picture_digest
from benchmarks.training import cross_scale, gpu_training
from benchmarks.viewer import tiles
from engine.core.units import BRCA_SCALE
from engine.model.config import published_config
from engine.model.networks import build_networks
from engine.model.zoomldm import ZoomLDM
from engine.sampling.denoiser import LocalDenoiser, PointwiseDenoiser
from engine.slides.phantom.render import Phantom
from tests.support.tiny_run import narrow_model

FOLDER = Path(gpu.__file__).parents[1]
TINY = {"sampling.stride": 500, "sampling.batch_size": 2, "model.dtype": "float32", "model.threads": 1}


@pytest.fixture(scope="module")
def tiny() -> ZoomLDM:
    return narrow_model().requires_grad_(requires_grad=False)


def pointwise_run(size: int) -> BareRun:
    config = demo_config(size, {"sampling.stride": 250})
    return BareRun.of(config, BRCA_SCALE, 4, memory.MAPS)


def test_bare_run_ends_early_when_asked(tmp_path: Path) -> None:
    run = pointwise_run(320)
    assert [[len(p.steps) for p in r.plan.passes] for r in (run, run.first_steps(1))] == [[4, 3], [1, 1]]
    parts: list[str] = []
    timing = run.go(tmp_path / "whole", PointwiseDenoiser(), parts.append)
    run.first_steps(1).go(tmp_path / "cut", PointwiseDenoiser())
    assert parts == ["sampling", "decoding"]
    assert 0 < timing.sampling_waited_s < timing.sampling_s
    assert timing.wall_s == timing.sampling_s + timing.decoding_s
    assert picture_digest(tmp_path / "whole") != picture_digest(tmp_path / "cut")


def test_maps_are_the_models_or_fitted(tiny: ZoomLDM, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, none = (demo_config(512, {"guidance.method": method}) for method in ("linear", "none"))
    assert maps_for(none, tiny, PointwiseDenoiser()) == {}
    fitted = maps_for(linear, tiny, PointwiseDenoiser())["guidance/linear"]
    assert torch.allclose(
        fitted["matrix"], torch.eye(3, dtype=torch.float64), atol=0.2
    )  # its pictures are its latents, clipped
    monkeypatch.setattr(tiny, "extras", {"guidance/linear": {"matrix": torch.zeros(3, 3), "offset": torch.zeros(3)}})
    assert maps_for(linear, tiny, PointwiseDenoiser()) == tiny.extras


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_overhead_compares_the_same_batches(tiny: ZoomLDM) -> None:
    config = demo_config(256, TINY | {"decode.batch_size": 2})
    run = BareRun.of(config, tiny.config.scale, tiny.config.ssl_dim, {})
    said: list[str] = []
    found = overhead.compare(run, tiny, 1, said.append)
    (pair,) = found["pairs"]  # type: ignore[misc]
    assert found["same_bytes"] is True
    assert pair["batches"][0] == pair["batches"][1] == 3  # two steps and a window
    assert pair["ratio"] == pytest.approx(pair["pool_wall_s"] / pair["pure_compute_s"])
    assert pair["pool_wall_s"] > pair["replica_compute_s"] > 0
    assert 0 < pair["not_waiting_share"] < 1
    assert len(said) == 1


def test_stopwatch_gives_the_local_answers(tiny: ZoomLDM, tmp_path: Path) -> None:
    config = demo_config(256, TINY | {"guidance.method": "none", "sampling.stride": 1000})
    run = BareRun.of(config, tiny.config.scale, tiny.config.ssl_dim, {})
    local = overhead.StoppedDenoiser(tiny)
    timing = run.go(tmp_path / "a", local)
    run.go(tmp_path / "b", LocalDenoiser(tiny))
    assert picture_digest(tmp_path / "a") == picture_digest(tmp_path / "b")
    assert local.batches == 2
    assert 0 < local.seconds < timing.wall_s


def test_memory_weighs_every_part_of_a_run() -> None:
    row = memory.weigh(512, ("tiff", "png"), stride=500)
    peaks = row["peak_mb"]
    assert list(peaks) == ["before", "sampling", "decoding", "exports", "report"]  # type: ignore[call-overload]
    assert list(peaks.values()) == sorted(peaks.values())  # type: ignore[attr-defined]
    assert json.loads(json.dumps(row)) == row


def test_gpu_extrapolates_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    size = ["--device", "cpu", "--model", "tiny", "--size", "320", "--batch-size", "2", "--dtype", "float32"]
    steps = ["--steps", "2", "--limit-steps", "1", "--corrections", "1", "--methods", "newton,none"]
    assert gpu.main([*size, *steps, "--json", str(file)]) == 0
    newton, none = json.loads(file.read_text())["rows"]
    assert capsys.readouterr().out.count("EXTRAPOLATED from 1 of 2 steps") == 2
    assert (newton["method"], none["method"]) == ("newton", "none")
    assert newton["pflop"] > 2 * none["pflop"]
    assert newton["sampling_s"] == pytest.approx(2 * newton["sampling_measured_s"], rel=1e-3)
    assert 1 < none["sampling_s"] / none["sampling_measured_s"] < 2  # what it begins from is encoded once
    for row in (newton, none):
        assert row["tiles_per_step"] == 4
        assert row["total_s"] == pytest.approx(row["sampling_s"] + row["decoding_s"])
        assert row["tflops_network"] >= row["tflops"] > 0
        assert row["peak_gib"] is None


def test_a_training_step_is_timed_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    config = ["--config", "configs/train_demo_refine.yaml", "--initial.model", "demo", "--precision", "float32"]
    argv = [*config, "--batches", "1,2", "--steps", "1", "--peak-tflops", "10"]
    assert gpu_training.main([*argv, "--json", str(file)]) == 0
    one, two = json.loads(file.read_text())["rows"]
    counted = [row["tflops"] * row["step_s"] for row in (one, two)]
    assert counted[1] == pytest.approx(2 * counted[0])
    assert one["share"] == pytest.approx(one["tflops"] / 10)
    assert one["patches_per_s"] == pytest.approx(1 / one["step_s"])


def test_full_size_is_the_published_one() -> None:
    networks = build_networks(published_config(), "meta").named()
    millions = {name: sum(p.numel() for p in net.parameters()) / 1e6 for name, net in networks.items()}
    assert millions == pytest.approx({"unet": 400.9, "vae": 55.3, "conditioner": 38.7}, abs=0.06)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "model.device=cuda needs a GPU" in capsys.readouterr().out
    assert gpu_training.main([]) == 1
    assert "there must be a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["support/bare.py", "sampling/gpu.py", "training/gpu_training.py", "sampling/memory.py"]
)
def test_these_need_no_ray(name: str) -> None:
    tree = ast.parse((FOLDER / name).read_text())
    used = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    used += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    assert not [u for u in used if u.split(".")[0] in ("ray", "actors") or u == "benchmarks.sampling.overhead"]


def test_reliability_page_counts_what_was_tried_and_lost(tmp_path: Path) -> None:
    trials = [
        {"group": "driver", "fault": "SIGKILL", "lost": lost, "seconds": 1, "outcome": said}
        for lost, said in ((False, "resumed"), (False, "resumed"), (True, ""))
    ]
    record = {
        "date": "2026-01-02",
        "left_out": 4,
        "skipped": 0,
        "machine": "m",
        "versions": {"ray": "2"},
        "trials": trials,
    }
    (tmp_path / "faults.json").write_text(json.dumps(record))
    assert reliability.main([f"--record={tmp_path / 'faults.json'}", f"--out={tmp_path / 'page.md'}"]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "**3 faults tried, 1 lost** (2026-01-02; m, ray 2)." in page
    assert "4 of its tests were left out" in page
    assert "| SIGKILL | 3 | 1 | resumed |" in page
    assert page.count("Not tried in this run.") == 4


def test_pieces_share_patches_as_they_have_room() -> None:
    assert cross_scale.shares(18, [1, 1, 16, 16]) == [1, 1, 8, 8]
    assert cross_scale.shares(2, [0, 1, 1]) == [0, 1, 1]
    with pytest.raises(ValueError, match="3 patches must fit 2 pieces with room for 2"):
        cross_scale.shares(3, [1, 1])


def test_cross_scale_sees_what_it_says_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--folder", str(tmp_path), "--at", "5x", "--pieces", "2", "--small", "1", "--heldout", "2"]
    flags += ["--ratio", "9", "--steps", "3", "--stride", "500", "--threads", "1"]
    flags += ["--precision", "float32", "--seeds"]
    assert cross_scale.main([*flags, "0"]) in (0, 1)
    first = json.loads((tmp_path / "figures.json").read_text())
    assert [name.rpartition(" ")[0].rpartition(": ")[2] for name in first] == ["1", "3", "3"]
    trained = json.loads((tmp_path / "alone/0/training.json").read_text())
    assert trained["patches"] == {"20x": 18, "10x": 6, "5x": 2, "2.5x": 0, "1.25x": 0}
    assert trained["config"]["train"]["magnification_weights"] == [0, 0, 1, 0, 0]
    made = (tmp_path / "joint/0/denoiser.pt").stat().st_mtime_ns
    capsys.readouterr()
    assert cross_scale.main([*flags, "0"]) in (0, 1)
    assert (tmp_path / "joint/0/denoiser.pt").stat().st_mtime_ns == made, "what was done is not done again"
    assert json.loads((tmp_path / "figures.json").read_text()) == first
    with pytest.raises(ValueError, match="must not be beyond step 2; it is at 3"):
        cross_scale.main([*flags, "0", "--steps", "6"])
    table = capsys.readouterr().out
    assert [line.count("|") for line in table.splitlines()] == 7 * [5], "two bounds and three trainings under a head"


def test_tiles_of_the_viewer_are_counted() -> None:
    found = tiles.measure(1024, 6)
    assert found.keys() == {"side_px", "tiles", "tiles_per_cpu_s", "tiles_per_s", "memory_grown_mb"}
    assert min(found["tiles_per_cpu_s"], found["tiles_per_s"]) > 0


def test_ratios_of_distances_are_of_the_same_cells() -> None:
    picture = Phantom(3).render(0, 0, 1024, 1024, 0.5).transpose(2, 0, 1)
    real, patches = guidance.crops(picture[:, :512, :512], 128), guidance.crops(picture[:, 512:, 512:], 128)
    same = guidance.distances_to(real, patches, patches, halves=4)
    assert same["kid_ratio"] == same["frechet_ratio"] == [1.0, 1.0, 1.0]
    dull = (patches // 4 + 96).astype(np.uint8)
    worse = guidance.distances_to(real, dull, patches, halves=4)
    for name in ("kid", "frechet"):
        value, low, high = np.array(worse[f"{name}_ratio"])
        assert 1 < low <= high, name
        assert value == pytest.approx(worse[name] / worse[f"{name}_of_patches"], abs=0.1), name  # type: ignore[operator]
