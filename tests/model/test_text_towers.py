"""CLIP's text models: open_clip's file means what transformers' does, nothing in a file runs, what lacks is said."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModelWithProjection

from engine.core.errors import CheckpointError
from engine.model.text.clip_text import read_clip_text
from engine.model.text.towers import load_tower
from tests.support.tiny_tower import tiny_clip_text, write_quiltnet


@pytest.fixture(scope="module")
def network() -> CLIPTextModelWithProjection:
    return tiny_clip_text()


@pytest.fixture(scope="module")
def folder(network: CLIPTextModelWithProjection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("quiltnet")
    write_quiltnet(made, network)
    return made


def test_open_clips_file_is_the_same_network(network: CLIPTextModelWithProjection, folder: Path) -> None:
    read = read_clip_text(folder / "open_clip_pytorch_model.bin").eval()
    ids = torch.tensor([[6, 0, 5, 7]])
    with torch.no_grad():
        torch.testing.assert_close(read(ids).text_embeds, network(ids).text_embeds)
        torch.testing.assert_close(read(ids).last_hidden_state, network(ids).last_hidden_state)


def test_it_says_which_gelu_it_has(folder: Path, tmp_path: Path, network: CLIPTextModelWithProjection) -> None:
    for name in ("open_clip_pytorch_model.bin", "open_clip_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    assert read_clip_text(tmp_path / "open_clip_pytorch_model.bin").config.hidden_act == "quick_gelu"
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json"):
        read_clip_text(tmp_path / "open_clip_pytorch_model.bin")


def test_a_tower_reads_texts_of_any_length(folder: Path) -> None:
    tower = load_tower("quiltnet", None, folder)
    tokens, counts = tower.encode(["fat", "a fat a fat a fat a fat a fat"])
    assert tokens.shape == (2, 8, 64)
    assert counts.sum(dim=1).tolist() == [3, 8]  # between a start and an end; what is too long is cut
    assert tower.length("fat") == (3, 8)
    assert tower.length("a " * 500)[0] == 502
    assert tower.dim == 64
    assert tower.digest == load_tower("quiltnet", None, folder).digest


def test_what_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"open_clip_pytorch_model\.bin, .*merges\.txt"):
        load_tower("quiltnet", None, tmp_path)
    with pytest.raises(ValueError, match="text tower must be one of"):
        load_tower("bert")
    with pytest.raises(CheckpointError, match="there is none"):
        load_tower("words")


def test_nothing_in_a_file_runs(tmp_path: Path) -> None:
    torch.save(json.loads, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused"):
        read_clip_text(tmp_path / "pytorch_model.bin")
    torch.save({"visual.conv1.weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="CLIP text model"):
        read_clip_text(tmp_path / "pytorch_model.bin")
