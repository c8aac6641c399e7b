"""How fast is the full-size network on one GPU? Random weights, without Ray.

    python -m benchmarks.sampling.gpu [--size 4096] [--methods newton,linear,none] [--dtype bfloat16] \
        [--batch-size 16]
    python -m benchmarks.sampling.gpu --whole                                     # every step; newton alone is 113 \
        PFLOP
    python -m benchmarks.sampling.gpu --device cpu --model tiny --size 320 --batch-size 2 --steps 2     # does it \
        run at all

Per method: seconds of the whole picture (sampling and decoding; exports are the same for all and left out), FLOP
counted by engine.generation.cost on the meta device, TFLOP/s over the wall time and over the time the network was
waited for, and peak GPU memory. By default only the first steps are run (--limit-steps) and sampling is EXTRAPOLATED to
all of them, which the table says: steps differ in nothing that costs. Decoding is always whole. The clock starts after
a small warm-up run in the same batch shape, and answers are fetched to the CPU, so the device is done when it stops.
linear first fits its map as a run of a published checkpoint does (fit_s, in the total).

Random weights cost what trained ones cost; the picture is noise. Tiles do not overlap by default (--tile-stride 64:
256 tiles at 4096 px, the published recipe); configs/brca.yaml overlaps them (48: 441 tiles). TF32 and autotuning are
off, as in every run of the engine.
"""

import argparse
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, this is not the project's folder

from benchmarks.support.arguments import figures_parser, write_json
from benchmarks.support.bare import BareRun, Timing, maps_for
from engine.core.config import ModelConfigSection
from engine.core.errors import EngineError
from engine.core.runtime import choose_device, pin_arithmetic
from engine.generation.cost import Calls, NetworkCost, evaluated, network_cost, pass_calls
from engine.model.config import ModelConfig, published_config, tiny_config
from engine.model.networks import build_networks
from engine.model.zoomldm import ZoomLDM
from engine.sampling.config import CanvasConfig, DecodeConfig, GuidanceConfig, RunConfig, SamplingConfig
from engine.sampling.denoiser import LocalDenoiser

METHODS = ("newton", "linear", "none")
GIB = 2**30


def random_model(config: ModelConfig, device: str, dtype: torch.dtype) -> ZoomLDM:
    """Return a model with random weights, made where it computes; finite at any step, like a trained one."""
    torch.manual_seed(0)
    model = ZoomLDM(config, build_networks(config, device)).to(dtype=dtype).channels_last()
    with torch.no_grad():
        # Small predictions of noise: large ones would be carried from step to step and grow.
        model.unet.conv_out.weight.mul_(0.1)
    return model.requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class Figures:
    """What one method took. Seconds of the whole picture, unless they say measured."""

    method: str
    steps: int
    steps_measured: int
    tiles_per_step: int
    total_s: float
    fit_s: float
    sampling_s: float
    """Extrapolated when steps_measured < steps."""
    sampling_measured_s: float
    decoding_s: float
    pflop: float
    """Of the whole picture, counted; the fit is not in it."""
    tflops: float
    """Counted FLOP of what was measured over its wall time."""
    tflops_network: float
    """The same over the time the network was waited for."""
    tflops_decoding: float
    peak_gib: float | None
    """Largest sum of tensors on the GPU, weights included; None on a CPU."""
    reserved_gib: float | None
    """What torch took from the GPU."""
    estimated_gib: float
    """Weights and activations as engine.generation.cost counts them."""

    @property
    def extrapolated(self) -> bool:
        return self.steps_measured < self.steps

    def line(self) -> str:
        """Return a row of the table."""
        memory = "-" if self.peak_gib is None else f"{self.peak_gib:.1f} / {self.reserved_gib:.1f}"
        said = f"EXTRAPOLATED from {self.steps_measured} of {self.steps} steps" if self.extrapolated else "measured"
        return (
            f"{self.method:8}{self.total_s:10.1f}{self.fit_s:8.1f}{self.sampling_s:11.1f}{self.decoding_s:10.1f}"
            f"{self.pflop:9.3f}{self.tflops:9.1f}{self.tflops_network:10.1f}{memory:>16}  {said}"
        )


TITLE = (
    "method     total s   fit s sampling s  decode s    PFLOP  TFLOP/s   network  GiB used/held\n"
    "                                                           (wall)  (waiting)"
)


