"""What the model that drew the synthetic bags saw in its training: a list beside its weights, or unknown.

It knows names of slides, not models. The list is training_slides.json, as engine.training writes it.
"""

from dataclasses import dataclass
from pathlib import Path

from engine.model.weights.training_slides import TrainingSlides, read_training_slides
from mil.data.cohort import Cohort
from mil.data.names import match_names
from mil.errors import RunError


@dataclass(frozen=True)
class Exposure:
    """Which tested patients the generator saw."""

    known: bool
    """Whether the generator's list of training slides is there and says that it is whole."""
    patients: tuple[str, ...] = ()
    """Of the cohort, whose slides the generator was trained on."""
    slides: int | None = None
    """Slides on the generator's list."""

    @property
    def sentence(self) -> str:
        """Say it, for people. Every patient of the cohort is tested in some fold."""
        if self.patients:
            some = ", ".join(self.patients[:5]) + (" …" if len(self.patients) > 5 else "")
            more = "" if self.known else " at least (its list is not whole)"
            return (
                f"the generator saw the test patients: {len(self.patients)} of the tested patients have slides that it "
                f"was trained on{more} ({some}), so what its bags add cannot be told from what it remembers"
            )
        if self.known:
            return f"the generator saw none of the test patients: none of its {self.slides} training slides is theirs"
        return (
            "whether the generator saw the test patients is unknown: its list of training slides is absent or not whole"
        )


def exposure(generator: str | None, cohort: Cohort) -> Exposure:
    """Return what the model folder's list says about the cohort. Raises RunError for a folder or list that is none."""
    if generator is None:
        return Exposure(False)
    folder = Path(generator)
    if not folder.is_dir():
        raise RunError(f"--generator must be the model folder that drew the bags; {folder} is none. Check the path.")
    try:
        found: TrainingSlides | None = read_training_slides(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder} must hold a readable training_slides.json, or none; reading failed ({error}). Remove it, and "
            "the report says that the list is unknown."
        ) from error
    if found is None:
        return Exposure(False)
    owner = {slide.name: slide.patient for slide in cohort.slides}
    met = match_names(found.slides, owner).values()
    return Exposure(found.whole, tuple(sorted({owner[name] for name in met})), len(found.slides))
