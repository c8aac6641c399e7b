"""The table of the synthetic bags that a protocol needs, as engine.generate_cohort takes it. It draws none."""

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

from engine.core.files import write_atomically
from mil.augmentation.config import AugmentConfig
from mil.data.splits import Fold
from mil.errors import StudyError
from mil.study import Study

COLUMNS: tuple[str, ...] = ("name", "reference", "label", "patient", "source_patient", "source_slide")


def wanted_rows(study: Study, folds: Mapping[float, Sequence[Fold]], amount: int) -> list[dict[str, str]]:
    """Return a row per bag: `amount` of each patient that some fold trains on, its slides in turn."""
    trained = sorted({patient for parts in folds.values() for fold in parts for patient in fold.train})
    rows = []
    for patient in trained:
        slides = [s for s in study.cohort.slides if s.patient == patient]
        for number, slide in enumerate(islice(cycle(slides), amount)):
            label = study.task.classes[slide.label]
            values = (f"{slide.name}-synthetic-{number}", slide.name, label, patient, patient, slide.name)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def write_wanted(config: AugmentConfig, study: Study, folds: Mapping[float, Sequence[Fold]]) -> str:
    """Write the table; return what to do with it. Raises: StudyError if the file holds something else, CanvasError."""
    assert config.wanted is not None  # asked for
    path = Path(config.wanted)
    rows = wanted_rows(study, folds, config.amount or 1)
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table = out.getvalue().encode()
    if path.exists() and path.read_bytes() != table:
        raise StudyError(f"--wanted must name a new file; {path} holds something else. Remove it, or name another.")
    write_atomically(path, table)
    patients = len({row["patient"] for row in rows})
    encoder = study.cohort.encoder.partition(" ")[0]  # foreign bags may not say theirs
    encoders = f" --bags.encoders '[{encoder}]'" if encoder else ""
    return (
        f"{len(rows)} synthetic bags of {patients} patients are asked for in {path}. Draw them:\n"
        f"python -m engine.generate_cohort --table {path} --slides SLIDES --out SYNTHETIC --bags_only true{encoders}\n"
    )
