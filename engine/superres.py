"""A picture of low magnification, enlarged to the base magnification by the model.

    python -m engine.superres IMAGE --scale 4
    python -m engine.superres IMAGE --mpp 2 --config configs/brca.yaml --output.folder runs/enlarged
    python -m engine.superres IMAGE --scale 16 --sampling.start 1000

The picture steers as it is: reduced again, the result is the picture. Other keys are generate_large.py's, and so is
what a run leaves; run the same command again to continue. This module may name `actors`, only inside the function that
is called when Ray is wanted. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 or 143 interrupted.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, fields, replace
from math import log2

from engine.arguments import parse_with_flags
from engine.config import RunConfig, SamplingConfig
from engine.devices import Hardware
from engine.errors import EngineError
from engine.magnification import TILE_PX, MagnificationScale
from engine.model.zoomldm import ZoomLDM
from engine.outcome import finish
from engine.progress import Progress
from engine.ray_address import announce_address
from engine.reference import read_reference
from engine.run import Crew, Job, describe, prepare
from engine.tiles import MAX_STEP

PROG = "python -m engine.superres"
FLAGS = {"plan": "print tiles, batches, network calls, FLOP, memory, disk, dtype and an estimated time, and stop"}
_FROM_PICTURE = ("canvas.height", "canvas.width", "canvas.levels", "condition", "guide")
"""Keys that follow from the picture."""


@dataclass(frozen=True)
class SuperresConfig(RunConfig):
    """Command 1's keys, and which picture is enlarged. The canvas follows from the picture."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(start=200, weight=1.0))
    image: str = ""
    """Picture to enlarge: 8-bit RGB, PNG, JPEG or TIFF; may be given first, without --image."""
    scale: int | None = None
    """Enlargement on each axis: 2, 4, 8 or 16. Or say the picture's mpp or magnification."""
    mpp: float | None = None
    """The picture's µm/px, a power of two times the model's."""
    magnification: str | None = None
    """The picture's magnification, one of the model's, such as 5x."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.image:
            raise ValueError("a picture must be named: python -m engine.superres IMAGE --scale 4.")
        if self.condition != "reference" or self.guide:
            raise ValueError("condition and guide follow from the picture; got one of them. Drop it.")
        given = [k for k in ("scale", "mpp", "magnification") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"one of scale, mpp and magnification must say what the picture is; got {', '.join(given) or 'none'}."
            )
        if self.mpp is not None and not self.mpp > 0:
            raise ValueError(f"mpp must be positive (µm/px); got {self.mpp}.")


def factor_of(asked: SuperresConfig, scale: MagnificationScale) -> int:
    """Return the enlargement on each axis. Raises ValueError unless the model can do it in one step."""
    known = [f for f in (scale.factor(name) for name in scale.names) if 1 < f <= MAX_STEP]
    if asked.magnification is not None:
        found, came = float(scale.factor(asked.magnification)), f"magnification={asked.magnification}"
    elif asked.mpp is not None:
        found, came = asked.mpp / scale.base_mpp, f"mpp={asked.mpp:g}"
    else:
        assert asked.scale is not None  # one of three is given
        found, came = float(asked.scale), f"scale={asked.scale}"
    near = round(found)
    if near not in known or abs(log2(found / near)) > 0.02:
        mpps = ", ".join(f"{scale.base_mpp * f:g}" for f in known)
        raise ValueError(
            f"{came} must mean an enlargement of {', '.join(map(str, known))}, that is a picture of {mpps} µm/px; it "
            f"means {found:g}. Resize the picture to one of them first."
        )
    return near


def plan_run(asked: SuperresConfig) -> Job:
    """Fit the canvas to the picture and cut the plan.

    Raises: ValueError for an enlargement the model has not; EngineError for a picture that cannot be used.
    """
    model = describe(asked.model)
    factor = factor_of(asked, model.scale)
    try:
        height, width, _ = read_reference(asked.image, "picture to enlarge", TILE_PX // factor).shape
    except ValueError as error:
        raise EngineError(str(error)) from error
    levels = (model.scale.names[factor.bit_length() - 1], model.scale.base)
    plain = {f.name: getattr(asked, f.name) for f in fields(RunConfig)}
    plain |= {
        "canvas": replace(asked.canvas, height=height * factor, width=width * factor, levels=levels),
        "condition": "reference" if asked.reference or asked.embeddings else "inversion",
        "guide": asked.image,
    }
    return prepare(RunConfig(**plain), model)


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    fixed = [key for key in _FROM_PICTURE if any(word.partition("=")[0] == f"--{key}" for word in argv)]
    if fixed:
        sys.stderr.write(f"{PROG}: --{fixed[0]} follows from the picture; got one. Drop it.\n")
        return 2
    if argv and not argv[0].startswith("-"):
        argv = [f"--image={argv[0]}", *argv[1:]]
    asked, flags = parse_with_flags(argv, SuperresConfig, PROG, (__doc__ or "").splitlines()[0], FLAGS)
    return finish(PROG, lambda: plan_run(asked), on_ray, ask_ray, Progress(), plan_only="plan" in flags)


def on_ray(connection: ExitStack, model: ZoomLDM, config: RunConfig) -> AbstractContextManager[Crew]:
    """Compute on the replicas of a Ray cluster, or of a private Ray."""
    announce_address(config.ray.address)
    from actors.crew import work_on_ray  # Ray is imported only by runs that use it

    return work_on_ray(connection, model, config)


def ask_ray(config: RunConfig) -> Hardware:
    """Find out what the replicas of a Ray cluster, or of a private Ray, compute on."""
    announce_address(config.ray.address)
    from actors.hardware import hardware_of_replicas

    return hardware_of_replicas(config.ray, config.model.device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
