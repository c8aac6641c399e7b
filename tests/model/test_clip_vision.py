"""CLIP's vision towers: open_clip's file means what transformers' does, and what is no CLIP is named."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from engine.core.errors import CheckpointError
from engine.model.encoders.clip import SEEN
from engine.model.encoders.registry import describe_encoder, load_encoder
from engine.model.encoders.vit import normalise
from tests.support.tiny_tower import tiny_clip_text, tiny_clip_vision, write_quiltnet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("quiltnet")
    write_quiltnet(made, tiny_clip_text(), tiny_clip_vision())
    return made


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_open_clips_file_is_the_same_network(folder: Path) -> None:
    encoder = load_encoder("quiltnet", folder)
    assert (encoder.id, encoder.dim) == ("quiltnet", 16)
    with torch.no_grad():
        wanted = tiny_clip_vision()(pixel_values=normalise(pictures(), 32, SEEN)).image_embeds
    torch.testing.assert_close(encoder.encode(pictures()), wanted)
    said = describe_encoder("quiltnet", folder)
    assert (said.id, said.dim, said.digest) == ("quiltnet", 16, encoder.digest)


def test_transformers_file_is_the_same_network(folder: Path, tmp_path: Path) -> None:
    """PLIP's and OpenAI's files have transformers' names and OpenAI's quick GELU."""
    network = tiny_clip_vision()
    text = {f"text_model.{n}": torch.zeros(2) for n in ("a", "b")}
    old = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    torch.save(network.state_dict() | text | old, tmp_path / "pytorch_model.bin")
    encoder = load_encoder("plip", tmp_path)
    near = functional.cosine_similarity(encoder.encode(pictures()), load_encoder("quiltnet", folder).encode(pictures()))
    assert 0.9 < float(near.min()) < 1 - 1e-7  # the other GELU, and nothing else


def test_what_is_no_clip_is_named(tmp_path: Path) -> None:
    torch.save({"visual.conv1.weight": torch.zeros(2), "token_embedding.weight": torch.zeros(2)},
               tmp_path / "open_clip_pytorch_model.bin")  # fmt: skip
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must hold a CLIP vision tower"):
        load_encoder("quiltnet", tmp_path)
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"QuiltNet-B-32's open_clip_config\.json"):
        load_encoder("quiltnet", tmp_path)
