"""A path for positions through a fresh U-Net: the last group of every group norm's channels, cut off from the content.

Invariant: until denoising training begins, the path's channels at every level of the way down are a function of
position alone, whatever x_t, timestep and condition are. They see zero padding only, and learn from it to tell where
they are. Afterwards nothing is cut: every weight trains. It does not know conditions.
Source: Islam et al. 2020, how convolutions read position from zero padding.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.training.denoiser.position_pretraining import CODE_DIM, descend, look_up_sites, place_codes

log = logging.getLogger(__name__)

NoisyLatents = Callable[[int], tuple[Tensor, Tensor]]
"""A step's x_t `(B, 3, 64, 64)` and timesteps `(B,)`."""


class Pathway:
    """The path's entries in every weight of a U-Net; building it cuts them off and draws them anew."""

    def __init__(self, unet: Any, seed: int) -> None:
        self.unet, self.groups = unet, unet.config.norm_num_groups
        self.masks: dict[nn.Parameter, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self._walk()

    def own(self, channels: int) -> Tensor:
        """Return which of `channels` belong to the path: the last group, as a mask `(channels,)`."""
        mask = torch.zeros(channels, dtype=torch.bool)
        mask[channels - channels // self.groups :] = True
        return mask

    def _walk(self) -> None:
        unet = self.unet
        inner = self._layer(unet.conv_in, torch.zeros(unet.conv_in.in_channels, dtype=torch.bool))
        skips = [inner]
        for block in unet.down_blocks:
            for number, resnet in enumerate(block.resnets):
                inner = self._resnet(resnet, inner)
                self._attention(block, number)
                skips.append(inner)
            for sampler in block.downsamplers or ():
                inner = self._layer(sampler.conv, inner)
                skips.append(inner)
        inner = self._resnet(unet.mid_block.resnets[0], inner)
        for number, resnet in enumerate(unet.mid_block.resnets[1:]):
            self._attention(unet.mid_block, number)
            inner = self._resnet(resnet, inner)
        for block in unet.up_blocks:
            for number, resnet in enumerate(block.resnets):
                inner = self._resnet(resnet, torch.cat([inner, skips.pop()]))
                self._attention(block, number)
            for sampler in block.upsamplers or ():
                inner = self._layer(sampler.conv, inner)

    def _layer(self, layer: Any, inputs: Tensor, gain: float = 2.0) -> Tensor:
        """Cut a convolution or linear layer in two parts and draw the path's; return the path's output channels."""
        weight = layer.weight
        outputs = self.own(weight.shape[0])
        both = outputs[:, None] & inputs[None]
        weight[outputs[:, None] != inputs[None]] = 0
        fan = int(inputs.sum()) * weight[0, 0].numel()
        if fan:
            drawn = torch.randn(weight[both].shape, generator=self._generator) * (gain / fan) ** 0.5
            weight[both] = drawn.to(weight)
        count = int(outputs.sum())
        # Without an input the path starts from constants, all different: a group norm of equal channels is blind.
        bias = torch.randn(count, generator=self._generator) * 0.3 if fan else torch.linspace(-1, 1, count)
        layer.bias[outputs] = bias.to(layer.bias)
        self.masks[layer.weight] = both.view(*both.shape, *[1] * (weight.ndim - 2)).expand_as(weight)
        self.masks[layer.bias] = outputs
        return outputs

    def _norm(self, norm: Any, inner: Tensor) -> None:
        norm.weight[inner], norm.bias[inner] = 1, 0
        self.masks[norm.weight] = self.masks[norm.bias] = inner

    def _resnet(self, resnet: Any, inner: Tensor) -> Tensor:
        self._norm(resnet.norm1, inner)
        middle = self._layer(resnet.conv1, inner)
        resnet.time_emb_proj.weight[middle], resnet.time_emb_proj.bias[middle] = 0, 0
        self._norm(resnet.norm2, middle)
        outputs = self._layer(resnet.conv2, middle)
        if resnet.conv_shortcut is not None:
            self._layer(resnet.conv_shortcut, inner, gain=1.0)
        return outputs

    def _attention(self, block: Any, number: int) -> None:
        """Let the path pass a transformer unchanged, and let the transformer's layers see it."""
        if not hasattr(block, "attentions"):
            return
        transformer = block.attentions[number]
        inner = self.own(transformer.in_channels)
        self._norm(transformer.norm, inner)
        self._layer(transformer.proj_in, inner, gain=1.0)
        silent = [transformer.proj_out]
        for layer in transformer.transformer_blocks:
            silent += [layer.attn1.to_out[0], layer.attn2.to_out[0], layer.ff.net[2]]
        for layer in silent:
            layer.weight[inner], layer.bias[inner] = 0, 0

    def learn(
        self, noisy: NoisyLatents, context: Tensor, steps: int, dtype: torch.dtype, lr: float = 1e-2
    ) -> dict[str, nn.Linear]:
        """Train the path until the look-up sites can read their pixels' places from it; return the readers.

        context: the null context `(B, T, C)`, on the U-Net's device.
        """
        readers = {
            name: nn.Linear(int(self.own(site.to_q.in_features).sum()), CODE_DIM, bias=False, device=context.device)
            for name, site in look_up_sites(self.unet).items()
        }
        got: dict[str, Tensor] = {}
        hooks = [
            self.unet.get_submodule(name).to_q.register_forward_pre_hook(
                lambda _module, args, name=name: got.__setitem__(name, args[0])
            )
            for name in readers
        ]

        def loss_of(step: int) -> Tensor:
            x_t, times = noisy(step)
            with torch.autocast(x_t.device.type, dtype, enabled=dtype is not torch.float32):
                self.unet(x_t, times, encoder_hidden_states=context, return_dict=False)
            total = context.new_zeros(())
            for name, hidden in got.items():
                side = round(hidden.shape[1] ** 0.5)
                read = readers[name](hidden[..., -readers[name].in_features :].float())
                total = total + (read - place_codes(side, side).to(read)).square().mean()
            return total / len(got)

        self.unet.requires_grad_(False)
        for parameter in self.masks:
            parameter.requires_grad_(True)
        parameters = [*self.masks, *(p for reader in readers.values() for p in reader.parameters())]
        last = descend(parameters, loss_of, steps, lr, {p: m.to(p.device) for p, m in self.masks.items()})
        self.unet.requires_grad_(True)
        for hook in hooks:
            hook.remove()
        log.info("pathway: places read with a mean squared error of %.3f", last)
        return readers
