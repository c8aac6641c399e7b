"""A random CLIP text model in QuiltNet's layout: open_clip's names, two layers, eight words."""

import json
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

_WORDS = ("a</w>", "f", "a", "t</w>", "fa", "fat</w>", "<|startoftext|>", "<|endoftext|>")


def tiny_clip_text() -> CLIPTextModelWithProjection:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=8,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=1,
                max_position_embeddings=8,
                projection_dim=16,
                hidden_act="gelu",
                eos_token_id=7,
                bos_token_id=6,
            )  # fmt: skip
        ).eval()


def open_clip_tensors(network: CLIPTextModelWithProjection) -> dict[str, torch.Tensor]:
    """Return the network's weights as open_clip stores them."""
    state = {name.removeprefix("text_model."): value for name, value in network.state_dict().items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(1.0),
        "visual.conv1.weight": torch.zeros(3),
    }
    for i in range(2):
        here, there = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            parts = [state[f"{here}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{there}.attn.in_proj_{kind}"] = torch.cat(parts)
            found[f"{there}.attn.out_proj.{kind}"] = state[f"{here}.self_attn.out_proj.{kind}"]
            for ours, theirs in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                                 ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                found[f"{there}.{theirs}.{kind}"] = state[f"{here}.{ours}.{kind}"]
    return found


def write_quiltnet(folder: Path, network: CLIPTextModelWithProjection) -> None:
    """Write QuiltNet's files with the weights of a network."""
    torch.save(open_clip_tensors(network), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 16}}))
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(_WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nf a\nfa t</w>\n")
