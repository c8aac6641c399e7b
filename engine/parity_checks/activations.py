"""Reference activations replayed: which ones a folder holds, how ours differ, how much they may.

The replays call the same functions as a run. They know the protocol that made the references (timesteps, strides,
weights), which the files do not carry. Source: activations of the published implementations with small random weights.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from engine.canvas.canvas import BAND, Canvas
from engine.conditions.inversion import inversion_loss
from engine.core.numerics import resize_by
from engine.core.units import TILE_LATENT_PX
from engine.model.zoomldm import ZoomLDM
from engine.parity_checks.ties import decide
from engine.sampling.blend import gaussian_weight
from engine.sampling.config import GuidanceConfig
from engine.sampling.denoiser import LocalDenoiser
from engine.sampling.pixels import decode_rows, to_uint8
from engine.sampling.plan import Level, Pass, Plan, make_tiling
from engine.sampling.sampler import Sampling, sample_large
from engine.sampling.schedule import steps
from engine.sampling.ssl_grid import tile_cells

Expected = dict[str, Tensor]
PARTS_TOLERANCE, CANVAS_TOLERANCE, BYTES_TOLERANCE = 3e-5, 1e-4, 1e-3
"""PARTS holds in float32 for every CPU: one kernel or another adds in another order, and up to 1.1e-5 was read."""
INVERSION_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """One reference: relative norm of the difference (for pictures: share of bytes that differ)."""

    name: str
    error: float
    tolerance: float
    ties: int = 0
    """Latent pixels that lie between two codes (engine.parity_checks.ties)."""
    otherwise: int = 0
    """How many of them the reference drew as the other code."""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def relative(ours: Tensor, expected: Tensor) -> float:
    """Return |ours − expected| / |expected|, in float64; infinite when the shapes differ."""
    if ours.shape != expected.shape:
        return float("inf")
    a, b = ours.detach().double().cpu(), expected.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


class SilentCallback:
    """Nobody looks on."""

    def step(self, name: str, done: int, total: int) -> None:
        del name, done, total

    def tiles(self, count: int) -> None:
        del count


def replay_parts(model: ZoomLDM, raw: ZoomLDM | None, e: Expected) -> Iterator[Check]:
    """Replay schedule, Summarizer, U-Net, autoencoder, resizing and the window weight."""

    def check(name: str, compute: Callable[[], Tensor]) -> Iterator[Check]:
        if name in e:
            yield Check(name, relative(compute(), e[name]), PARTS_TOLERANCE)

    def at(name: str) -> Tensor:
        return e[name].to(model.device)

    yield from check("alphas_cumprod", lambda: model.alphas_cumprod)
    yield from check("betas", lambda: model.betas)
    for name in sorted(n for n in e if n.startswith("summarizer.out.")):
        index = int(name.rsplit("mag", 1)[1])
        grid = at(name.replace(".out.", ".in."))
        # These inputs are past pooling and standardising, which `summarize` does first.
        yield from check(name, lambda grid=grid, index=index: model.conditioner([grid], [index]))
    for name, which in (("unet.eps_ema", model), ("unet.eps_raw", raw)):
        if which is not None:
            yield from check(name, lambda m=which: m.predict_eps(at("unet.x"), at("unet.t"), at("unet.context"), 0.0))
    for name in sorted(n for n in e if n.startswith("cfg.eps_w")):
        found = re.fullmatch(r"cfg\.eps_w([\d.]+)_t(\d+)", name)
        if found is not None:
            w, t = float(found[1]), int(found[2])
            yield from check(name, lambda w=w, t=t: model.predict_eps(at("unet.x"), t, at("unet.context"), w))
    yield from check("vae.encode", lambda: model.encode(at("vae.image")))
    if "vae.decode" in e:
        error_of = lambda z: relative(model.decode(z), e["vae.decode"])  # noqa: E731
        found = decide(model, at("vae.encode"), error_of, PARTS_TOLERANCE)
        yield Check("vae.decode", found.error, PARTS_TOLERANCE, found.ties, found.otherwise)
    yield from check("vae.decode_no_quant", lambda: _decode_unquantised(model, at("vae.encode")))
    for name in sorted(n for n in e if n.startswith("resize.")):
        scale = int(re.sub(r"\D", "", name))
        if ".down" in name:
            yield from check(name, lambda scale=scale: resize_by(at("vae.image"), 1 / scale))
        else:
            source = name.replace(".up", ".down")
            yield from check(name, lambda scale=scale, source=source: resize_by(at(source), scale))
    for name in sorted(n for n in e if n.startswith("gaussian_kernel_")):
        size, sigma = name.removeprefix("gaussian_kernel_").split("_s")
        yield from check(
            name, lambda size=size, sigma=sigma: torch.from_numpy(gaussian_weight(int(size), float(sigma)))
        )


def _decode_unquantised(model: ZoomLDM, latents: Tensor) -> Tensor:
    sample = (latents / model.config.scale_factor).to(model.dtype)
    return model.vae.decode(sample, force_not_quantize=True, return_dict=False)[0]


def replay_decode_large(model: ZoomLDM, e: Expected) -> Iterator[Check]:
    """Replay the windowed decoder; more than one grey level of difference anywhere is an error above 1."""
    name = "decode_large.image_u8"
    if name not in e:
        return

    def error_of(latents: Tensor) -> float:
        off = np.abs(_in_windows(model, latents).astype(int) - e[name].numpy())
        return float((off > 0).mean()) if off.max() <= 1 else 1 + float(off.mean())

    found = decide(model, e["decode_large.latent"], error_of, BYTES_TOLERANCE)
    yield Check(name, found.error, BYTES_TOLERANCE, found.ties, found.otherwise)


def _in_windows(model: ZoomLDM, latents: Tensor) -> np.ndarray:
    """Decode (1, 3, h, w) in windows of stride 16: uint8 (1, 4h, 4w, 3)."""
    latent = latents[0].numpy()
    height, width = latent.shape[1:]
    tiling = make_tiling(height, width, 16, 1)
    read = lambda y0, y1: latent[:, y0:y1]  # noqa: E731
    rows = decode_rows(read, (height, width), tiling, LocalDenoiser(model), 0.8, "replay")
    return to_uint8(np.concatenate(list(rows), axis=1)).transpose(1, 2, 0)[None]


def _context_at(model: ZoomLDM, grid: np.ndarray, name: str) -> Tensor:
    found = re.search(r"i(\d+)_j(\d+)", name)
    if found is None:
        raise ValueError(f"a context's name must end in iROW_jCOLUMN (latent px); got {name}.")
    cells = tile_cells(grid, int(found[1]), int(found[2]), 1)
    return model.summarize([torch.from_numpy(cells).to(model.device)], [0])


def _sample(model: ZoomLDM, grid: np.ndarray, x_t: np.ndarray, pass_: Pass, noise: list[np.ndarray]) -> np.ndarray:
    """Run one pass of `sample_large` over x_t (3, h, w) with given noise; returns the latents (3, h, w)."""
    height, width = x_t.shape[1:]
    level = Level("base", 1, 0, height, width)
    windows = make_tiling(height, width, TILE_LATENT_PX, 1)
    plan = Plan((level,), (pass_,), (windows,), (4 * height, 4 * width))
    given = lambda stream, step, rows, width: noise[step][:, rows[0] : rows[1]]  # noqa: E731
    with tempfile.TemporaryDirectory() as folder, Canvas.open(Path(folder) / "run", {}, {"base": (height, width)}) as c:
        for y0 in range(0, height, BAND):
            c.write("base", y0, np.ascontiguousarray(x_t[:, y0 : y0 + BAND]))
        c.commit(0, 0)
        sample_large(
            Sampling(plan, c, grid, LocalDenoiser(model), GuidanceConfig("none"), None, 0.8, given, SilentCallback())
        )
        return c.read("base", 0, height)


def _untile(tiles: np.ndarray) -> np.ndarray:
    """Put row-major square tiles (n², 3, h, w) together: (3, n·h, n·w)."""
    return rearrange(tiles, "(y x) c h w -> c (y h) (x w)", y=round(len(tiles) ** 0.5))


def replay_refine(model: ZoomLDM, e: Expected) -> Iterator[Check]:
    """Replay the published seam removal: t from 100·steps, stride 100, w = 2, window stride 16."""
    if "refine.out" not in e:
        return
    grid = e["refine.ssl_grid"].numpy()
    for name in sorted(n for n in e if n.startswith("refine.window_context.")):
        yield Check(name, relative(_context_at(model, grid, name), e[name]), PARTS_TOLERANCE)
    count = sum(n.startswith("refine.noise.") for n in e) - 1
    schedule = steps(100 * count, 100)
    x0 = _untile(e["refine.x0_in"].numpy())
    noise = [e[f"refine.noise.{i + 1}"][0].numpy() for i in range(count)]
    x_t = schedule[0].renoise(x0, _untile(e["refine.noise.0"].numpy()))
    tiling = make_tiling(x0.shape[1], x0.shape[2], 16, 1)
    out = _sample(model, grid, x_t, Pass("refine", schedule, (tiling,), "uniform", 2.0, False, "noise"), noise)
    yield Check("refine.out", relative(torch.from_numpy(out), torch.from_numpy(_untile(e["refine.out"].numpy()))),
                CANVAS_TOLERANCE)  # fmt: skip


def replay_panorama(model: ZoomLDM, e: Expected) -> Iterator[Check]:
    """Replay the predecessor's large image: t from 100·steps, stride 100, w = 3, window stride 16, clean last step."""
    if "panorama.latent" not in e:
        return
    grid = np.ascontiguousarray(e["panorama.embeddings"].permute(2, 0, 1).numpy())
    for name in sorted(n for n in e if n.startswith("panorama.context.")):
        ours = model.null_context(1) if name.endswith(".uncond") else _context_at(model, grid, name)
        yield Check(name, relative(ours, e[name]), PARTS_TOLERANCE)
    count = sum(n.startswith("panorama.noise.") for n in e)
    schedule = steps(100 * count, 100, last_clean=True)
    noise = [e[f"panorama.noise.{i}"][0].numpy() for i in range(count)]
    x_t = schedule[0].renoise(e["panorama.init.0"][0].numpy(), noise[0])
    tiling = make_tiling(x_t.shape[1], x_t.shape[2], 16, 1)
    later = [*noise[1:], np.zeros_like(noise[0])]
    out = _sample(model, grid, x_t, Pass("panorama", schedule, (tiling,), "uniform", 3.0, False, "noise"), later)
    yield Check("panorama.latent", relative(torch.from_numpy(out)[None], e["panorama.latent"]), CANVAS_TOLERANCE)


def replay_inversion(raw: ZoomLDM, e: Expected) -> Iterator[Check]:
    """Replay the loss of condition inversion and its gradient; raw weights, variety 0.05. Not in inference mode."""
    for name in sorted(n for n in e if n.startswith("inversion.loss_t")):
        t = int(re.sub(r"\D", "", name))
        grid, latents, noise = (e[f"inversion.{key}"].to(raw.device) for key in ("feat", "latent", "eps"))
        grid.requires_grad_()
        loss = inversion_loss(raw, grid[None], latents, noise, t, grid.shape[1].bit_length() - 1, 0.05)
        (gradient,) = torch.autograd.grad(loss.sum(), grid)
        yield Check(name, relative(loss, e[name]), INVERSION_TOLERANCE)
        yield Check("inversion.grad", relative(gradient, e["inversion.grad"]), INVERSION_TOLERANCE)


def loosened(checks: Iterator[Check], factor: float) -> Iterator[Check]:
    """Scale tolerances, for arithmetic with fewer digits."""
    for check in checks:
        yield replace(check, tolerance=check.tolerance * factor)
