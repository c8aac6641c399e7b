"""A random CLIP in QuiltNet's layout: open_clip's names, two layers a side, eight words, pictures of 32 px."""

import json
from pathlib import Path

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

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
    }
    return found | _blocks(state, "encoder.layers", "transformer.resblocks")


def tiny_clip_vision() -> CLIPVisionModelWithProjection:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=1,
                patch_size=8,
                image_size=32,
                projection_dim=16,
                hidden_act="gelu",
            )
        ).eval()


def open_clip_vision_tensors(network: CLIPVisionModelWithProjection) -> dict[str, torch.Tensor]:
    """Return the network's weights as open_clip stores them."""
    state = {name.removeprefix("vision_model."): value for name, value in network.state_dict().items()}
    names = {
        "class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight", "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias", "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    }  # fmt: skip
    found = {f"visual.{theirs}": state[ours] for theirs, ours in names.items()}
    found["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    return found | _blocks(state, "encoder.layers", "visual.transformer.resblocks")


def _blocks(state: dict[str, torch.Tensor], ours: str, theirs: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for i in range(2):
        here, there = f"{ours}.{i}", f"{theirs}.{i}"
        for kind in ("weight", "bias"):
            parts = [state[f"{here}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{there}.attn.in_proj_{kind}"] = torch.cat(parts)
            found[f"{there}.attn.out_proj.{kind}"] = state[f"{here}.self_attn.out_proj.{kind}"]
            for own, other in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                               ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                found[f"{there}.{other}.{kind}"] = state[f"{here}.{own}.{kind}"]
    return found


def write_quiltnet(
    folder: Path, network: CLIPTextModelWithProjection, vision: CLIPVisionModelWithProjection | None = None
) -> None:
    """Write QuiltNet's files with the weights of networks."""
    seen = {"visual.conv1.weight": torch.zeros(3)} if vision is None else open_clip_vision_tensors(vision)
    torch.save(open_clip_tensors(network) | seen, folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 16}}))
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(_WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nf a\nfa t</w>\n")
