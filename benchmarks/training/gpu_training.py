"""How fast does a training step of the full size go on one GPU, and in how much memory? Random weights and patches.

    python -m benchmarks.training.gpu_training [--config configs/train_brca.yaml] [--batches 8,16,32,64] \
        [--peak-tflops 989]
    python -m benchmarks.training.gpu_training --train.gradient_checkpointing false        # any key of the \
        configuration
    python -m benchmarks.training.gpu_training --config configs/train_demo_refine.yaml --initial.model demo \
        --batches 2 --steps 1

The last is small enough to see on a CPU whether it runs at all.

A step is the trainer's own forward, loss and backward, clipping, AdamW and the weight average, on a batch that lies on
the device; benchmarks.training.train says what reading, noise and journal cost beside it. Per number of patches at
once: seconds of a step (median, after warm-up), patches/s, TFLOP/s of the model, its share of --peak-tflops (what the
maker states for dense products of the precision), and peak memory, which `--plan` of engine.train estimates. FLOP are
counted on the meta device, 2 per multiply-add; recomputing (train.gradient_checkpointing) is not counted.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.support.arguments import figures_parser
from benchmarks.training.train import BareStep
from engine.core.cli import parse as parse_config
from engine.core.runtime import choose_device, pin_arithmetic
from engine.core.units import LATENT_CHANNELS, TILE_LATENT_PX
from engine.model.networks import build_networks
from engine.model.zoomldm import ZoomLDM
from engine.training.cost import cells_shape, model_config, step_cost, work_of
from engine.training.denoiser.loss import DenoiserNetworks, noise_shares, noisy_latents, squared_errors, wanted_output
from engine.training.denoiser.settings import JointConfig
from engine.training.trainer import DTYPES

GIB = 2**30
_WARM_UP = 3


@dataclass(frozen=True)
class Figures:
    """One number of patches at once."""

    batch: int
    step_s: float
    patches_per_s: float
    tflops: float
    share: float | None
    """Of --peak-tflops."""
    peak_gib: float | None
    """Largest sum of tensors on the GPU; None on a CPU."""

    def line(self) -> str:
        """Return a row of the table."""
        share = "-" if self.share is None else f"{self.share:.1%}"
        memory = "-" if self.peak_gib is None else f"{self.peak_gib:.1f}"
        return f"{self.batch:7}{self.step_s:10.3f}{self.patches_per_s:12.2f}{self.tflops:10.2f}{share:>9}{memory:>10}"


TITLE = "  batch    step s   patches/s   TFLOP/s    share  peak GiB"


def stepper(config: JointConfig, device: str, batch: int) -> Callable[[], None]:
    """Return what does one optimiser step on a random batch."""
    facts, generator = model_config(config), torch.Generator(device).manual_seed(0)
    model = ZoomLDM(facts, build_networks(facts, device))
    model.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.train.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    networks = DenoiserNetworks(model).train().requires_grad_(requires_grad=True)
    bare = BareStep(networks, config.train)
    size = (batch, LATENT_CHANNELS, TILE_LATENT_PX, TILE_LATENT_PX)
    x0, noise = (torch.randn(size, generator=generator, device=device) for _ in range(2))
    times = torch.randint(1000, (batch,), generator=generator, device=device)
    level = len(facts.magnifications) - 1
    cells = [torch.randn(cells_shape(facts), generator=generator, device=device)] * batch
    dropped = torch.zeros(batch, dtype=torch.bool, device=device)
    shares = noise_shares(model.alphas_cumprod.to(device), times)
    wanted, dtype = wanted_output(facts.prediction_type, shares, x0, noise), DTYPES[config.precision]

    def loss_of() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            output = networks(noisy_latents(shares, x0, noise), times, cells, [level] * batch, dropped)
        return squared_errors(output.float() - wanted, config.train.coarse_weights).mean()

    def step() -> None:
        bare(loss_of)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def measure(config: JointConfig, device: str, batch: int, steps: int, peak: float | None) -> Figures:
    """Measure some steps with so many patches at once. Raises: torch.OutOfMemoryError."""
    facts = model_config(config)
    trained, forward = work_of(config, facts, build_networks(facts, "meta"))
    flop = step_cost(trained, forward)[0] * batch
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, taken = stepper(config, device, batch), []
    for number in range(_WARM_UP + steps):
        began = time.perf_counter()
        step()
        if number >= _WARM_UP:
            taken.append(time.perf_counter() - began)
    seconds = float(np.median(taken))
    tflops = flop / seconds / 1e12
    memory = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None
    return Figures(batch, seconds, batch / seconds, tflops, tflops / peak if peak else None, memory)


def parse(argv: list[str]) -> tuple[argparse.Namespace, JointConfig]:
    """Read the command line: what it does not know are keys of the training's configuration."""
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--config", default="configs/train_brca.yaml", help="of a denoiser")
    parser.add_argument("--batches", default="8,16,32,64", help="patches at once")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense, in the configuration's precision")
    arguments, keys = parser.parse_known_args(argv)
    return arguments, parse_config(["--config", arguments.config, *keys], JointConfig, parser.prog, "")


def main(argv: list[str]) -> int:
    arguments, config = parse(argv)
    device = choose_device(config.device, "device")
    if device == "cpu" and config.device != "cpu":
        sys.stderr.write(
            "benchmarks.training.gpu_training: there must be a GPU; torch sees none. --device cpu does without.\n"
        )
        return 1
    pin_arithmetic(config.threads)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}"
    recomputed = ", recomputing" if config.train.gradient_checkpointing else ""
    print(f"{name}, torch {torch.__version__}, {arguments.config}, {config.precision}{recomputed}\n{TITLE}")
    rows, failed = [], False
    for batch in map(int, arguments.batches.split(",")):
        try:
            rows.append(measure(config, device, batch, arguments.steps, arguments.peak_tflops))
        except torch.OutOfMemoryError as error:  # fewer may still fit
            print(f"{batch:7}  {str(error).splitlines()[0]}")
            failed = True
            continue
        print(rows[-1].line(), flush=True)
    if arguments.json:
        found = {"device": name, "torch": torch.__version__, **vars(arguments), "json": None}
        arguments.json.write_text(json.dumps(found | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
