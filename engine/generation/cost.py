"""What a run will cost, before a weight is read: network calls, FLOP, memory, disk and time.

The networks are built and run once on the meta device, so the full-size model is counted in a second and in no
memory. It does not know how a run is done. FLOP are 2 per multiply-add, as torch counts them (convolutions, matrix
products, attention).
"""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from engine.canvas.canvas import canvas_nbytes
from engine.conditions.inversion import Windows
from engine.core.units import LATENT_CHANNELS, LATENT_FACTOR, TILE_LATENT_PX, TILE_PX
from engine.model.config import ModelConfig
from engine.model.networks import build_networks
from engine.sampling.config import RunConfig
from engine.sampling.plan import Pass, Plan, Tiling
from engine.sampling.ssl_grid import MAX_CELLS

GPU_TFLOPS = {"bfloat16": 100.0, "float16": 100.0, "float32": 30.0, "float64": 10.0}
"""Assumed speed of one data-centre GPU on these networks; the printed time says so."""
_DTYPE_NBYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class NetworkCost:
    """FLOP of one tile in each network, and bytes of a replica."""

    unet: float
    encode: float
    decode: float
    summarize: float
    weights_nbytes: int
    activations_nbytes: int
    """Largest sum of tensors alive in a call, without the libraries' workspaces."""


@dataclass(frozen=True)
class Calls:
    """Tiles that go through each network in a whole run; padding of last batches included."""

    unet: int = 0
    encode: int = 0
    decode: int = 0
    summarize: int = 0

    def __add__(self, other: "Calls") -> "Calls":
        return Calls(*(a + b for a, b in zip(_counts(self), _counts(other), strict=True)))

    def flop(self, cost: NetworkCost) -> float:
        """Return the FLOP of these calls."""
        prices = (cost.unet, cost.encode, cost.decode, cost.summarize)
        return sum(n * price for n, price in zip(_counts(self), prices, strict=True))


def _counts(calls: Calls) -> tuple[int, int, int, int]:
    return calls.unet, calls.encode, calls.decode, calls.summarize


class _LiveBytes(TorchDispatchMode):
    """Follow which tensors are alive; on the meta device, where nothing is allocated, too."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 (torch's signature)
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return out

    def _follow(self, tensor: Tensor) -> None:
        # Views share a storage: it counts once, and until its last user is gone.
        storage, nbytes = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        self._users[storage] = self._users.get(storage, 0) + 1
        if self._users[storage] == 1:
            self._live += nbytes
            self.peak = max(self.peak, self._live)
        weakref.finalize(tensor, self._release, storage, nbytes)

    def _release(self, storage: int, nbytes: int) -> None:
        self._users[storage] -= 1
        if not self._users[storage]:
            del self._users[storage]
            self._live -= nbytes


def network_cost(model: ModelConfig, dtype: str, batch: int, guided_calls: bool) -> NetworkCost:
    """Count one call of each network. `guided_calls`: the null context goes along, which doubles the U-Net's batch."""
    networks = build_networks(model, "meta")
    tokens = networks.conditioner.null(1).shape[1]
    width = model.conditioner.output_dim
    size = (LATENT_CHANNELS, TILE_LATENT_PX, TILE_LATENT_PX)

    def unet(b: int) -> object:
        context = torch.empty(b, tokens, width, device="meta")
        t = torch.zeros(b, device="meta")
        return networks.unet(torch.empty(b, *size, device="meta"), t, encoder_hidden_states=context, return_dict=False)

    def encode(b: int) -> object:
        return networks.vae.encode(torch.empty(b, 3, TILE_PX, TILE_PX, device="meta"), return_dict=False)

    def decode(b: int) -> object:
        latents = torch.empty(b, *size, device="meta")
        return networks.vae.decode(latents, force_not_quantize=True, return_dict=False)

    def summarize(b: int) -> object:
        return networks.conditioner([torch.empty(model.ssl_dim, 1, 1, device="meta")] * b, [0] * b)

    scale = _DTYPE_NBYTES[dtype] / 4
    peaks = (_peak(unet, batch * (2 if guided_calls else 1)), _peak(decode, batch))
    return NetworkCost(
        *(_flop(call) for call in (unet, encode, decode, summarize)),
        weights_nbytes=int(scale * sum(4 * p.numel() for net in networks for p in net.parameters())),
        activations_nbytes=int(scale * max(peaks)),
    )


