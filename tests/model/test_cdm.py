"""The CDM is the published network; its files are read whole, and never beside another model."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.core.errors import CheckpointError
from engine.model.cdm import CDM, CDMConfig
from engine.model.cdm_sampler import denoise_summaries, respaced_times
from engine.model.weights.cdm import conditioner_digest, load_cdm, read_cdm, read_published, save_cdm, write_published
from engine.model.weights.hub import DEMO
from engine.model.zoomldm import ZoomLDM, digest

SIZES = {"tokens": 65, "channels": 32, "magnifications": 8, "width": 16, "layers": 2, "heads": 2}


def tiny_cdm(**changes: object) -> CDM:
    """A CDM of the tiny model's size with weights that are nowhere zero."""
    torch.manual_seed(1)
    cdm = CDM(CDMConfig(**(SIZES | changes)))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in cdm.parameters():
            parameter.normal_(std=0.1)
    return cdm.eval()


def error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def equal(a: CDM, b: CDM) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# Against the published implementation


@pytest.fixture(scope="module")
def theirs(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "parity/cdm/expected.safetensors")


@pytest.fixture(scope="module")
def published(shared: Path) -> CDM:
    return read_published(shared / "parity/cdm/cdm.pt", heads=4)


@torch.no_grad()
def test_forward_is_the_published_one(published: CDM, theirs: dict[str, Tensor]) -> None:
    result = published(theirs["cdm.x"].mT, theirs["cdm.t"], theirs["cdm.y"].long())
    assert error(result.mT, theirs["cdm.forward"]) < 1e-5


def test_ten_ddim_steps_are_the_published_ones(published: CDM, theirs: dict[str, Tensor]) -> None:
    times = respaced_times(10)
    assert times == theirs["cdm.ddim10.timesteps"].long().tolist()
    result = denoise_summaries(published, theirs["cdm.ddim10.z"].mT, theirs["cdm.y"].long(), times)
    assert error(result.mT, theirs["cdm.ddim10.out"]) < 1e-5


def test_fixed_positions_are_the_published_ones(published: CDM) -> None:
    assert torch.equal(CDM(published.config).pos_embed, published.pos_embed)


def test_every_name_and_shape_of_the_full_file_is_understood(shared: Path) -> None:
    listing = json.loads((shared / "parity/full/cdm_dit_b_state_dict.json").read_text())
    with torch.device("meta"):
        cdm = CDM(CDMConfig())
    ours = {name: [list(value.shape), "float32"] for name, value in cdm.state_dict().items()}
    assert ours == listing
    assert round(sum(p.numel() for p in cdm.parameters()) / 1e6, 1) == 130.7


# Files


def test_the_published_layout_comes_back_bit_by_bit(tmp_path: Path) -> None:
    cdm = tiny_cdm()
    write_published(tmp_path / "cdm.pt", cdm)
    assert torch.load(tmp_path / "cdm.pt", weights_only=True).keys() == {"ema"}
    read = read_published(tmp_path / "cdm.pt", heads=2)
    assert equal(read, cdm)
    assert read.config == cdm.config


def test_our_layout_comes_back_bit_by_bit_and_from_halves(tmp_path: Path) -> None:
    cdm = tiny_cdm(conditioner="of a model")
    save_cdm(tmp_path / "cdm", cdm, figures={"steps": 3})
    read = read_cdm(tmp_path / "cdm")
    assert equal(read, cdm)
    assert read.config == cdm.config
    save_cdm(tmp_path / "cdm", cdm, torch.float16, {"steps": 3})
    half = read_cdm(tmp_path / "cdm")
    assert half.x_embedder.weight.dtype == torch.float32
    assert torch.equal(half.x_embedder.weight, cdm.x_embedder.weight.half().float())
    assert not half.training


def test_a_standardised_one_comes_back_and_is_not_published(tmp_path: Path) -> None:
    cdm = CDM(CDMConfig(**SIZES, standardised=True))
    cdm.mean.normal_()
    save_cdm(tmp_path / "cdm", cdm)
    assert torch.equal(read_cdm(tmp_path / "cdm").mean, cdm.mean)
    with pytest.raises(CheckpointError, match="--model.standardised false"):
        write_published(tmp_path / "cdm.pt", cdm)
    assert not (tmp_path / "cdm.pt").exists()


