"""Phantom patients with a label, and their slides: what the demo of multiple-instance learning learns from."""

import csv
import io
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from engine.core.files import disk_error, replacing, write_atomically
from engine.slides.phantom.render import Phantom
from engine.slides.phantom.slide import write_phantom_slide

Knobs = dict[str, tuple[float, float]]
"""Ranges of a phantom's knobs."""


CALM: Knobs = {"pleomorphism": (0.2, 0.3), "chromatin": (0.0, 0.1)}


WILD: Knobs = {"pleomorphism": (0.75, 0.85), "chromatin": (0.9, 1.0)}


ORDERLY: Knobs = {"architecture": (0.0, 0.1), "lumina": (0.40, 0.44)}


RAGGED: Knobs = {"architecture": (0.9, 1.0), "lumina": (0.58, 0.62)}
"""A score of 42 (configs/tasks/hrd.yaml) lies between the two of pleomorphism and the two of architecture."""


SECOND_SLIDE = 2
"""Every second patient has two slides."""


@dataclass(frozen=True)
class PhantomCohortConfig:
    """How many patients, and the size of their slides."""

    out: str
    """Folder to write into: slides/ and labels.csv."""
    patients: int = 60
    """Patients; every second one has two slides."""
    positive: float = 0.4
    """Share of positive patients, 0..1."""
    sites: int = 4
    """Hospitals the patients are spread over; they do not differ."""
    width: int = 4096
    """px."""
    height: int = 4096
    """px."""
    mpp: float = 0.5
    """µm/px."""
    seed: int = 0
    """Of the patients and their tissue."""
    processes: int = 2
    """Slides rendered side by side."""

    def __post_init__(self) -> None:
        if not 0 < self.positive < 1:
            raise ValueError(f"positive must lie between 0 and 1, a share; got {self.positive}.")
        if min(self.patients, self.sites, self.processes) < 1:
            raise ValueError(
                f"patients, sites and processes must be at least 1; got {self.patients}, {self.sites}, "
                f"{self.processes}."
            )
        if min(self.width, self.height) < 256 or not self.mpp > 0:
            raise ValueError(f"sides >= 256 px and mpp > 0 must hold; got {self.width}x{self.height}, {self.mpp}.")


@dataclass(frozen=True)
class PhantomSlide:
    """One row of the table, and what its slide is rendered from."""

    patient: str
    slide: str
    site: str
    phantom: Phantom

    @property
    def score(self) -> int:
        """0 to 100: the weaker of the two signs."""
        return round(100 * min(self.phantom.pleomorphism, self.phantom.architecture))

    def row(self) -> dict[str, object]:
        """Return the row of labels.csv."""
        knobs = {name: round(getattr(self.phantom, name), 3) for name in (*CALM, *ORDERLY)}
        return {"patient": self.patient, "slide": self.slide, "hrd_score": self.score, "site": self.site, **knobs}


def draw_cohort(config: PhantomCohortConfig) -> list[PhantomSlide]:
    """Return the slides of the cohort, by patient."""
    rng = np.random.default_rng(config.seed)
    signs = rng.permutation(np.array(list(_signs(config))))
    slides = []
    for number, (pleomorphic, ragged) in enumerate(signs):
        ranges = (WILD if pleomorphic else CALM) | (RAGGED if ragged else ORDERLY)
        knobs = {name: rng.uniform(low, high) for name, (low, high) in ranges.items()}
        patient, site = f"P{number + 1:03d}", f"site {chr(ord('A') + number % config.sites)}"
        for part in range(2 if number % SECOND_SLIDE == 0 else 1):
            seed = config.seed * 1_000_000 + 2 * number + part
            slides.append(PhantomSlide(patient, f"{patient}-{part + 1}", site, Phantom(seed, **knobs)))
    return slides


def _signs(config: PhantomCohortConfig) -> Iterator[tuple[bool, bool]]:
    """Yield (pleomorphic, ragged) of each patient: both in the share asked for, each one alone equally often."""
    both = round(config.patients * config.positive)
    one = round(config.patients * (math.sqrt(config.positive) - config.positive))
    for number in range(config.patients):
        yield number < both + one, number < both or both + one <= number < both + 2 * one


def write_cohort(config: PhantomCohortConfig) -> list[PhantomSlide]:
    """Write the slides that are missing and the table; return all slides. Raises EngineError if the disk refuses."""
    folder = Path(config.out) / "slides"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, f"{folder} cannot be made", folder.parent) from error
    slides = draw_cohort(config)
    jobs = [(folder / f"{s.slide}.tiff", s.phantom, config.width, config.height, config.mpp) for s in slides]
    jobs = [job for job in jobs if not job[0].exists()]
    with ProcessPoolExecutor(config.processes, get_context("spawn")) as pool:
        for _ in pool.map(_write_slide, *zip(*jobs, strict=True)) if jobs else ():
            pass
    table = io.StringIO()
    rows = [slide.row() for slide in slides]
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(Path(config.out) / "labels.csv", table.getvalue().encode())
    return slides


def _write_slide(path: Path, phantom: Phantom, width: int, height: int, mpp: float) -> None:
    with replacing(path) as partial:
        write_phantom_slide(partial, phantom, width, height, mpp)