def sampling_calls(run: BareRun) -> Calls:
    """Count what sampling asks of the networks. Contexts are computed once: the denoiser remembers them."""
    total = Calls()
    for pass_ in run.plan.passes:
        calls = pass_calls(run.plan, pass_, run.config)
        total += replace(calls, summarize=calls.summarize // len(pass_.steps))
    return total


def settle(device: str) -> None:
    """Wait until the device has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def figures(run: BareRun, cost: NetworkCost, limit: int, fit_s: float, timing: Timing) -> Figures:
    """Put one method's times in relation to its FLOP."""
    steps = len(run.plan.finest_pass.steps)
    measured = min(limit, steps)
    flop, whole = (sampling_calls(r).flop(cost) for r in (run.first_steps(measured), run))
    decode_flop = Calls(decode=evaluated(run.plan.decode)).flop(cost)
    sampling_s = timing.sampling_s * whole / flop
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    tiling = run.plan.finest_pass.tilings[-1]
    return Figures(
        method=run.config.guidance.method,
        steps=steps,
        steps_measured=measured,
        tiles_per_step=0 if tiling is None else len(tiling),
        total_s=fit_s + sampling_s + timing.decoding_s,
        fit_s=fit_s,
        sampling_s=sampling_s,
        sampling_measured_s=timing.sampling_s,
        decoding_s=timing.decoding_s,
        pflop=(whole + decode_flop) / 1e15,
        tflops=flop / timing.sampling_s / 1e12,
        tflops_network=flop / timing.sampling_waited_s / 1e12,
        tflops_decoding=decode_flop / timing.decoding_waited_s / 1e12,
        peak_gib=torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        reserved_gib=torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
        estimated_gib=(cost.weights_nbytes + cost.activations_nbytes) / GIB,
    )


def measure(model: ZoomLDM, config: RunConfig, cost: NetworkCost, limit: int) -> Figures:
    """Measure one method: warm up, fit its map, run its first steps and decode."""
    denoiser, device = LocalDenoiser(model), model.device.type
    edge = min(config.canvas.height, 512)
    small = replace(config, canvas=CanvasConfig(edge, edge), guidance=replace(config.guidance, corrections=1))
    start = time.perf_counter()
    maps = maps_for(config, model, denoiser)
    settle(device)
    fit_s = time.perf_counter() - start if config.guidance.method == "linear" else 0.0
    with tempfile.TemporaryDirectory() as folder:
        BareRun.of(small, model.config.scale, model.config.ssl_dim, maps).first_steps(1).go(
            Path(folder) / "warm", denoiser
        )
        settle(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run = BareRun.of(config, model.config.scale, model.config.ssl_dim, maps)
        timing = run.first_steps(limit).go(Path(folder) / "run", denoiser)
    return figures(run, cost, limit, fit_s, timing)


def run_config(arguments: argparse.Namespace, method: str, device: str) -> RunConfig:
    """Return the run of one method that the command line asks for."""
    return RunConfig(
        model=ModelConfigSection(source="random", device=device, dtype=arguments.dtype, threads=arguments.threads),  # type: ignore[arg-type]
        canvas=CanvasConfig(arguments.size, arguments.size),
        sampling=SamplingConfig(
            # newton steers levels that are sampled side by side, as published
            from_guide=0 if method == "newton" else None,
            stride=1000 // arguments.steps,
            tile_stride=arguments.tile_stride,
            batch_size=arguments.batch_size,
        ),  # fmt: skip
        guidance=GuidanceConfig(method=method, corrections=arguments.corrections),  # type: ignore[arg-type]
        decode=DecodeConfig(batch_size=min(arguments.batch_size, 8)),
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--size", type=int, default=4096, help="px of the canvas at the finest magnification")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=20, help="of the whole sampling")
    parser.add_argument("--corrections", type=int, default=10, help="of newton, per step")
    parser.add_argument("--limit-steps", type=int, default=2, help="steps that are run; the rest is extrapolated")
    parser.add_argument("--whole", action="store_true", help="run every step")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch-size", type=int, default=16, help="tiles; guidance doubles it in the U-Net")
    parser.add_argument("--tile-stride", type=int, default=64, help="latent px; 64 = tiles side by side")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the coordinator (of all with cpu)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="full", choices=("full", "tiny"), help="tiny: does it run at all")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.methods.split(",")) - set(METHODS))
    if unknown:
        parser.error(f"--methods must be of {', '.join(METHODS)}; got {', '.join(unknown)}")
    return arguments


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    try:
        device = choose_device(arguments.device)
    except EngineError as error:
        print(f"benchmarks.sampling.gpu: {error}\nTo see whether it runs at all: --device cpu --model tiny --size 320")
        return 1
    pin_arithmetic(arguments.threads)
    size = published_config() if arguments.model == "full" else tiny_config()
    model = random_model(size, device, getattr(torch, arguments.dtype))
    cost = network_cost(size, arguments.dtype, arguments.batch_size, guided_calls=True)
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}, {arguments.threads} threads"
    )
    print(
        f"{name}, torch {torch.__version__}, {arguments.model} model, {arguments.dtype}, batch {arguments.batch_size}"
    )
    print(f"{arguments.size} x {arguments.size} px, {arguments.steps} steps\n{TITLE}")
    limit = arguments.steps if arguments.whole else arguments.limit_steps
    rows, failed = [], False
    for method in arguments.methods.split(","):
        try:
            row = measure(model, run_config(arguments, method, device), cost, limit)
        except (EngineError, torch.OutOfMemoryError) as error:  # the other methods may still go
            print(f"{method:8}{str(error).splitlines()[0]}")
            failed = True
            continue
        rows.append(row)
        print(row.line(), flush=True)
    found = {"device": name, "torch": torch.__version__, **vars(arguments), "json": None}
    found["rows"] = [asdict(row) | {"extrapolated": row.extrapolated} for row in rows]
    write_json(arguments.json, found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