def test_heads_follow_from_the_widths_that_were_published(tmp_path: Path) -> None:
    write_published(tmp_path / "s.pt", tiny_cdm(width=384, layers=1, heads=3))
    assert read_published(tmp_path / "s.pt").config.heads == 6
    write_published(tmp_path / "tiny.pt", tiny_cdm())
    with pytest.raises(CheckpointError, match="does not say how many heads a CDM of width 16 has"):
        read_published(tmp_path / "tiny.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.attn.qkv.bias"), "lacks blocks.1.attn.qkv.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "beyond what the model knows, extra"),
        (lambda t: t.update({"final_layer.linear.bias": torch.ones(3)}), r"final_layer.linear.bias must be \(64,\)"),
        (lambda t: t.pop("pos_embed"), "must be a CDM; it lacks pos_embed"),
        (lambda t: t.update(pos_embed=torch.ones(65, 15)), "does not hold a CDM: a CDM's width must be even"),
    ],
)
def test_a_published_file_that_does_not_fit_names_what(tmp_path: Path, change, message: str) -> None:
    tensors = dict(tiny_cdm().state_dict())
    change(tensors)
    torch.save({"ema": tensors}, tmp_path / "cdm.pt")
    with pytest.raises(CheckpointError, match=message):
        read_published(tmp_path / "cdm.pt", heads=2 if "width" not in message else 5)


class Payload:
    """Pickles to a call; harmless, and must not be made."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def test_a_hostile_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": tiny_cdm().state_dict(), "args": Payload()}, tmp_path / "cdm.pt")
    with pytest.raises(CheckpointError, match="running code from the file, which is refused"):
        read_published(tmp_path / "cdm.pt", heads=2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "must describe a CDM"),
        ("config.json", b'{"width": 15, "heads": 1}', "width must be even"),
        ("config.json", b'{"depth": 3}', "unexpected keyword argument 'depth'"),
        ("config.json", None, "must describe a CDM"),
        ("model.safetensors", b"short", "truncated or not safetensors"),
        ("model.safetensors", None, "missing, truncated"),
    ],
)
def test_our_layout_is_checked(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    save_cdm(tmp_path / "cdm", tiny_cdm())
    path = tmp_path / "cdm" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_cdm(tmp_path / "cdm")


# Beside a model


def save_beside(model: ZoomLDM, folder: Path, **changes: object) -> CDM:
    model.save_pretrained(folder)
    known = {"conditioner": conditioner_digest(model.conditioner.state_dict())}
    cdm = tiny_cdm(**(known | changes))
    save_cdm(folder / "cdm", cdm)
    return cdm


def test_a_model_folder_carries_its_cdm(model: ZoomLDM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    before = digest(tmp_path / "model")
    cdm = save_beside(model, tmp_path / "other")
    assert equal(load_cdm(tmp_path / "other"), cdm)
    assert equal(load_cdm(tmp_path, variant="other"), cdm)
    read = ZoomLDM.from_pretrained(tmp_path / "other")
    assert not read.extras, "replicas do not need it"
    assert digest(tmp_path / "other") == before
    assert equal(load_cdm(tmp_path / "model", own=tmp_path / "other/cdm"), cdm)
    with pytest.raises(CheckpointError, match=r"would be lost: cdm/config.json"):
        model.save_pretrained(tmp_path / "other")


def test_a_model_without_one_says_what_to_do(model: ZoomLDM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"must carry a CDM \(cdm/config.json and cdm/model.safetensors\)"):
        load_cdm(tmp_path / "model")
    with pytest.raises(CheckpointError, match="must describe a CDM"):
        load_cdm(tmp_path / "model", own=tmp_path / "nowhere")


def test_a_cdm_of_another_summarizer_is_refused(model: ZoomLDM, publish, tmp_path: Path) -> None:
    save_beside(model, tmp_path / "sizes", channels=33)
    with pytest.raises(CheckpointError, match="65 tokens of 33 at 8 magnifications; the model .* needs 65 of 32 at 8"):
        load_cdm(tmp_path / "sizes")
    save_beside(model, tmp_path / "weights", conditioner="another's")
    with pytest.raises(CheckpointError, match="another Summarizer than that of the model"):
        load_cdm(tmp_path / "weights")
    folder = publish(model)
    known = conditioner_digest(model.conditioner.state_dict())
    save_cdm(folder / "cdm", tiny_cdm(conditioner=known))
    assert load_cdm(folder).config.conditioner == known, "the published layout is checked as well"
    with torch.no_grad():
        model.conditioner.layer_norm.bias.add_(1)
    save_cdm(tmp_path / "moved", tiny_cdm(conditioner=conditioner_digest(model.conditioner.state_dict())))
    with pytest.raises(CheckpointError, match="another Summarizer"):
        load_cdm(folder, own=tmp_path / "moved")
    write_published(tmp_path / "cdm.pt", tiny_cdm(conditioner=known))
    assert load_cdm(folder, own=tmp_path / "cdm.pt", heads=2).config.conditioner is None, "a published file cannot say"


def test_the_demo_has_one() -> None:
    cdm = load_cdm("demo")
    assert (cdm.config.tokens, cdm.config.magnifications) == (65, 5)
    stored = DEMO / "cdm/model.safetensors"
    assert stored.stat().st_size <= 3e6
