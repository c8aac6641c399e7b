"""A small cohort on disk: bags at 20x and 5x and a table of labels; positive is a fine sign AND a coarse one."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.features.bag_writer import write_bag
from tests.support.known_bag import known_plan

WIDTH = 5
CARRYING = (2, 3, 4)
"""Rows of the 5x tiles with the signs."""


@dataclass(frozen=True)
class KnownCohort:
    """Where the files lie and what the patients are."""

    features: Path
    labels: Path
    truth: dict[str, int]


def write_slide(folder: Path, name: str, fine: bool, coarse: bool, seed: int, **changes: object) -> Path:
    """Write one bag of six 5x tiles; three of them and their children carry the signs."""
    rng = np.random.default_rng(seed)
    plan = known_plan(6, WIDTH, slide=name, **{"synthetic": False, **changes})
    near, far = (rng.normal(size=(len(s.coords), WIDTH)).astype(np.float32) for s in plan.scales)
    parent = plan.scales[0].parent
    assert parent is not None
    near[np.isin(parent, CARRYING), 0] += 5 if fine else -5
    far[CARRYING, 1] += 5 if coarse else -5
    return write_bag(folder / f"{name}.h5", plan, {"20x": near, "5x": far})


def write_cohort(folder: Path, patients: int = 40, seed: int = 0, shuffled: bool = False) -> KnownCohort:
    """Write a cohort of which half is positive; every fourth patient has two slides, every third is of site B."""
    features = folder / "features"
    features.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    truth, rows = {}, []
    kinds = [(True, False), (False, True), (False, False)]
    marks = rng.permutation(patients) if shuffled else np.arange(patients)
    for number in range(patients):
        patient, label = f"P{number:03d}", number % 2
        truth[patient] = int(marks[number] % 2)
        fine, coarse = (True, True) if label else kinds[number // 2 % 3]
        for part in range(2 if number % 4 == 0 else 1):
            slide = f"{patient}-S{part}"
            write_slide(features, slide, fine, coarse, int(rng.integers(1 << 30)))
            score = 50 + number if truth[patient] else number % 40
            rows.append({"patient": patient, "slide": slide, "hrd_score": score, "hospital": "ABC"[number % 3]})
    labels = folder / "labels.csv"
    write_table(labels, rows)
    return KnownCohort(features, labels, truth)


def write_synthetic(folder: Path, known: KnownCohort, swapped: bool = False) -> Path:
    """Write a generated cohort: two bags of each patient with the signs of its class (`swapped`: of the other one), and
    a picture that failed."""
    (folder / "features").mkdir(parents=True)
    rows: list[dict[str, object]] = []
    for number, (patient, label) in enumerate(known.truth.items()):
        for copy in range(2):
            name = f"made-{patient}-{copy}"
            sign = bool(label) != swapped
            write_slide(folder / "features", name, sign, sign, 500 + 2 * number + copy, synthetic=True)
            kind = ("HR proficient", "HR deficient")[label]
            rows.append({"name": name, "label": kind, "patient": patient, "source_patient": patient, "status": "done"})
    rows.append({"name": "lost", "label": "", "patient": "P001", "source_patient": "P001", "status": "failed"})
    write_table(folder / "cohort.csv", rows)
    return folder


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[dict[str, str]]:
    """Read rows of CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
