"""Activations of the U-Net's blocks, pooled: which there are, how wide they are, and one pass that collects them.

Names, in the order they are computed: down.0 (finest) …, mid, up.0 (coarsest) …; a block's activation is what it hands
on, after its down- or up-sampling. It does not know latents, noise or tiles.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor, nn

from engine.model.config import ModelConfig


class _Collected(Exception):
    """All blocks that were asked for are in; what comes after them need not be computed."""


def block_widths(config: ModelConfig) -> dict[str, int]:
    """Return the channels of every block by name, in the order they are computed."""
    channels = config.unet["block_out_channels"]
    down = {f"down.{i}": width for i, width in enumerate(channels)}
    up = {f"up.{i}": width for i, width in enumerate(reversed(channels))}
    return {**down, "mid": channels[-1], **up}


def check_blocks(config: ModelConfig, blocks: Sequence[str]) -> int:
    """Return the summed width of some blocks. Raises ValueError for none, an unknown one or one named twice."""
    widths = block_widths(config)
    wrong = [name for name in blocks if name not in widths]
    if wrong or not blocks or len(set(blocks)) != len(blocks):
        raise ValueError(
            f"blocks must be different ones of {', '.join(widths)}, at least one; got {', '.join(blocks) or 'none'}."
        )
    return sum(widths[name] for name in blocks)


@torch.no_grad()
def block_means(
    unet: nn.Module,
    blocks: Sequence[str],
    sample: Float[Tensor, "b c h w"],
    time: Shaped[Tensor, " b"],
    tokens: Float[Tensor, "b t d"],
) -> Float32[Tensor, "b width"]:
    """Run the U-Net up to the last of `blocks`; return their spatial means side by side, float32 (B, ΣC).

    `sample` is (B, 3, h, w), `time` (B,), `tokens` (B, T, C), on the U-Net's device and in its dtype.
    """
    means: dict[str, Tensor] = {}

    def collect(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            del module, inputs
            # A down block also returns what its skip connections need.
            activation = output[0] if isinstance(output, tuple) else output
            means[name] = activation.float().mean(dim=(2, 3))
            if len(means) == len(blocks):
                raise _Collected

        return hook

    hooks = [_module(unet, name).register_forward_hook(collect(name)) for name in blocks]  # type: ignore[arg-type]
    try:
        unet(sample, time, encoder_hidden_states=tokens, return_dict=False)
    except _Collected:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([means[name] for name in blocks], dim=1)


def _module(unet: nn.Module, name: str) -> nn.Module:
    path = {"down": "down_blocks", "up": "up_blocks", "mid": "mid_block"}
    kind, _, index = name.partition(".")
    return unet.get_submodule(f"{path[kind]}.{index}" if index else path[kind])
