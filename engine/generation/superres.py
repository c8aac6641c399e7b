"""A picture of low magnification as the guide of a canvas: its configuration and its plan.

The picture steers as it is: reduced again, the result is the picture.
"""

from dataclasses import dataclass, field, fields, replace
from math import log2

from engine.conditions.reference import read_reference
from engine.core.errors import EngineError
from engine.core.units import TILE_PX, MagnificationScale
from engine.generation.run import Job, describe, prepare
from engine.sampling.config import GuidanceConfig, RunConfig, SamplingConfig
from engine.sampling.plan import MAX_STEP


@dataclass(frozen=True)
class SuperresConfig(RunConfig):
    """Command 1's keys, and which picture is enlarged. The canvas follows from the picture."""

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(start=200, weight=1.0))
    # A given picture is no blurred sample of the model: every px of it is meant, so every latent px is held to it.
    guidance: GuidanceConfig = field(default_factory=lambda: GuidanceConfig(to_t=1, strength=1.0, cell=1))
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
