"""What a training will cost, before a weight is read: parameters, FLOP and memory of a step, and patches per level.

The networks are built and run once on the meta device, so the full-size model is counted in seconds and in no memory.
FLOP are 2 per multiply-add, as torch counts them. It does not know optimisers beyond the size of AdamW's state.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engine.core.units import LATENT_CHANNELS, TILE_LATENT_PX
from engine.datasets.dataset import PreparedSet
from engine.datasets.schema import DATASET
from engine.model.config import ModelConfig
from engine.model.networks import Networks, build_networks
from engine.model.summarizer import GRID_SIDE
from engine.model.weights import hub, ldm_import
from engine.training.autoencoder.settings import VQConfig
from engine.training.autoencoder.train import AutoencoderNetworks, open_images
from engine.training.denoiser.settings import AccumulatedSettings, JointConfig, LearningConfig
from engine.training.denoiser.train import network_config, open_source

Forward = Callable[[int], Tensor]
_STATE_NBYTES = 20
"""Bytes per trained parameter: weight, gradient, average and AdamW's two moments, each float32."""
_CHECKPOINT_NBYTES = 16
"""The same without the gradient."""


def training_table(config: JointConfig | VQConfig) -> str:
    """Return what `--plan` prints. Raises: EngineError for a set or initial model that does not fit."""
    model = model_config(config)
    networks = build_networks(model, "meta")
    trained, forward = work_of(config, model, networks)
    train = config.train
    workers = (config.ray.workers or 1) if config.ray.enabled else 1
    guessed = config.ray.enabled and config.ray.workers is None
    at_once = max(1, train.batch_size // (workers * train.accumulate))
    flop, saved, kept = step_cost(trained, forward)
    checkpointing = isinstance(config, JointConfig) and config.train.gradient_checkpointing
    flop *= 4 / 3 if checkpointing else 1
    share = 0.5 if config.precision != "float32" else 1.0
    activations = (kept if checkpointing else saved) * at_once * share
    own = sum(p.numel() for p in trained.parameters())
    sizes = ", ".join(f"{part} {_millions(net)}" for part, net in networks.named().items())
    lines = [
        f"model           {sizes} parameters; {own / 1e6:.1f} M of them are trained",
        *_data_lines(config, model, train),
        f"step            {train.batch_size} patches = {workers} worker(s) x {train.accumulate} part(s) x {at_once}"
        f"{' (as if of one; by default every GPU is one: give --ray.workers for theirs)' if guessed else ''}",
        f"FLOP            {flop / 1e12:,.2f} TFLOP a patch, {flop * train.batch_size / 1e15:,.3f} PFLOP a step, "
        f"{flop * train.batch_size * train.steps / 1e18:,.1f} EFLOP in {train.steps:,} steps",
        f"memory          {own * _STATE_NBYTES / 2**30:,.2f} GiB weights, gradients, average and optimiser + about "
        f"{activations / 2**30:,.2f} GiB activations a worker ({config.precision}"
        f"{', recomputed' if checkpointing else ''}), without the libraries' own",
        f"disk            {own * _CHECKPOINT_NBYTES / 2**30:,.2f} GiB a checkpoint, twice while it is written",
    ]
    return "\n".join(lines)


def step_cost(trained: nn.Module, forward: Forward) -> tuple[float, int, int]:
    """Return FLOP of one sample forward and backward, and float32 bytes it keeps for the backward pass: all, or what
    recomputing block by block leaves (the inputs of blocks, and one whole block at a time).
    """
    with FlopCounterMode(display=False) as counter:
        forward(1).sum().backward()
    one, two = (_kept(trained, forward, batch) for batch in (1, 2))
    return float(counter.get_total_flops()), two[0] - one[0], two[1] - one[1]  # saved weights cancel


def _kept(trained: nn.Module, forward: Forward, batch: int) -> tuple[int, int]:
    seen: dict[int, int] = {}
    begun: list[int] = []
    blocks: list[int] = []
    inputs = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen.setdefault(storage._cdata, storage.nbytes())
        return tensor

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal inputs
        inputs += args[0].untyped_storage().nbytes()
        begun.append(sum(seen.values()))

    def leave(_: nn.Module, args: tuple[Any, ...], output: object) -> None:
        del args, output
        blocks.append(sum(seen.values()) - begun.pop())

    watched = [block for block in trained.modules() if isinstance(block, ResnetBlock2D | Transformer2DModel)]
    hooks = [block.register_forward_pre_hook(enter) for block in watched]
    hooks += [block.register_forward_hook(leave) for block in watched]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(batch)  # kept until it is counted: a storage that is freed could be counted again
    total = sum(seen.values())
    del output
    for hook in hooks:
        hook.remove()
    return total, total - sum(blocks) + inputs + max(blocks, default=0)


def model_config(config: LearningConfig) -> ModelConfig:
    """Return the sizes of the model that is trained. Raises: EngineError for an initial model that cannot be read."""
    if config.initial.model is None:
        return network_config(config.model)
    return ldm_import.config_of(hub.locate(config.initial.model, config.initial.variant, "--initial.model"))


def work_of(config: LearningConfig, model: ModelConfig, networks: Networks) -> tuple[nn.Module, Forward]:
    """Return the networks that learn, and their forward pass on a batch of that many samples."""
    size = (LATENT_CHANNELS, TILE_LATENT_PX, TILE_LATENT_PX)
    if isinstance(config, VQConfig):
        module, side = AutoencoderNetworks(networks.vae), config.train.crop_px
        return module, lambda batch: module(torch.empty(batch, 3, side, side, device="meta"))[0]
    joint = nn.ModuleList([networks.unet, networks.conditioner])
    shape = cells_shape(model)

    def forward(batch: int) -> Tensor:
        cells = [torch.empty(shape, device="meta")] * batch
        context = networks.conditioner(cells, [0] * batch)
        times = torch.zeros(batch, device="meta")
        latents = torch.empty(batch, *size, device="meta")
        return networks.unet(latents, times, encoder_hidden_states=context, return_dict=False)[0]

    return joint, forward


def cells_shape(model: ModelConfig) -> tuple[int, int, int]:
    """Return the shape (channels, h, w) of the largest condition that a patch has, prepared for the conditioner."""
    if model.conditioner.kind == "summarizer":
        return model.ssl_dim, GRID_SIDE, GRID_SIDE
    return model.ssl_dim + model.conditioner.region_dim, 1, 1


def _data_lines(config: LearningConfig, model: ModelConfig, train: AccumulatedSettings) -> list[str]:
    """Say how often each magnification is drawn, and how many patches it has where the set is there."""
    draws = train.steps * train.batch_size
    if not (Path(config.data) / DATASET).is_file():
        names = model.magnifications
        weights = train.magnification_weights or (1.0,) * len(names)
        lines = [f"data            no prepared set in {config.data} yet; drawn in {train.steps:,} steps:"]
        drawn = zip(names, weights, strict=False)
        return lines + [f"  {name:10} {draws * w / sum(weights) / 1e6:12,.2f} M" for name, w in drawn]
    data = PreparedSet(config.data)
    source = open_source(data, model) if isinstance(config, JointConfig) else open_images(data, model)
    lines = [
        f"data            {config.data}: {len(data.slides)} slides, {data.facts.encoder}; patches, and how often each"
    ]
    chances = source.weights(train.magnification_weights)  # the source's names: a set may end before the model does
    for level, (name, chance) in enumerate(zip(source.names, chances, strict=True)):
        patches = source.count(level)
        lines.append(f"  {name:10} {patches:12,} {draws * chance / max(patches, 1):12,.1f} times")
    return lines


def _millions(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M"
