"""Files in and out: nothing lost, nothing invented, nothing run, nothing overwritten."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from engine.core.errors import CheckpointError
from engine.model.weights import ldm_import
from engine.model.weights.ldm_import import to_ldm_state_dict
from engine.model.weights.ldm_names import UNET_PREFIX
from engine.model.zoomldm import ConditionerConfig, ZoomLDM, digest, tiny_config

Publish = Callable[..., Path]
KEY = f"{UNET_PREFIX}out.2.weight"


def equal(a: ZoomLDM, b: ZoomLDM) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def edit_yaml(folder: Path, dotted: str, value: object) -> None:
    path = folder / "config.yaml"
    section = document = yaml.safe_load(path.read_text())
    *parents, last = dotted.split(".")
    for name in parents:
        section = section[name]
    section[last] = value
    path.write_text(yaml.safe_dump(document))


# The published layout


@pytest.mark.parametrize("wrapped", [False, True])
def test_published_layout_is_read_whole(model: ZoomLDM, publish: Publish, wrapped: bool) -> None:
    folder = publish(model, lambda t: {"state_dict": t, "global_step": 3} if wrapped else t)
    raw = ZoomLDM.from_pretrained(folder, weights="raw")
    assert raw.config == model.config
    assert equal(raw, model)
    averaged = ZoomLDM.from_pretrained(folder)
    assert torch.equal(averaged.unet.conv_in.weight, model.unet.conv_in.weight + 1), "EMA of the U-Net …"
    assert torch.equal(averaged.vae.quant_conv.weight, model.vae.quant_conv.weight), "… and of nothing else"
    assert not any(p.is_meta for p in [*averaged.parameters(), *averaged.buffers()])


def test_without_averaged_weights_the_raw_ones_are_used(model: ZoomLDM, publish: Publish) -> None:
    folder = publish(model, lambda t: {k: v for k, v in t.items() if not k.startswith("model_ema.")})
    assert equal(ZoomLDM.from_pretrained(folder), model)


def test_a_stored_latent_scale_wins(model: ZoomLDM, publish: Publish) -> None:
    folder = publish(model, lambda t: t | {"scale_factor": torch.tensor(0.25)})
    assert ZoomLDM.from_pretrained(folder).config.scale_factor == 0.25


@pytest.mark.parametrize("attention", [(False, True), (True, False)])
def test_names_agree_with_diffusers_converters(attention: tuple[bool, bool]) -> None:
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]
    layout = {"down_block_types": down, "up_block_types": up, "layers_per_block": 2, "block_out_channels": [32, 64]}
    model = ZoomLDM(tiny_config(unet=tiny_config().unet | layout))
    published = to_ldm_state_dict(model.as_weights())
    theirs = {
        "unet": convert_ldm_unet_checkpoint(published, dict(model.unet.config)),
        "vae": convert_ldm_vae_checkpoint(published, dict(model.vae.config)),
    }
    for part, state in theirs.items():
        ours = model.as_weights().networks[part]
        if part == "vae":  # their converter serves KL autoencoders, which have no codebook
            state["quantize.embedding.weight"] = ours["quantize.embedding.weight"]
        assert state.keys() == ours.keys()
        assert all(torch.equal(state[name], ours[name]) for name in ours)


def test_two_token_predecessor_is_read(publish: Publish) -> None:
    unet = tiny_config().unet | {"cross_attention_dim": 512}
    conditioner = ConditionerConfig("token", output_dim=512, region_dim=24)
    model = ZoomLDM(tiny_config(magnifications=("20x",), unet=unet, conditioner=conditioner))
    folder = publish(model)
    edit_yaml(folder, "model.params.unet_config.params.context_dim", 512)
    section = {"patch_embed_dim": 16, "region_embed_dim": 24, "normalize_ssl": True}
    target = {"target": "ldm.modules.encoders.modules.SSLEmbedder", "params": section}
    edit_yaml(folder, "model.params.cond_stage_config", target)
    read = ZoomLDM.from_pretrained(folder, weights="raw")
    assert equal(read, model)
    assert read.config == model.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model_ema.diffusion_modelout2bias"), "lacks model_ema.diffusion_modelout2bias"),
        (lambda t: t.pop("first_stage_model.encoder.mid.attn_1.q.bias"), "lacks first_stage_model.encoder.mid"),
        (lambda t: [t.pop(k) for k in list(t) if ".encoder.down." in k], r"lacks .*, .*, .*, .*, .* and \d+ more"),
        (lambda t: t.update({"model.diffusion_model.extra.weight": torch.ones(1)}), "beyond what the model knows"),
        (lambda t: t.update({"cond_stage_model.pad_token": torch.ones(1, 1, 33)}), r"\(1, 1, 32\), is \(1, 1, 33\)"),
        (lambda t: t.update({"betas": t["betas"] * 2}), "another noise schedule"),
    ],
)
def test_every_tensor_must_fit(
    model: ZoomLDM, publish: Publish, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    folder = publish(model, lambda t: (change(t), t)[1])
    with pytest.raises(CheckpointError, match=message):
        ZoomLDM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layer.weight": torch.ones(2), "layer.bias": torch.ones(2)}, "other tensors: layer.weight, layer.bias"),
        ([torch.ones(2)], "must hold a state dict; it holds list"),
        ({"state_dict": {}}, "must hold a state dict"),
        ({KEY: torch.ones(1), "epoch": 3}, "these are none: epoch"),
    ],
)
def test_a_foreign_file_is_named_as_such(model: ZoomLDM, publish: Publish, content: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ZoomLDM.from_pretrained(publish(model, lambda _: content))


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_damaged(model: ZoomLDM, publish: Publish, keep: float) -> None:
    path = publish(model) / "weights.ckpt"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="weights.ckpt"):
        ZoomLDM.from_pretrained(path.parent)


class Payload:
    """Pickles to a call of os.mkdir: what a hostile checkpoint does, kept harmless."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("bare", [False, True])