def _flop(call: Callable[[int], object]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(1)
    return float(counter.get_total_flops())


def _peak(call: Callable[[int], object], batch: int) -> int:
    with torch.no_grad(), _LiveBytes() as live:
        call(batch)
    return live.peak


def evaluated(tiling: Tiling) -> int:
    """Return how many tiles are computed for one pass over a tiling: whole batches."""
    return tiling.batch_count * tiling.batch_size


def level_calls(plan: Plan, pass_: Pass, number: int, config: RunConfig) -> Calls:
    """Count one pass over a level: what it begins from, denoising, newton's corrections, and its picture for the
    levels it steers: at every step of a joint pass, once where it is finished."""
    tiling, steps = pass_.tilings[number], len(pass_.steps)
    if tiling is None:
        steers = pass_.guided or pass_.begins == "guide"
        once = steers and number + 1 == pass_.coarsest and not (plan.given and number == 0)
        return Calls(decode=evaluated(plan.decodes[number])) if once else Calls()
    tiles = evaluated(tiling)
    total = Calls(unet=tiles * sum(_predictions(pass_, s.t) for s in pass_.steps), summarize=tiles * steps)
    if number and pass_.guided and config.guidance.method == "newton":
        guided = [_predictions(pass_, s.t) for s in pass_.steps if config.guidance.covers(s.t)]
        n = tiles * config.guidance.corrections
        total += Calls(unet=2 * n * sum(guided), encode=2 * n * len(guided), decode=n * len(guided))
    if pass_.begins == "guide":
        total += Calls(encode=tiles)
    if pass_.guided and any(pass_.tilings[number + 1 :]):
        total += Calls(decode=evaluated(plan.decodes[number]) * steps)
    return total


def _predictions(pass_: Pass, t: int) -> int:
    """Return how many calls of the U-Net a prediction takes: with w the null context goes along."""
    return 2 if pass_.weight_at(t) else 1


def pass_calls(plan: Plan, pass_: Pass, config: RunConfig) -> Calls:
    """Count one pass over all levels."""
    return sum((level_calls(plan, pass_, number, config) for number in range(len(plan.levels))), Calls())


def level_flop(plan: Plan, number: int, config: RunConfig, cost: NetworkCost) -> float:
    """Return the FLOP of a level in a whole run; the finest is decoded at its end."""
    calls = sum((level_calls(plan, p, number, config) for p in plan.passes), Calls())
    if plan.levels[number] is plan.finest:
        calls += Calls(decode=evaluated(plan.decode))
    return calls.flop(cost)


def export_nbytes(plan: Plan, config: RunConfig) -> int:
    """Return what the exports take at most, before compression: 3 bytes a px, pyramids a third more."""
    px = plan.finest.height * plan.finest.width * LATENT_FACTOR**2
    pyramids = 1 + sum(name in ("tiff", "ome-tiff", "dzi") for name in config.output.formats)
    return px * 3 * pyramids * 4 // 3 + px * 3 * ("png" in config.output.formats)


def probe_cpu_tflops(channels: int, dtype: torch.dtype, batch: int, threads: int, seconds: float = 0.5) -> float:
    """Measure a 3×3 convolution of a network's own shape on `threads` cores, in TFLOP/s."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _convolution_tflops(channels, dtype, batch, seconds)
    finally:
        torch.set_num_threads(before)


def _convolution_tflops(channels: int, dtype: torch.dtype, batch: int, seconds: float) -> float:
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1).to(dtype)
    x = torch.randn(batch, channels, TILE_LATENT_PX, TILE_LATENT_PX).to(dtype)
    flop = 2 * 9 * channels**2 * TILE_LATENT_PX**2 * batch
    with torch.inference_mode():
        layer(x)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            layer(x)
            count += 1
        return count * flop / (time.perf_counter() - start) / 1e12


def assumed_speed(config: RunConfig, model: ModelConfig, replicas: int, device: str) -> tuple[float, str]:
    """Return the TFLOP/s to expect of all replicas, and where the number comes from."""
    dtype = config.model.dtype
    if device == "cuda":
        one = GPU_TFLOPS[dtype]
        return one * replicas, f"assuming {one:g} TFLOP/s on each of {replicas} GPU replica(s)"
    width, batch = model.unet["block_out_channels"][0], config.sampling.batch_size
    one = probe_cpu_tflops(width, getattr(torch, dtype), batch, config.model.threads)
    return one * replicas, f"from one convolution timed here, {one * 1000:.0f} GFLOP/s, and {replicas} CPU replica(s)"


def plan_table(plan: Plan, config: RunConfig, model: ModelConfig, device: str, why: str = "as configured") -> str:
    """Return what `--plan` prints. `device` is "cpu" or "cuda", chosen as the dtype is, for the reason `why`."""
    cost = network_cost(model, config.model.dtype, config.sampling.batch_size, config.sampling.weight > 0)
    lines = ["levels          px (h x w)      latent px   µm/px          FLOP   tiles (batches) per step"]
    for i, level in enumerate(plan.levels):
        tilings = [f"{p.name} {len(t)} ({t.batch_count})" for p in plan.passes if (t := p.tilings[i]) is not None]
        px, flop = f"{level.height * LATENT_FACTOR} x {level.width * LATENT_FACTOR}", level_flop(plan, i, config, cost)
        lines.append(
            f"  {level.name:10} {px:>15} {f'{level.height} x {level.width}':>15} {model.scale.mpp(level.name):7g} "
            f"{_flops(flop):>13}   {', '.join(tilings) or 'given'}"
        )
    total = Calls()
    lines.append("passes          steps    U-Net    encode    decode  tiles        FLOP")
    for pass_ in plan.passes:
        calls = pass_calls(plan, pass_, config)
        lines.append(_pass_line(pass_.name, str(len(pass_.steps)), calls, cost))
        total += calls
    final = Calls(decode=evaluated(plan.decode))
    total += final
    lines += [_pass_line("decode", "", final, cost), _pass_line("all", "", total, cost)]
    cells = " x ".join(map(str, plan.grid_shape))
    speed, source = assumed_speed(config, model, config.ray.replicas or 1, device)
    canvas = f"{_size(canvas_nbytes(plan.arrays))} canvas"
    elsewhere = "" if config.canvas.store is None else f" in {config.canvas.store} (half as much again after a resume)"
    grown = min(MAX_CELLS, plan.levels[0].factor)
    lines += [
        f"conditions      {cells} cells of {model.ssl_dim} ({model.encoder}); up to {grown} x {grown} a tile",
        *([_inversion_line(plan, config, cost)] if config.condition != "reference" else []),
        f"guidance        {config.guidance.method}",
        f"dtype           {config.model.dtype} ({why})",
        f"replica         {_size(cost.weights_nbytes)} weights + about {_size(cost.activations_nbytes)} activations "
        f"({config.model.dtype}, batch {config.sampling.batch_size}), without the libraries' own",
        f"disk            {canvas}{elsewhere} + at most {_size(export_nbytes(plan, config))} exports",
        f"time            about {duration(total.flop(cost) / speed / 1e12)}, {source}",
    ]
    return "\n".join(lines)


def _inversion_line(plan: Plan, config: RunConfig, cost: NetworkCost) -> str:
    """Say what condition inversion takes: a gradient costs twice the call. The CDM's picture is one window."""
    level, settings = plan.levels[0], config.inversion
    size = [-(-side // level.factor) for side in plan.size_px] if plan.given else [TILE_PX, TILE_PX]
    count = len(Windows.over((size[0], size[1]), level, settings).tiling)
    flop = _flops(3 * count * settings.steps * cost.unet)
    return f"inversion       {count} window(s), {settings.steps} steps, {flop} in this process, not in the time below"


def _pass_line(name: str, steps: str, calls: Calls, cost: NetworkCost) -> str:
    return f"  {name:12} {steps:>6} {calls.unet:8,} {calls.encode:9,} {calls.decode:9,} {_flops(calls.flop(cost)):>18}"


def _flops(value: float) -> str:
    for unit, factor in (("PFLOP", 1e15), ("TFLOP", 1e12)):
        if value >= factor:
            return f"{value / factor:,.2f} {unit}"
    return f"{value / 1e9:,.2f} GFLOP"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.0f} MiB"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
