"""The slides a model was trained on, by name, in a file beside its weights; it travels with every later training.

Whoever tests on generated pictures has to know it: a generator that saw the test patients proves nothing. It does not
know models or slides. A model without the file was trained by an earlier release or elsewhere: its list is unknown.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.core.files import write_json

FILE = "training_slides.json"


@dataclass(frozen=True)
class TrainingSlides:
    """What is known of the slides behind a model's weights."""

    slides: tuple[str, ...]
    """Names, sorted, of this training and those before it."""
    whole: bool
    """False where the weights began from a model whose list is unknown."""


def read_training_slides(folder: Path) -> TrainingSlides | None:
    """Return the list of a model folder, or of the one that a part lies in; None where there is none.

    Raises: ValueError, KeyError, TypeError if damaged.
    """
    path = next((place / FILE for place in (folder, folder.parent) if (place / FILE).is_file()), None)
    if path is None:
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    slides, whole = content["slides"], content["whole"]
    if not isinstance(whole, bool) or not isinstance(slides, list) or not all(isinstance(s, str) for s in slides):
        raise TypeError("slides must be names, whole true or false")
    return TrainingSlides(tuple(slides), whole)


def write_training_slides(folder: Path, slides: Iterable[str], began_from: Iterable[str | Path] = ()) -> None:
    """Write the list of a model: the slides of this training and those of the models it began from, folders or Hub ids.

    Raises: CanvasError if the disk refuses.
    """
    names, whole = set(slides), True
    for source in began_from:
        found = read_training_slides(Path(source))
        whole = whole and found is not None and found.whole
        names |= set(found.slides if found is not None else ())
    content = asdict(TrainingSlides(tuple(sorted(names)), whole))
    write_json(folder / FILE, content)