def test_a_hostile_file_is_refused_and_does_not_run(
    model: ZoomLDM, publish: Publish, tmp_path: Path, bare: bool
) -> None:
    content = {KEY: torch.ones(1), "x": Payload(tmp_path / "ran")}
    folder = publish(model, lambda _: content)
    if bare:
        (folder / "weights.ckpt").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match="running code from the file, which is refused"):
        ZoomLDM.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(content["x"]))
    assert (tmp_path / "ran").exists(), "the payload would have worked"


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("model", 3, "model must be a mapping"),
        ("model.params.linear_start", None, "model.params.linear_start is missing"),
        ("model.params.parameterization", "v", "parameterization must be 'eps'"),
        ("model.params.unet_config.params.channel_mult", [2, 1], "channel_mult must begin with 1"),
        ("model.params.unet_config.params.use_spatial_transformer", False, "use_spatial_transformer must be True"),
        ("model.params.first_stage_config.params.ddconfig.double_z", True, "double_z must be False"),
        ("model.params.cond_stage_config.target", "x.BERTEmbedder", "got BERTEmbedder"),
        ("model.params.unet_config.params.context_dim", 31, "cross_attention_dim=31 must equal"),
        ("model.params.unet_config.params.channel_mult", "wide", "config.yaml does not describe"),
    ],
)
def test_config_yaml_is_checked(model: ZoomLDM, publish: Publish, dotted: str, value: object, message: str) -> None:
    folder = publish(model)
    edit_yaml(folder, dotted, value)
    with pytest.raises(CheckpointError, match=message):
        ZoomLDM.from_pretrained(folder)


def test_config_yaml_must_be_yaml_and_builds_no_objects(model: ZoomLDM, publish: Publish) -> None:
    folder = publish(model)
    for text in ("{", "!!python/object/apply:os.getcwd []"):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match="does not describe a ZoomLDM"):
            ZoomLDM.from_pretrained(folder)


def test_an_unknown_choice_of_weights_is_refused(model: ZoomLDM, publish: Publish) -> None:
    with pytest.raises(ValueError, match="weights must be one of"):
        ldm_import.read(publish(model), "average")  # type: ignore[arg-type]


# Our layout


