"""SSL encoders: the demo's filter bank on phantom tissue, the published ones on tiny or meta networks."""

import io
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from engine.core.errors import CheckpointError
from engine.model.encoders import registry
from engine.model.encoders.base import digest_of
from engine.model.encoders.demo import SQUASH, DemoEncoder
from engine.model.encoders.registry import EMBEDDED, ENCODERS, SSLEncoder, load_encoder
from engine.model.encoders.texture import RAW_DIM, TextureEncoder, derivative_filters, raw_features
from engine.model.encoders.vit import DINOV2_REG_L, PHIKON, UNI, build_vit, load_vit, load_weights, normalise
from engine.slides.phantom.render import Phantom

DIM = 32
RAW_OF_WAVES = [
    0.2171,
    0.7857,
    0.1232,
    0.2183,
    0.0327,
    -3.1278,
    -2.3392,
    -3.8636,
    -1.8402,
    -3.1657,
    -2.6892,
    0.1341,
    -2.791,
    -3.8166,
    0.0798,
    -4.5227,
    -4.1788,
    -4.5451,
]
"""Every seventh raw feature of waves()."""
TINY_DINO = replace(DINOV2_REG_L, width=24, depth=1, heads=3, grid_px=70)
TINY_UNI = replace(UNI, width=24, depth=1, heads=3)
TINY_PHIKON = replace(PHIKON, width=24, depth=2, heads=3)


def tissue(seed: int, side: int = 4) -> Tensor:
    """side² cells of one phantom: uint8 (N, 3, 256, 256)."""
    picture = Phantom(seed).render(0, 0, side * 256, side * 256, 0.5)
    cells = picture.reshape(side, 256, side, 256, 3).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(np.ascontiguousarray(cells)).reshape(-1, 3, 256, 256)


@pytest.fixture(scope="module")
def demo() -> DemoEncoder:
    return DemoEncoder.fit(torch.cat([tissue(seed) for seed in range(4)]), dim=DIM)


@pytest.fixture(scope="module")
def heldout() -> Tensor:
    return tissue(10_000)


def white(value: int = 255, count: int = 1) -> Tensor:
    return torch.full((count, 3, 256, 256), value, dtype=torch.uint8)


def perturbed(cells: Tensor) -> Tensor:
    """Blur (σ about 1 px), 7 % more stain and JPEG at quality 80: what a decoder does to a cell, roughly."""
    kernel = torch.tensor([0.06, 0.24, 0.4, 0.24, 0.06])
    planes = F.pad(cells.float().reshape(-1, 1, 256, 256), (2, 2, 2, 2), mode="reflect")
    blurred = F.conv2d(F.conv2d(planes, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1)).reshape(cells.shape)
    stained = (255 * (blurred / 255).clamp(1e-3, 1) ** 1.07).round().byte()
    pictures = []
    for cell in stained:
        stream = io.BytesIO()
        Image.fromarray(cell.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=80)
        pictures.append(torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1))
    return torch.stack(pictures)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between vectors standardised over channels, as the conditioner sees them."""
    a, b = (F.normalize(v - v.mean(1, keepdim=True), dim=1) for v in (a, b))
    return a @ b.T


def test_demo_vectors_tell_a_cell_from_its_neighbours(demo: DemoEncoder, heldout: Tensor) -> None:
    table = similarity(demo.encode(perturbed(heldout)), demo.encode(heldout))
    assert torch.equal(table.argmax(dim=1), torch.arange(len(heldout)))
    # Few slides fitted: what a new slide's cells share (its stain) weighs more than with the trainer's many.
    assert table.diag().mean() > table[~torch.eye(len(table), dtype=torch.bool)].mean() + 0.25


def test_demo_sees_stain_and_layout(demo: DemoEncoder, heldout: Tensor) -> None:
    cell = heldout[:1].clone()
    cell[..., :128] = 240
    original, half_empty, mirrored = demo.encode(torch.cat([heldout[:1], cell, cell.flip(3)]))
    assert (original - half_empty).norm() > 1
    assert (mirrored - half_empty).norm() > 0.2


def waves() -> Tensor:
    """One cell of pink stripes and purple dots, made of cosines: the same on every machine."""
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    dots = (torch.cos(x / 5) * torch.cos(y / 7)).clamp(0, 1)
    stripes = 0.5 + 0.5 * torch.cos((x + 2 * y) / 9)
    density = torch.stack([0.65 * dots + 0.07 * stripes, 0.7 * dots + 0.5 * stripes, 0.3 * dots + 0.1 * stripes])
    return (245 * 10**-density).round().byte()[None]


def test_raw_features_stay_what_stored_encoders_were_fitted_on() -> None:
    # A stored mean and projection mean nothing to other filters: a change here needs every demo model fitted anew.
    raw = raw_features(waves(), derivative_filters())[0]
    assert raw.shape == (RAW_DIM,)
    torch.testing.assert_close(raw[::7], torch.tensor(RAW_OF_WAVES), rtol=0, atol=2e-4)


def test_texture_is_the_raw_features_by_name_and_needs_no_file() -> None:
    texture = load_encoder("texture")
    assert isinstance(texture, TextureEncoder)
    cells = torch.cat([waves(), waves().flip(3)])
    assert torch.equal(texture.encode(cells)[:1], raw_features(waves(), derivative_filters()))
    assert texture.encode(cells).shape == (2, texture.dim)
    assert texture.digest == TextureEncoder().digest
    with pytest.raises(ValueError, match="uint8"):
        texture.encode(cells.float())


def test_demo_damps_what_hardly_varies() -> None:
    cells = torch.cat([tissue(seed) for seed in range(4)])
    spread = DemoEncoder.fit(cells, dim=DIM).encode(cells).std(dim=0)
    assert 0.7 < spread[0] < 1.1
    assert spread[-1] < 0.6 * spread[0]


def test_demo_vectors_are_well_scaled(demo: DemoEncoder, heldout: Tensor) -> None:
    vectors = demo.encode(heldout)
    assert vectors.dtype == torch.float32
    assert vectors.shape == (len(heldout), DIM)
    assert 0.2 < vectors.square().mean().sqrt() < 2


@pytest.mark.parametrize("value", [0, 128, 245, 255])
def test_demo_survives_featureless_cells(demo: DemoEncoder, value: int) -> None:
    vector = demo.encode(white(value))
    assert vector.isfinite().all()
    assert vector.abs().max() <= SQUASH
    assert vector.std() > 0.1, "the conditioner divides by the deviation over channels"


def test_demo_vector_does_not_depend_on_its_batch(demo: DemoEncoder, heldout: Tensor) -> None:
    assert torch.equal(demo.encode(heldout)[5:6], demo.encode(heldout[5:6]))
    assert demo.encode(heldout[:0]).shape == (0, DIM)


def test_demo_fit_is_reproducible_and_travels(demo: DemoEncoder, heldout: Tensor, tmp_path: Path) -> None:
    again = DemoEncoder.fit(torch.cat([tissue(seed) for seed in range(4)]), dim=DIM)
    assert again.digest == demo.digest
    path = tmp_path / f"{EMBEDDED}.safetensors"
    path.parent.mkdir()
    save_file(demo.tensors(), path)
    for loaded in (load_encoder("demo", source=tmp_path), load_encoder("demo", extras={EMBEDDED: demo.tensors()})):
        assert loaded.digest == demo.digest
        assert (loaded.id, loaded.dim) == ("demo", DIM)
        assert torch.equal(loaded.encode(heldout[:2]), demo.encode(heldout[:2]))


def test_demo_fit_refuses_what_it_cannot_learn_from() -> None:
    with pytest.raises(ValueError, match="at least 128 cells; got 3"):
        DemoEncoder.fit(white(count=3))
    with pytest.raises(ValueError, match="look the same"):
        DemoEncoder.fit(white(count=8), dim=4)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"center": torch.zeros(RAW_DIM)},
        {"center": torch.zeros(RAW_DIM), "projection": torch.zeros(3, 16)},
        {"center": torch.zeros(RAW_DIM), "projection": torch.full((RAW_DIM, 16), torch.nan)},
        {"center": torch.zeros(RAW_DIM), "projection": torch.zeros(RAW_DIM, 16, dtype=torch.int32)},
    ],
)
def test_demo_refuses_foreign_tensors(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="demo encoder must hold"):
        load_encoder("demo", extras={EMBEDDED: tensors})


@pytest.mark.parametrize(
    "cells", [torch.zeros(1, 3, 256, 256), torch.zeros(1, 256, 256, 3).byte(), torch.zeros(3, 256, 256).byte()]
)
def test_wrong_cells_are_refused(demo: DemoEncoder, cells: Tensor) -> None:
    with pytest.raises(ValueError, match=r"cells must be uint8 \(B, 3, 256, 256\); got"):
        demo.encode(cells)


def test_digest_sees_values_names_and_shapes() -> None:
    weights = {"a": torch.arange(6.0), "b": torch.ones(2)}
    others = [
        {"a": torch.arange(6.0), "c": torch.ones(2)},
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)},
        {"a": torch.arange(6.0), "b": torch.tensor([1.0, 1.0001])},
        {"a": torch.arange(6.0).double(), "b": torch.ones(2)},
    ]
    assert digest_of(dict(reversed(weights.items()))) == digest_of(weights)
    assert len({digest_of(w) for w in [weights, *others]}) == 5


# The published encoders


def random_weights(spec) -> dict[str, Tensor]:
    """Random tensors under the names of the installed transformers."""
    rng = torch.Generator().manual_seed(0)
    state = build_vit(spec).state_dict()
    return {name: torch.randn(value.shape, generator=rng) * 0.5 for name, value in state.items()}


def as_timm(spec) -> dict[str, Tensor]:
    """The same in timm's layout, with the three projections fused."""
    state, timm = random_weights(spec), {}
    for name, value in state.items():
        for ours, theirs in (
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.cls_token", "cls_token"),
            ("encoder.layer.", "blocks."),
            ("attention.o_proj", "attn.proj"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("layernorm.", "norm."),
        ):
            name = name.replace(ours, theirs)  # noqa: PLW2901
        if "q_proj" in name:
            parts = [state[f"encoder.layer.{name[7:].replace('q_proj', f'{p}_proj')}"] for p in "qkv"]
            timm[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif "_proj" not in name:
            timm[name] = value
    return timm


def test_tiny_uni_matches_the_published_implementation(shared: Path) -> None:
    folder = shared / "parity" / "encoder"
    encoder = load_vit(replace(UNI, width=48, depth=2, heads=3), folder)
    expected = load_file(folder / "expected.safetensors")
    with torch.inference_mode():
        got = encoder.network(pixel_values=expected["encoder.image"]).pooler_output
    torch.testing.assert_close(got, expected["encoder.cls"], rtol=0, atol=1e-5)


def test_every_name_of_the_full_uni_is_used(shared: Path) -> None:
    names = json.loads((shared / "parity/full/uni_vit_l16_state_dict.json").read_text())
    tensors = {name: torch.empty(shape, device="meta") for name, (shape, _) in names.items()}
    network = load_weights(build_vit(UNI), tensors, "timm", "UNI", device="meta")
    assert sum(p.numel() for p in network.parameters()) == sum(t.numel() for t in tensors.values())


def test_timm_layout_loads(tmp_path: Path) -> None:
    torch.save(as_timm(TINY_UNI), tmp_path / UNI.filename)
    encoder: SSLEncoder = load_vit(TINY_UNI, tmp_path)
    network = build_vit(TINY_UNI)
    network.load_state_dict(random_weights(TINY_UNI), assign=True)
    cells = tissue(1, side=1)
    with torch.inference_mode():
        expected = network.eval()(pixel_values=normalise(cells)).pooler_output
    torch.testing.assert_close(encoder.encode(cells), expected)
    assert (encoder.id, encoder.dim) == ("uni", 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dino_with_registers_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    spelled = {n.replace(".q_proj.", ".attention.query."): v for n, v in random_weights(TINY_DINO).items()}
    save_file(spelled, tmp_path / DINOV2_REG_L.filename)
    encoder = load_vit(TINY_DINO, tmp_path, dtype=dtype)
    vectors = encoder.encode(torch.cat([white(), white(0)]))
    assert vectors.dtype == torch.float32
    assert vectors.shape == (2, 24)
    assert vectors.isfinite().all()
    assert not torch.allclose(vectors[0], vectors[1])
    assert next(encoder.network.parameters()).dtype == dtype


PUBLISHED_VIT_NAMES = (
    ("layers.", "encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
"""Names inside the installed transformers → names in the files of ViTModel on the Hub."""


def test_phikon_loads_under_its_published_names_and_answers_with_the_class_token(tmp_path: Path) -> None:
    weights = random_weights(TINY_PHIKON)
    published = {}
    for name, value in weights.items():
        for ours, theirs in PUBLISHED_VIT_NAMES:
            name = name.replace(ours, theirs)  # noqa: PLW2901
        published[name] = value
    assert "encoder.layer.1.attention.attention.query.weight" in published
    assert "encoder.layer.1.output.dense.bias" in published
    save_file(published, tmp_path / PHIKON.filename)
    encoder = load_vit(TINY_PHIKON, tmp_path)
    network = build_vit(TINY_PHIKON)
    network.load_state_dict(weights, assign=True)
    cells = tissue(1, side=1)
    with torch.inference_mode():
        expected = network.eval()(pixel_values=normalise(cells)).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.encode(cells), expected)
    assert (encoder.id, encoder.dim) == ("phikon", 24)


def test_the_full_phikon_has_the_parameters_of_a_vit_b() -> None:
    assert sum(p.numel() for p in build_vit(PHIKON).parameters()) == 85_798_656


def test_pictures_are_normalised_as_imagenet() -> None:
    pixels = normalise(white())
    assert pixels.shape == (1, 3, 224, 224)
    torch.testing.assert_close(
        pixels[0, :, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )
    cell = tissue(2, side=1)
    resized = Image.fromarray(cell[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    ours = normalise(cell)[0] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor(
        [0.485, 0.456, 0.406]
    ).view(3, 1, 1)
    assert (ours * 255 - torch.from_numpy(np.array(resized)).permute(2, 0, 1)).abs().max() < 2


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / UNI.filename
    right = as_timm(TINY_UNI)
    torch.save(right, path)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin lacks .*and \d+ more"):
        load_encoder("uni", source=tmp_path)
    for wrong, message in (
        ({k: v for k, v in right.items() if k != "norm.bias"}, "lacks layernorm.bias"),
        (right | {"head.weight": torch.zeros(2, 24)}, "head.weight"),
        (right | {"pos_embed": torch.zeros(1, 50, 24)}, r"must be \(1, 197, 24\), is \(1, 50, 24\)"),
        (right | {"blocks.0.attn.qkv.bias": torch.zeros(71)}, "lacks encoder.layer.0.attention"),
    ):
        torch.save(wrong, path)
        with pytest.raises(CheckpointError, match=message):
            load_vit(TINY_UNI, tmp_path)


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/zoomldm-hostile-encoder"),))


def test_damaged_and_hostile_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / UNI.filename
    torch.save(as_timm(TINY_UNI), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_encoder("uni", source=tmp_path)
    path.write_bytes(pickle.dumps({"cls_token": Hostile()}, protocol=2))
    with pytest.raises(CheckpointError, match="refused"):
        load_encoder("uni", source=tmp_path)
    assert not Path("/tmp/zoomldm-hostile-encoder").exists()
    (tmp_path / DINOV2_REG_L.filename).write_bytes(b"\x10")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load_encoder("dinov2-reg-l", source=tmp_path)


# Finding them


@pytest.mark.parametrize(("id", "hint"), [("UNI", "'uni'"), ("dinov2", "'dinov2-reg-l'"), ("unknown", "--embeddings")])
def test_an_unknown_encoder_names_the_nearest(id: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"got '{id}'.*{hint}"):
        load_encoder(id)


@pytest.mark.parametrize(
    ("id", "word"),
    [
        ("demo", "demo encoder"),
        ("uni", "UNI's"),
        ("dinov2-reg-l", "DINOv2"),
        ("phikon", "Phikon"),
        ("quiltnet", "QuiltNet-B-32's"),
    ],  # fmt: skip
)
def test_a_folder_without_the_file_is_refused(tmp_path: Path, id: str, word: str) -> None:
    with pytest.raises(CheckpointError, match=f"--model.encoder_source must be a .*{word}.*has none"):
        load_encoder(id, source=tmp_path)


def test_a_model_without_its_demo_encoder_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"must carry it as encoder/model.safetensors"):
        load_encoder("demo", extras={"guidance/linear": {}})


@pytest.mark.parametrize("source", ["no/such/folder", "nowhere", "./owner", "/absent/folder"])
def test_a_source_that_is_nothing_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        load_encoder("uni", source=source)


def test_weights_come_from_the_hub_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def locate(repo_id: str, filenames: list[str], what: str, flag: str) -> Path:
        asked.append((repo_id, list(filenames), what, flag))
        return tmp_path

    monkeypatch.setattr(registry, "locate_files", locate)
    save_file({"a": torch.zeros(1)}, tmp_path / DINOV2_REG_L.filename)
    for source in (None, "someone/copy"):
        with pytest.raises(CheckpointError, match="lacks"):
            load_encoder("dinov2-reg-l", source=source)
    assert [a[0] for a in asked] == ["facebook/dinov2-with-registers-large", "someone/copy"]
    assert asked[0][1:] == (
        ["model.safetensors"],
        "The SSL encoder DINOv2 ViT-L/14 with registers",
        "--model.encoder_source",
    )


def test_nothing_needs_timm_or_torchvision() -> None:
    assert not {"timm", "torchvision"} & set(sys.modules)
    assert ENCODERS == ("demo", "texture", "uni", "dinov2-reg-l", "phikon", "quiltnet", "plip", "clip")