def test_round_trip_is_exact_and_keeps_extras(model: ZoomLDM, tmp_path: Path) -> None:
    model.extras = {"guidance/linear": {"a": torch.randn(3, 4)}, "encoder/model": {"b": torch.arange(3)}}
    model.channels_last().save_pretrained(tmp_path / "saved")
    read = ZoomLDM.from_pretrained(tmp_path / "saved")
    assert read.config == model.config
    assert equal(read, model)
    assert read.extras.keys() == model.extras.keys()
    assert torch.equal(read.extras["guidance/linear"]["a"], model.extras["guidance/linear"]["a"])
    assert digest(read) == digest(model) == digest(tmp_path / "saved")
    assert ZoomLDM.from_pretrained(tmp_path, variant="saved").config == model.config


@pytest.mark.parametrize("name", ["linear", "../guidance/linear", "/tmp/linear", "unet/linear", "a/b/c"])
def test_extras_stay_in_folders_of_their_own(model: ZoomLDM, tmp_path: Path, name: str) -> None:
    model.extras = {name: {"a": torch.ones(1)}}
    with pytest.raises(ValueError, match="must be named folder/name"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_diffusers_reads_our_folders(model: ZoomLDM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "saved", subfolder="unet")
    vae = VQModel.from_pretrained(tmp_path / "saved", subfolder="vae")
    assert torch.equal(unet.conv_in.weight, model.unet.conv_in.weight)
    assert torch.equal(vae.quantize.embedding.weight, model.vae.quantize.embedding.weight)


def test_half_precision_on_disk(model: ZoomLDM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    sizes = [sum(p.stat().st_size for p in (tmp_path / n).rglob("*.safetensors")) for n in ("full", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    read = ZoomLDM.from_pretrained(tmp_path / "half")
    assert torch.equal(read.unet.conv_in.weight, model.unet.conv_in.weight.half().float())
    assert torch.equal(read.vae.quantize.embedding.weight, model.vae.quantize.embedding.weight)
    assert digest(read) == digest(tmp_path / "half") != digest(tmp_path / "full")
    narrow = ZoomLDM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert narrow.vae.quantize.embedding.weight.dtype == torch.float32
    with torch.no_grad():
        model.unet.conv_in.weight[0] = 1e6
    with pytest.raises(ValueError, match="beyond torch.float16"):
        model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert digest(tmp_path / "half") == digest(read), "a failed write leaves the earlier model"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "half"], "and nothing beside it"


def test_digest_sees_one_changed_value(model: ZoomLDM) -> None:
    before = digest(model)
    with torch.no_grad():
        model.unet.time_embedding.linear_1.weight[0, 0] += 1e-3
    assert digest(model) != before


def test_saving_replaces_a_model_and_nothing_else(model: ZoomLDM, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    model.save_pretrained(target)
    with torch.no_grad():
        model.unet.conv_in.weight[0] = 7
    model.save_pretrained(target)
    assert ZoomLDM.from_pretrained(target).unet.conv_in.weight[0, 0, 0, 0] == 7
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="would be lost: notes.txt"):
        model.save_pretrained(target)
    assert (target / "notes.txt").read_text() == "mine"
    with pytest.raises(CheckpointError, match="must be a folder"):
        model.save_pretrained(target / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "is not a model config"),
        ("config.json", b'{"magnifications": ["20x"], "width": 3}', "unknown keys"),
        ("config.json", b"[]", "is not a model config"),
        ("unet/diffusion_pytorch_model.safetensors", b"short", "truncated or not safetensors"),
        ("conditioner/model.safetensors", None, "missing: conditioner/model.safetensors"),
    ],
)
def test_our_layout_is_checked(model: ZoomLDM, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        ZoomLDM.from_pretrained(tmp_path / "saved")


def test_weights_of_another_model_do_not_fit(model: ZoomLDM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a")
    ZoomLDM(tiny_config(ssl_dim=17)).save_pretrained(tmp_path / "b")
    (tmp_path / "a/conditioner/model.safetensors").replace(tmp_path / "b/conditioner/model.safetensors")
    with pytest.raises(CheckpointError, match="wrong shape: mag_embedding.weight must be .* dim_reduce.weight"):
        ZoomLDM.from_pretrained(tmp_path / "b")
